"""Training: batches, the step loop, engines, optimizer, checkpoints and figures; no dataset formats."""
