"""The processes that share a run's work: their numbers, collective operations and watchdog, and the hardware they run on."""
