"""The processes that share a run's work: who they are, their collective operations, the watch over them."""
