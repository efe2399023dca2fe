"""Accelerator, step loop, schedule, checkpoints, resume. Knows no dataset's format."""
