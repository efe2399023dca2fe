"""Requests that wait together share a pass of the model. One thread runs the model; no two calls of it overlap."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rarec.bundle.recommended import Request
from rarec.serve.engines import Answer, Engine

RETRY_AFTER = 1
"""Seconds after which a rejected client may retry: the queue is short, and empty long before."""


class Busy(Exception):
    """As many users wait as may wait."""


class Closed(Exception):
    """Another bundle has taken the place of this one."""


@dataclass
class _Job:
    """What one caller waits for: answers to requests, or the result of a call that runs alone."""

    requests: Sequence[Request]
    call: Callable[[], Any] | None = None
    callers: int = 1
    future: "Future[Any]" = field(default_factory=Future)

    @property
    def users(self) -> int:
        return len(self.requests) or self.callers


class Batcher:
    """Runs an engine in a thread of its own.

    Args:
        engine: of a bundle.
        most: users of a pass of the model.
        window: seconds that a request waits for others.
        limit: users who may wait.
        observe: is told the number of users of each pass.
    """

    def __init__(
        self, engine: Engine, most: int, window: float, limit: int, observe: Callable[[int], None] = lambda users: None
    ) -> None:
        self.engine, self._most, self._window, self._limit, self._observe = engine, most, window, limit, observe
        self._jobs: deque[_Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of users who wait."""
        return sum(job.users for job in list(self._jobs) if not job.future.cancelled())

    @property
    def alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread.is_alive()

    def answer(self, requests: Sequence[Request]) -> "Future[list[Answer]]":
        """Return the future answers to requests, which may share a pass with those of others.

        Raises:
            Busy: too many wait.
            Closed: it serves no more.
        """
        return self._submit(_Job(requests))

    def call(self, function: Callable[[], Any], users: int = 1) -> "Future[Any]":
        """Return the future result of a call of the engine for a number of users.

        Raises:
            Busy: too many wait.
            Closed: it serves no more.
        """
        return self._submit(_Job((), function, users))

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _submit(self, job: _Job) -> "Future[Any]":
        with self._changed:
            if self._closed:
                raise Closed
            waiting = self.waiting
            if waiting and waiting + job.users > self._limit:
                raise Busy
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def _run(self) -> None:
        while (jobs := self._next()) is not None:
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                _finish(jobs, self.engine)
                self._observe(sum(job.users for job in jobs))

    def _next(self) -> list[_Job] | None:
        """Return the jobs of the next pass; None at the end."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            if self._jobs[0].call:
                return [self._jobs.popleft()]
            end = time.monotonic() + self._window
            while self.waiting < self._most and (left := end - time.monotonic()) > 0 and not self._closed:
                self._changed.wait(left)
            jobs = [self._jobs.popleft()]
            users = jobs[0].users
            while self._jobs and not self._jobs[0].call and users + self._jobs[0].users <= self._most:
                users += self._jobs[0].users
                jobs.append(self._jobs.popleft())
            return jobs


def _finish(jobs: list[_Job], engine: Engine) -> None:
    """Set the results of jobs; where one of several fails, each is run alone, so that no caller pays for another."""
    try:
        if jobs[0].call:
            results = [jobs[0].call()]
        else:
            answers = engine.answer([request for job in jobs for request in job.requests])
            ends = [sum(len(job.requests) for job in jobs[: last + 1]) for last in range(len(jobs))]
            results = [answers[end - len(job.requests) : end] for job, end in zip(jobs, ends, strict=True)]
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
        else:
            for job in jobs:
                _finish([job], engine)
        return
    for job, result in zip(jobs, results, strict=True):
        with suppress(Exception):  # the caller has gone
            job.future.set_result(result)
