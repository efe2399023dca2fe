"""Faults on purpose: runs and bundles are harmed in thousands of ways, and one judge says whether the end is right.

`make fast` makes a few examples of each kind, `make faults MINUTES=60` as many as fit into an hour. Hypothesis draws
them, and makes a failing one small.
"""
