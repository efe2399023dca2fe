"""Watch the ranks: if one dies or fails, all end and name it; if one makes no progress, it is named.

A rank that waits in a collective learns nothing about the others. So a thread on every rank writes heartbeats into a
store that rank 0 hosts, apart from the process group, and reads there: rank 0 the heartbeats of all ranks, the others
that of rank 0. The rank that finds another one dead or failed writes the verdict and prints it; the others read the
verdict and end without a message.
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
from torch._C._distributed_c10d import TCPStore  # `torch.distributed` exports it without its type

from rarec.console.last_resort import print_from_any_rank
from rarec.distributed.world import World
from rarec.errors import EXIT_CODE, Stopped, UserError

INTERVAL = 2.0
"""Seconds between two heartbeats."""
LINGER = 10.0
"""Seconds for which rank 0, when it leaves, keeps the store open for other ranks, at most."""
_NAMED = 4
"""Ranks that a message names."""
_VERDICT = "verdict"
_COLLECTIVES = (str(Path(dist.__file__).parent), World.all_reduce_max.__code__.co_filename)
"""Source files in which a rank waits for others."""


class Heartbeat(NamedTuple):
    """The state that a rank reports.

    Attributes:
        number: grows with every heartbeat, which shows that the rank is alive; clocks are never compared.
        place: restarts, step, calls of `World.report` in the step: the rank with the smallest is behind.
        doing: what it is doing.
        seconds: for how long it has done that.
        waits: whether it waits for other ranks, in a collective.
        ended: None while it runs, "" if it left in good order, else its error.
        host: name of its machine.
    """

    number: int
    place: list[int]
    doing: str
    seconds: float
    waits: bool
    ended: str | None
    host: str


class Heartbeats:
    """The last heartbeat of each rank that is followed.

    Args:
        interval: seconds between two heartbeats of a rank.
        stall: seconds without progress after which a message is due.
        dead: seconds without a heartbeat after which a rank is dead.

    Attributes:
        last: last heartbeat by rank.
        clock: seconds of following; the clock stops while a batch system suspends the job.
    """

    def __init__(self, interval: float, stall: float, dead: float) -> None:
        self._interval, self._stall, self._dead = interval, stall, dead
        self.last: dict[int, Heartbeat] = {}
        self.clock, self._updated = 0.0, time.monotonic()
        self._alive_at: dict[int, float] = {}
        self._reported: list[int] = []

    def update(self, heartbeats: Sequence[Heartbeat]) -> None:
        """Take in the present heartbeats of rank 0 and the ranks after it."""
        now = time.monotonic()
        self.clock += min(now - self._updated, 2 * self._interval)
        self._updated = now
        for rank, heartbeat in enumerate(heartbeats):
            if rank not in self.last or self.last[rank].number != heartbeat.number:
                self._alive_at[rank] = self.clock
            self.last[rank] = heartbeat

    def verdict(self) -> str:
        """Return why all ranks must end; empty if they need not."""
        for rank, heartbeat in self.last.items():
            if heartbeat.ended:
                return f"rank {rank} stopped at step {heartbeat.place[1]}: {heartbeat.ended}"
        if self._silent(self._dead):  # name other ranks of the same machine as well
            return f"no sign of life for {self._dead:.0f} s from {self.describe(self._silent(self._dead / 2))}"
        return ""

    def stall(self) -> str:
        """Return which ranks the others wait for, once for each place; empty if all make progress.

        These are the ranks that are least advanced and, among them, those that do not wait for others themselves.
        """
        running = {rank: heartbeat for rank, heartbeat in self.last.items() if heartbeat.ended is None}
        place, waits = min((heartbeat.place, heartbeat.waits) for heartbeat in running.values())
        behind = [rank for rank, heartbeat in running.items() if (heartbeat.place, heartbeat.waits) == (place, waits)]
        seconds = min(running[rank].seconds for rank in behind)
        if seconds < self._stall or place == self._reported:
            return ""
        self._reported = place
        others = "all ranks wait:" if len(behind) == len(running) else "the others wait for"
        return f"no progress for {seconds:.0f} s: {others} {self.describe(behind)}"

    def any_running(self) -> bool:
        """Return whether a rank still runs, and has not been silent for long."""
        silent = self._silent(self._dead / 2)
        return any(heartbeat.ended is None and rank not in silent for rank, heartbeat in self.last.items())

    def describe(self, ranks: Sequence[int]) -> str:
        """Return the number, machine, step and activity of these ranks, as text."""
        lasts = [(rank, self.last[rank]) for rank in ranks[:_NAMED]]
        each = [f"rank {rank} on {last.host} (last at step {last.place[1]}: {last.doing})" for rank, last in lasts]
        return ", ".join(each) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")

    def _silent(self, seconds: float) -> list[int]:
        running = [rank for rank, heartbeat in self.last.items() if heartbeat.ended is None]
        return [rank for rank in running if self.clock - self._alive_at[rank] > seconds]


@contextmanager
def watched(
    world: World, say: Callable[[str], None] = print_from_any_rank, *, stall: float = 120.0, dead: float = 30.0
) -> Iterator[None]:
    """Watch the ranks within the context, which all enter together. A single process is not watched.

    An error that rank 0 has met as well becomes `shared`: rank 0 alone prints it.

    Args:
        world: all ranks.
        say: prints one line to the user, on any rank.
        stall: seconds without progress after which rank 0 prints which ranks the others wait for.
        dead: seconds without a heartbeat after which a rank is dead.
    """
    if world.size == 1:
        yield
        return
    watchdog = Watchdog(world, say, stall, dead)
    error = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        watchdog.leave(error)


class Watchdog:
    """Watches the other ranks from one rank, by two threads; see `watched`."""

    def __init__(self, world: World, say: Callable[[str], None], stall: float, dead: float) -> None:
        self._world, self._say, self._dead = world, say, dead
        self._interval = min(INTERVAL, dead / 10)
        self._heartbeats = Heartbeats(self._interval, stall, dead)
        self._store = _open_store(world)
        self._main_thread = threading.get_ident()
        self._wake, self._finished = threading.Event(), threading.Event()
        self._number = 0
        self._ended: str | None = None
        self._patience = self._left_at = 0.0
        self._condemned = False
        if world.is_main:
            self._store.set(_VERDICT, "")
        self._store.set(str(world.rank), json.dumps(self._heartbeat()))
        world.barrier()  # reading a key that does not exist yet blocks for long
        self._exchange()
        for work in (self._run, self._watch_store):
            threading.Thread(target=work, name="watchdog", daemon=True).start()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Stopped) or getattr(error, "shared", False):  # all ranks leave this way
            return
        text = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text or isinstance(error, dist.DistError)):
            self._patience = self._dead + 5 * self._interval  # wait: the cause may be that another rank has died
        place = self._world.place
        place.now = (*place.now[:2], time.monotonic())
        self._ended = text

    def leave(self, error: BaseException | None) -> None:
        """Return when the other ranks have read what they need; never, if this process must end."""
        if error is not None:
            self._fail(error)
        self._ended = self._ended or ""
        self._wake.set()
        self._finished.wait()
        if isinstance(error, UserError) and not self._world.is_main:
            error.shared |= self._heartbeats.last[0].ended == self._ended

    def _run(self) -> None:
        try:
            while self._exchange():
                self._wake.wait(self._interval / 10 if self._left_at else self._interval)
                self._wake.clear()
        except Exception:  # of the store, or of this machine: a rank that is not watched must not wait for others
            self._lose_store()
        if self._condemned:
            os._exit(EXIT_CODE)  # the main thread may be in a call that no exception can interrupt
        self._finished.set()

    def _watch_store(self) -> None:
        """Notice calls of the store that do not return, as when the machine of rank 0 is gone."""
        seen, missed = -1, 0
        while not self._finished.wait(self._dead / 3):
            seen, missed = self._number, missed + 1 if seen == self._number else 0
            if missed == 3:
                self._lose_store()

    def _lose_store(self) -> None:
        """End, because rank 0 has died; unless it or this rank has left."""
        try:
            if self._heartbeat().ended is None and self._heartbeats.last[0].ended is None:
                self._condemned = True
                self._say(f"no answer any more from {self._heartbeats.describe([0])}")
        finally:
            if self._condemned:
                os._exit(EXIT_CODE)
            self._finished.set()

    def _exchange(self) -> bool:
        """Write this rank's heartbeat and read the others'; return whether to continue."""
        self._number += 1
        own, world = self._heartbeat(), self._world
        self._store.set(str(world.rank), json.dumps(own))
        followed = range(world.size if world.is_main else 1)
        verdict, *texts = self._store.multi_get([_VERDICT, *map(str, followed)])
        self._heartbeats.update([Heartbeat(*json.loads(text)) for text in texts])
        if own.ended is None:
            self._judge(verdict.decode())
            return True
        return self._is_needed(verdict.decode())

    def _heartbeat(self) -> Heartbeat:
        ended = self._ended  # read before the place: `_fail` writes them in the other order
        place, doing, since = self._world.place.now
        seconds, frame = time.monotonic() - since, sys._current_frames().get(self._main_thread)
        waits = ended is not None or (frame is not None and frame.f_code.co_filename.startswith(_COLLECTIVES))
        reported = "" if self._condemned else ended if seconds >= self._patience else None
        return Heartbeat(self._number, list(place), doing, seconds, waits, reported, socket.gethostname())

    def _judge(self, verdict: str) -> None:
        """End if there is a verdict, or if this rank finds a reason for one."""
        own = "" if verdict else self._heartbeats.verdict()
        if own:
            signed = json.dumps([self._world.rank, own])
            verdict = self._store.compare_set(_VERDICT, "", signed).decode()
            if verdict == signed:  # no other rank was faster
                self._say(own)
        if verdict:
            self._condemned = True
            self._wake.set()
        elif self._world.is_main and (stall := self._heartbeats.stall()):
            self._say(stall)

    def _is_needed(self, verdict: str) -> bool:
        """Return whether to continue after leaving.

        Rank 0 keeps the store open for the others. They wait a moment, because rank 0 may meet the same error.
        """
        self._left_at = self._left_at or self._heartbeats.clock
        moment = self._interval if self._ended else 0.0
        if self._world.is_main:
            patience = LINGER if self._heartbeats.any_running() else moment
        else:
            patience = moment if not verdict and self._heartbeats.last[0].ended is None else 0.0
        return self._heartbeats.clock - self._left_at < patience


def _open_store(world: World) -> TCPStore:
    """Open the store that rank 0 hosts, on a free port."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    timeout = timedelta(seconds=30)

    def opened(port: int) -> TCPStore:
        return TCPStore(host, port, is_master=world.is_main, wait_for_workers=False, timeout=timeout)

    hosted = world.run_on_all(lambda: opened(0) if world.is_main else None)
    port = world.all_reduce_max(hosted.port if hosted else 0)
    return world.run_on_all(lambda: hosted or opened(port))
