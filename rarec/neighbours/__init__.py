"""Neighbour models: item-item tables that are counted, not trained. Knows no torch."""
