"""Faults on purpose: runs and bundles are harmed in thousands of ways, and one judge says whether the end is right."""
