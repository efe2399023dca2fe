"""Training: engines, data loading, the step loop, checkpoints and the watchdog; no dataset formats."""
