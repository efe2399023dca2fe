"""Ranks that look after one another: where one dies or fails, all end and say which; one that stands still is named.

A rank that waits in a collective learns nothing of the others. So a thread on every rank writes beats into a store that
the first rank hosts, apart from the process group, and reads there: the first rank the beats of all, the others that of
the first. Who finds a rank dead or failed writes the verdict and says it; the others read it and end in silence.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # as `torch.distributed` has it, but with its type

from rarec.errors import EXIT_CODE, Stopped, UserError
from rarec.ranks import Ranks

EVERY = 2.0  # seconds between beats
KEPT = 10.0  # seconds for which the first rank, when it leaves, keeps the store for others at most
NAMED = 4  # ranks that a message names
_VERDICT = "verdict"
_EXCHANGES = (str(Path(dist.__file__).parent), Ranks.most.__code__.co_filename)  # here ranks wait for one another


class Beat(NamedTuple):
    """What a rank tells of itself."""

    number: int  # that it grows shows life; clocks of two machines are never compared
    place: list[int]  # how often steps began anew, the step, calls of `at` in it: who has the least is behind
    doing: str
    seconds: float  # in that place
    waits: bool  # for other ranks, in a collective
    ended: str | None  # None under way, "" when it left in good order, else what was wrong
    host: str


class Watch:
    """One rank's watch over the others; see `over`."""

    def __init__(self, ranks: Ranks, say: Callable[[str], None], stall: float, dead: float) -> None:
        self._ranks, self._say, self._stall, self._dead = ranks, say, stall, dead
        self._ended: str | None = None
        self._patience, self._every, self._main = 0.0, min(EVERY, dead / 10), threading.get_ident()
        self._wake, self._finished, self._condemned = threading.Event(), threading.Event(), False
        self._number, self._clock, self._looked, self._left = 0, 0.0, time.monotonic(), 0.0
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._told: list[int] = []

    @classmethod
    @contextmanager
    def over(
        cls, ranks: Ranks, say: Callable[[str], None], *, stall: float = 120.0, dead: float = 30.0
    ) -> Iterator[None]:
        """Watch over the ranks while it lasts; all enter together. One rank alone is not watched.

        An error that the first rank has met as well becomes `shared`: it alone is to tell.

        Args:
            ranks: all of them.
            say: tells the user one line, whatever rank calls it.
            stall: seconds without progress after which the first rank says for whom the others wait.
            dead: seconds without a sign of life after which a rank is dead.
        """
        if ranks.count == 1:
            yield
            return
        watch, failed = cls(ranks, say, stall, dead), None
        watch._start()
        try:
            yield
        except BaseException as error:
            failed = error
            watch._fail(error)
            raise
        finally:
            watch._leave()
            if isinstance(failed, UserError) and not ranks.first and watch._beats[0].ended == watch._ended:
                failed.shared = True

    def _start(self) -> None:
        self._store = _open_store(self._ranks)
        if self._ranks.first:
            self._store.set(_VERDICT, "")
        self._store.set(str(self._ranks.index), json.dumps(self._beat()))
        self._ranks.wait()  # to read a key that is not yet there would take long
        self._round()
        for work in (self._run, self._mind):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Stopped) or getattr(error, "shared", False):  # all ranks leave so
            return
        text = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text or isinstance(error, dist.DistError)):
            self._patience = self._dead + 5 * self._every  # first it must be seen whether another rank has died
        place = self._ranks.place
        place.now = (*place.now[:2], time.monotonic())
        self._ended = text

    def _leave(self) -> None:
        """Return when the others know what they must; or never, where this process is to end."""
        self._ended = self._ended or ""
        self._wake.set()
        self._finished.wait()

    def _run(self) -> None:
        try:
            while self._round():
                self._wake.wait(self._every / 10 if self._left else self._every)
                self._wake.clear()
        except RuntimeError:  # PyTorch's, of whatever befalls the store
            self._lose()
        if self._condemned:
            os._exit(EXIT_CODE)  # the main thread may be where no exception reaches it
        self._finished.set()

    def _mind(self) -> None:
        """Where the first rank's machine is gone, calls of the store never return, so another thread counts them."""
        seen, missed = -1, 0
        while not self._finished.wait(self._dead / 3):
            seen, missed = self._number, missed + 1 if seen == self._number else 0
            if missed == 3:
                self._lose()

    def _lose(self) -> None:
        """The store is gone: the first rank has died, unless it or this one has left."""
        try:
            if self._beat().ended is None and self._beats[0].ended is None:
                self._condemned = True
                self._say(f"no answer any more from {self._named([0])}")
        finally:
            if self._condemned:
                os._exit(EXIT_CODE)
            self._finished.set()

    def _round(self) -> bool:
        """Tell and hear; whether to go on."""
        self._number += 1
        own, ranks = self._beat(), self._ranks
        self._store.set(str(ranks.index), json.dumps(own))
        heard = range(ranks.count if ranks.first else 1)
        verdict, *texts = self._store.multi_get([_VERDICT, *map(str, heard)])
        self._hear([Beat(*json.loads(text)) for text in texts])
        if own.ended is None:
            self._heed(verdict.decode())
            return True
        return self._kept() if ranks.first else not verdict and self._may_be_shared()

    def _beat(self) -> Beat:
        ended, (place, doing, since) = (
            self._ended,
            self._ranks.place.now,
        )  # in this order: `_fail` writes them in the other
        seconds, frame = time.monotonic() - since, sys._current_frames().get(self._main)
        waits = ended is not None or (frame is not None and frame.f_code.co_filename.startswith(_EXCHANGES))
        told = "" if self._condemned else ended if seconds >= self._patience else None
        return Beat(self._number, list(place), doing, seconds, waits, told, socket.gethostname())

    def _hear(self, beats: Sequence[Beat]) -> None:
        """Silence is measured on a clock of our own, which stands while a batch system suspends the job."""
        now = time.monotonic()
        self._clock += min(now - self._looked, 2 * self._every)
        self._looked = now
        for rank, beat in enumerate(beats):
            if rank not in self._beats or self._beats[rank].number != beat.number:
                self._heard[rank] = self._clock
            self._beats[rank] = beat

    def _heed(self, verdict: str) -> None:
        """End where there is a verdict, or where there must be one."""
        found = "" if verdict else self._judged()
        if found:
            own = json.dumps([self._ranks.index, found])
            verdict = self._store.compare_set(_VERDICT, "", own).decode()
            if verdict == own:
                self._say(found)
        if verdict:
            self._condemned = True
            self._wake.set()
        elif self._ranks.first:
            self._report_stall()

    def _judged(self) -> str:
        for rank, beat in self._beats.items():
            if beat.ended:
                return f"rank {rank} stopped at step {beat.place[1]}: {beat.ended}"
        if self._silent(self._dead):  # with it, those of the same machine
            return f"no sign of life for {self._dead:.0f} s from {self._named(self._silent(self._dead / 2))}"
        return ""

    def _silent(self, seconds: float) -> list[int]:
        under_way = [rank for rank, beat in self._beats.items() if beat.ended is None]
        return [rank for rank in under_way if self._clock - self._heard[rank] > seconds]

    def _report_stall(self) -> None:
        """The least in progress; among those, the ones that do not wait themselves."""
        under_way = {rank: beat for rank, beat in self._beats.items() if beat.ended is None}
        place, waits = min((beat.place, beat.waits) for beat in under_way.values())
        behind = [rank for rank, beat in under_way.items() if (beat.place, beat.waits) == (place, waits)]
        seconds = min(under_way[rank].seconds for rank in behind)
        if seconds >= self._stall and place != self._told:
            self._told = place
            others = "all ranks wait" if len(behind) == len(under_way) else "the others wait for"
            self._say(f"no progress for {seconds:.0f} s: {others} {self._named(behind)}")

    def _kept(self) -> bool:
        """Whether the store is still needed by others."""
        self._left = self._left or self._clock
        silent = self._silent(self._dead / 2)
        needed = any(beat.ended is None and rank not in silent for rank, beat in self._beats.items())
        since = self._clock - self._left
        return since < (KEPT if needed else self._every if self._ended else 0.0)

    def _may_be_shared(self) -> bool:
        """Whether the first rank may yet fail in the same way, a moment later."""
        self._left = self._left or self._clock
        return bool(self._ended) and self._beats[0].ended is None and self._clock - self._left < self._every

    def _named(self, ranks: Sequence[int]) -> str:
        beats = [(rank, self._beats[rank]) for rank in ranks[:NAMED]]
        each = [f"rank {rank} on {beat.host} (last at step {beat.place[1]}: {beat.doing})" for rank, beat in beats]
        return ", ".join(each) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")


def _open_store(ranks: Ranks) -> TCPStore:
    """The first rank's, on a port that is free."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    timeout = timedelta(seconds=30)

    def opened(port: int) -> TCPStore:
        return TCPStore(host, port, is_master=ranks.first, wait_for_workers=False, timeout=timeout)

    hosted = ranks.together(lambda: opened(0) if ranks.first else None)
    port = ranks.most(hosted.port if hosted else 0)
    return ranks.together(lambda: hosted or opened(port))
