"""What a run tells while it trains: a line of JSON a step, Accelerate's trackers, and a progress bar or plain lines."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from rarec.files import write_text


class TrainingLog:
    """Records of one variant, kept by the first rank.

    Args:
        path: `log.jsonl`; records after the resumed step are dropped, for they will come again.
        accelerator: has the trackers; None on other ranks, which keep none.
        steps: how many there will be.
        done: how many there were before.
        title: for the progress bar.
        say: told the progress in plain lines where there is no terminal.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator | None,
        steps: int,
        done: int,
        title: str,
        say: Callable[[str], None],
    ) -> None:
        self._accelerator, self._steps, self._say, self._title = accelerator, steps, say, title
        if accelerator is None:
            return
        kept = [line for line in _lines(path) if line["step"] <= done]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._told = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, disable=not sys.stderr.isatty())
        self._task: TaskID = self._bar.add_task(title, total=steps, completed=done, facts="")
        self._bar.start()

    def record(self, step: int, **values: Any) -> None:
        """One line, and the same figures to the trackers."""
        if self._accelerator is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        figures = {k: v for k, v in values.items() if isinstance(v, int | float)}
        figures |= values.get("validation", {})
        self._accelerator.log(figures, step=step)

    def step(self, step: int, **figures: float) -> None:
        """A record, and the bar moved; without a terminal, a line every 15 seconds and at the end."""
        self.record(step, **figures)
        if self._accelerator is None:
            return
        facts = self._facts(step, figures)
        self._bar.update(self._task, completed=step, facts=facts)
        if self._bar.disable and (time.monotonic() - self._told > 15 or step == self._steps):
            self._told = time.monotonic()
            self._say(f"{self._title}: {facts}")

    def close(self) -> None:
        """Stop the bar and close the file."""
        if self._accelerator is not None:
            self._bar.stop()
            self._file.close()

    def _facts(self, step: int, figures: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._steps} loss {figures['loss']:.4f}", f"{figures['tokens_per_s']:,.0f} tokens/s"]
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.0%}")
        parts += [f"waiting for data {figures['data_wait']:.0%}", f"{figures['memory'] / 1e9:.1f} GB"]
        return ", ".join(parts)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines there are; a line torn by a kill is no line."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
