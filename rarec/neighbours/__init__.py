"""Neighbour models: item-item tables that are counted, not trained, and ranking by them."""
