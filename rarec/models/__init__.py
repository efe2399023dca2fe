"""The method: frozen backbone, slots, alignment, readout, losses, two towers. Knows no datasets, no training loop."""
