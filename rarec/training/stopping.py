"""Being told to stop: a signal lets the step end, a checkpoint is written, and the same command goes on later."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""As batch systems send them before they take a machine away."""


class StopSignals:
    """Notes a signal when it comes.

    Attributes:
        came: whether one did.
    """

    came = False

    @contextmanager
    def noted(self) -> Iterator["StopSignals"]:
        """While it lasts, the signals are noted and do nothing else."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
