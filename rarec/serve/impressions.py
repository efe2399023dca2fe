"""Impressions: what was shown to whom. They are written beside the answers, which never wait for them.

A file appears when it is whole: every so many seconds or lists. Until then its rows are in memory, a bounded number of
them. Where they cannot be written, as on a full disk, they are tried again each second; what has no room is lost, and
counted.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from rarec.errors import UserError
from rarec.serve.batcher import Answer
from rarec.serve.settings import ImpressionSettings
from rarec.serve.telemetry import Metrics, event
from rarec.storage.files import atomic_write, hash_user, read_key

SCHEMA = pa.schema(
    {
        "time": pa.timestamp("ms", "UTC"), "id": pa.string(), "place": pa.int32(), "bundle": pa.string(),
        "version": pa.string(), "user": pa.string(), "items": pa.list_(pa.string()),
        "scores": pa.list_(pa.float32()), "rules": pa.string(),
    }
)  # fmt: skip
"""A row for each history of a request, which `place` counts from 0."""
FILES = 2
"""Files whose rows may wait in memory."""
AGAIN = 1.0
"""Seconds until a file that could not be written is tried again."""
SAID_EVERY = 60.0
"""Seconds between two events about what is lost."""


class Impressions:
    """Writes what was shown, in a thread of its own.

    Args:
        settings: where and how.
        metrics: of the process.

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, settings: ImpressionSettings, metrics: Metrics) -> None:
        self._settings, self._count, self._folder = settings, metrics.impressions, Path(settings.path)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._key = read_key(self._folder, create=True)
        except OSError as error:
            raise UserError(f"impressions.path {self._folder}: {error.strerror}", "name a folder to write to") from None
        self._rows: deque[dict[str, Any]] = deque()
        self._files, self._lost, self._said = 0, 0, -SAID_EVERY
        self._wake, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left."""
        self._end.set()
        self._wake.set()
        self._thread.join()

    def add(self, source: dict[str, str], user: str | None, answers: Sequence[Answer], rules: dict[str, Any]) -> None:
        """Note the lists of an answer, or that there is no room for them.

        Args:
            source: `id`, `bundle` and `version` of the answer.
            user: key of the user.
            answers: one for each history.
            rules: fields of the request that are not as by default.
        """
        if len(self._rows) + len(answers) > FILES * self._settings.max_rows:
            self._lose(len(answers))
            return
        hashed = None if user is None else hash_user(self._key, user)
        shared = {**source, "time": datetime.now(UTC), "user": hashed, "rules": json.dumps(rules)}
        for place, answer in enumerate(answers):
            items, scores = [str(item.item) for item in answer.items], [item.score for item in answer.items]
            self._rows.append({**shared, "place": place, "items": items, "scores": scores})
        if len(self._rows) >= self._settings.max_rows:
            self._wake.set()

    def _run(self) -> None:
        while not self._end.is_set():
            self._wake.wait(self._settings.seconds)
            self._wake.clear()
            while not self._write() and not self._end.wait(AGAIN):
                pass
        if not self._write():
            self._lose(len(self._rows))

    def _write(self) -> bool:
        """Write the rows that wait as a file; return whether that worked."""
        rows = self._rows.copy()
        if not rows:
            return True
        self._files += 1
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{self._files}.{self._settings.format}"
        try:
            with atomic_write(self._folder / name) as file:
                _write_rows(rows, self._settings.format, file)
        except (OSError, UserError) as error:
            self._say(f"cannot be written: {error}")
            return False
        for _ in rows:
            self._rows.popleft()
        self._count.labels("written").inc(len(rows))
        return True

    def _lose(self, rows: int) -> None:
        self._count.labels("lost").inc(rows)
        self._lost += rows
        self._say("there is no room for more")

    def _say(self, why: str) -> None:
        """Write an event, once a minute."""
        if (now := time.monotonic()) >= self._said + SAID_EVERY:
            event("impressions", f"{self._folder}: {why}; {self._lost:,} lists lost so far")
            self._said = now


def _write_rows(rows: Iterable[dict[str, Any]], kind: str, file: BinaryIO) -> None:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), file)
    else:
        lines = (json.dumps({**row, "time": row["time"].isoformat()}) + "\n" for row in rows)
        file.writelines(line.encode() for line in lines)
