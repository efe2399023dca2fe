"""The thread that runs a recommender, and what waits for it: as much as can be answered in time.

Requests that wait together share a pass of the model; no two calls overlap. The queue is bounded by time:
what cannot be answered before its deadline, by the measured pace, is refused when it comes, and what has come too late
or has lost its client is not computed.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from rarec.bundle.base_recommender import BaseRecommender
from rarec.bundle.recommended import Id, Recommended, Request
from rarec.serve.refusals import BUSY, Refused

SHARE = 0.25
"""Share of the time left to a request that may be taken up before it, and again by the pass that it starts. The rest is
for what no pace foresees: later requests in its pass, and a processor that others use."""
KEPT = 0.5
"""Weight of the passes so far in the measured pace, beside the last one."""
Observe = Callable[[int, list[float], float], None]


class Answer(NamedTuple):
    """What one user gets: items, best first; how many ids of the history are unknown, and which ids of the rules."""

    items: list[Recommended]
    unknown: int
    unknown_in_rules: Sequence[Id] = ()


class Busy(Refused):
    """There is no time left for a request.

    Args:
        seconds: until what waits now is answered.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(503, "too many requests wait", BUSY, "queue", seconds)
        self.seconds = seconds


class Late(Refused):
    """A request has waited until there was no time left for it. `seconds` as in `Busy`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(503, "no answer in time", BUSY, "late", seconds)


class Closed(Exception):
    """Another bundle has taken the place of this one."""


@dataclass
class _Job:
    """What one caller waits for: answers to requests, or the result of a call that runs alone; for how many users."""

    requests: Sequence[Request]
    call: Callable[[], Any] | None
    users: int
    deadline: float
    came: float = field(default_factory=time.monotonic)
    alone: bool = False
    future: "Future[Any]" = field(default_factory=Future)


class Batcher:
    """Runs a recommender in a thread of its own. Deadlines are moments of `time.monotonic`.

    Args:
        recommender: of a bundle.
        most: users of a pass of the model.
        window: seconds that a request waits for others.
        observe: gets of each pass the number of users, the seconds that each request has waited, seconds that it took.
    """

    def __init__(self, recommender: BaseRecommender, most: int, window: float, observe: Observe | None = None) -> None:
        self._recommender, self._most, self._window, self._observe = recommender, most, window, observe
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._waiting = 0
        self._users = self._seconds = 0.0  # of the last passes, which give the pace
        self._running: float | None = None  # when the pass that runs should be over
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return the number of users who wait."""
        return self._waiting

    @property
    def backlog(self) -> float:
        """Return the seconds until what runs and waits is answered, by the measured pace."""
        running = self._running
        return self._pace * self._waiting + (max(0.0, running - time.monotonic()) if running else 0.0)

    def refusal(self, users: int, left: float) -> float:
        """Return the seconds until others are answered, if they leave too little time for a number of users; else 0."""
        backlog = self.backlog
        return backlog if not self.idle and backlog + self._pace * users > SHARE * left else 0.0

    @property
    def idle(self) -> bool:
        """Return whether nothing runs or waits."""
        return self._running is None and not self._waiting

    @property
    def alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread.is_alive()

    def answer(self, requests: Sequence[Request], deadline: float) -> "Future[list[Answer]]":
        """Return the future answers to requests, which may share a pass with those of others.

        Raises:
            Busy: they cannot be answered before the deadline.
            Closed: it serves no more.
        """
        return self._submit(_Job(requests, None, len(requests), deadline))

    def call(self, function: Callable[[], Any], deadline: float, users: int = 1) -> "Future[Any]":
        """Return the future result of a call that runs alone, for a number of users. Raises as `answer` does."""
        return self._submit(_Job((), function, users, deadline))

    def close(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def _pace(self) -> float:
        """Return the seconds that a user takes; before the first pass, as if the largest one took a second."""
        return max(1e-9, self._seconds / self._users) if self._users else 1.0 / self._most

    def _submit(self, job: _Job) -> "Future[Any]":
        with self._changed:
            if self._closed:
                raise Closed
            job.alone = self.idle
            if backlog := self.refusal(job.users, job.deadline - job.came):
                raise Busy(backlog)
            self._jobs.append(job)
            self._waiting += job.users
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._forget(job) if future.cancelled() else None)
        return job.future

    def _forget(self, job: _Job) -> None:
        """Count a job no more: its caller has cancelled it while it waited."""
        with self._changed:
            self._waiting -= job.users

    def _run(self) -> None:
        while (jobs := self._next()) is not None:
            if jobs:
                started, users = time.monotonic(), sum(job.users for job in jobs)
                _finish(jobs, self._recommender)
                seconds = time.monotonic() - started
                self._users = KEPT * self._users + users
                self._seconds = KEPT * self._seconds + seconds
                self._running = None
                if self._observe:
                    self._observe(users, [started - job.came for job in jobs], seconds)

    def _next(self) -> list[_Job] | None:
        """Return the jobs of the next pass, none if all that waited have gone or come too late; None at the end."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            end = time.monotonic() + self._window
            while not self._jobs[0].call and self._waiting < self._most and not self._closed:
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            return self._take()

    def _take(self) -> list[_Job]:
        """Take the jobs of a pass: no more users than the first one has time for."""
        jobs: list[_Job] = []
        users, most, now = 0, 0, time.monotonic()
        while self._jobs:
            job = self._jobs[0]
            if jobs and (job.call or jobs[0].call or users + job.users > most):
                break
            self._jobs.popleft()
            if not self._begin(job, now):
                continue
            if not jobs:
                most = min(self._most, int(SHARE * (job.deadline - now) / self._pace))
            jobs.append(job)
            users += job.users
        self._running = now + self._pace * users if jobs else None
        return jobs

    def _begin(self, job: _Job, now: float) -> bool:
        """Return whether a job is to be computed; one that has waited until it is too late for it ends here."""
        if not job.future.set_running_or_notify_cancel():
            return False
        self._waiting -= job.users
        late = now + (0.0 if job.alone else self._pace * job.users) > job.deadline
        if late:
            job.future.set_exception(Late(self.backlog))
        return not late


def _finish(jobs: list[_Job], recommender: BaseRecommender) -> None:
    """Set the results of jobs; where one of several fails, each is run alone, so that no caller pays for another."""
    try:
        if jobs[0].call:
            results = [jobs[0].call()]
        else:
            of_all = recommender.answer([request for job in jobs for request in job.requests])
            answers = map(Answer, of_all.items, of_all.unknown, of_all.unknown_in_rules)
            results = [list(islice(answers, job.users)) for job in jobs]
    except BaseException as error:
        if len(jobs) == 1:
            jobs[0].future.set_exception(error)
        else:
            for job in jobs:
                _finish([job], recommender)
        return
    for job, result in zip(jobs, results, strict=True):
        with suppress(Exception):  # the caller has gone
            job.future.set_result(result)
