"""Stop on a signal: the step ends, a checkpoint is written, and the same command resumes later."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""The signals that batch systems send before they take a machine away."""


class StopSignals:
    """Records that a signal has arrived.

    Attributes:
        received: whether a signal has arrived.
    """

    received = False

    @contextmanager
    def recorded(self) -> Iterator["StopSignals"]:
        """Record the signals within the context; they have no other effect."""
        before = {number: signal.signal(number, self._record) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = True
