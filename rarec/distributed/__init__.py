"""The processes that share a run's work: ranks, collective operations, the watchdog, and the hardware below them."""
