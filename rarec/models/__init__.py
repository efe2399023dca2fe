"""The method: frozen language model, slots, alignment, readout, losses, two towers; no datasets, no training loop."""
