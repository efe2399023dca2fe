"""The console, and progress of long loops: a bar with the time left on a terminal, sparse lines elsewhere."""

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import IO, Any, TypeVar

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from rarec.console.inert import inert
from rarec.console.last_resort import rank
from rarec.errors import in_short

T = TypeVar("T")
PATIENCE = 5.0
"""Seconds after which a loop's progress is shown."""
SPARSE = 15.0
"""Seconds between lines where there is no terminal."""
NARROWEST, WIDEST = 20, 1_000
"""Columns of a console."""


class Console(rich_console.Console):
    """A console on which data are text: no markup, no emoji codes, and control characters are escaped.

    Args:
        stderr: print to standard error, otherwise to standard output.
        width: columns; by default those of the terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
        if not NARROWEST <= self.width <= WIDEST:  # as COLUMNS may say: at width 0, rich prints nothing
            self.width = min(max(self.width, NARROWEST), WIDEST)

    @property  # type: ignore[misc]
    def file(self) -> IO[str]:
        """The stream below those that escape, or that print above a bar: rich writes controls of its own."""
        stream = super().file
        return getattr(stream, "rich_proxied_file", stream)

    def render_str(self, text: str, **keywords: Any) -> Text:
        """Return a text that is measured as it is shown."""
        return super().render_str(inert(text), **keywords)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Render anything: all that is printed passes here, and only rich's own segments are controls."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(inert(segment.text), segment.style)


console = Console(stderr=True)
"""For messages and bars: standard output is for results."""


def say(line: str) -> None:
    """Print one line to standard error, on rank 0 alone. Standard output is for results."""
    if rank() == 0:
        console.print(in_short(line), soft_wrap=True)


_bars = Progress(
    TextColumn("{task.description}", markup=False),
    BarColumn(bar_width=10),
    MofNCompleteColumn(),
    TextColumn("{task.fields[facts]}", markup=False),
    TimeRemainingColumn(compact=True),
    console=console,
    transient=True,
)
"""One display for all tasks, because a validation runs inside a training; it fits 80 columns."""


class Task:
    """The progress of one loop; on a terminal a bar, which goes when the context or `end` ends it.

    Args:
        title: for the user.
        total: steps of the loop.
        done: steps that were done before.
        patience: seconds before it is shown.
    """

    def __init__(self, title: str, total: int, done: int = 0, patience: float = PATIENCE) -> None:
        self._title, self._total, self._first, self._patience = title, total, done, patience
        self._started = self._printed = time.monotonic()
        self._bar: TaskID | None = None
        self._is_shown = rank() == 0

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def update(self, done: int, facts: str = "") -> None:
        """Show the number of steps done, with a few facts behind the bar: 34 characters fit 80 columns."""
        now = time.monotonic()
        if not self._is_shown or now - self._started < self._patience:
            return
        if console.is_terminal:
            if self._bar is None:
                self._bar = _bars.add_task(self._title, total=self._total, completed=self._first, facts="")
                _bars.start()
            _bars.update(self._bar, completed=done, facts=facts)
        elif now - self._printed > SPARSE or (done == self._total and now - self._started > SPARSE):
            self._printed = now
            left = (now - self._started) / max(1, done - self._first) * (self._total - done)
            parts = [f"{done}/{self._total}", facts, f"{timedelta(seconds=round(left))} left" if left else ""]
            console.print(f"{self._title}: {', '.join(filter(None, parts))}", soft_wrap=True)

    def end(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            _bars.remove_task(self._bar)
            self._bar = None
            if not _bars.tasks:
                _bars.stop()


def track(jobs: Sequence[T], title: str) -> Iterator[T]:
    """Yield the jobs one by one, showing how far they are."""
    with Task(title, len(jobs)) as task:
        for done, job in enumerate(jobs):
            task.update(done)
            yield job
