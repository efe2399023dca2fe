"""The method: frozen backbone, slots, alignment, readout, losses, two towers. Knows no files, ranks or loops."""
