"""World that look after one another: where one dies or fails, all end and say which; one that stands still is named.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # as `torch.distributed` has it, but with its type

from rarec.errors import EXIT_CODE, Stopped, UserError
from rarec.training.beats import Beat, Beats
from rarec.world import World

EVERY = 2.0  # seconds between beats
KEPT = 10.0  # seconds for which the first rank, when it leaves, keeps the store for others at most
_VERDICT = "verdict"
_EXCHANGES = (
    str(Path(dist.__file__).parent),
    World.all_reduce_max.__code__.co_filename,
)  # here ranks wait for one another


class Watch:
    """One rank's watch over the others; see `over`."""

    def __init__(self, world: World, say: Callable[[str], None], stall: float, dead: float) -> None:
        self._world, self._say, self._dead = world, say, dead
        self._ended: str | None = None
        self._patience, self._every, self._main = 0.0, min(EVERY, dead / 10), threading.get_ident()
        self._wake, self._finished, self._condemned = threading.Event(), threading.Event(), False
        self._number, self._left = 0, 0.0
        self._beats = Beats(self._every, stall, dead)

    @classmethod
    @contextmanager
    def over(
        cls, world: World, say: Callable[[str], None], *, stall: float = 120.0, dead: float = 30.0
    ) -> Iterator[None]:
        """Watch over the ranks while it lasts; all enter together. One rank alone is not watched.

        An error that the first rank has met as well becomes `shared`: it alone is to tell.

        Args:
            world: all of them.
            say: tells the user one line, whatever rank calls it.
            stall: seconds without progress after which the first rank says for whom the others wait.
            dead: seconds without a sign of life after which a rank is dead.
        """
        if world.size == 1:
            yield
            return
        watch, failed = cls(world, say, stall, dead), None
        watch._start()
        try:
            yield
        except BaseException as error:
            failed = error
            watch._fail(error)
            raise
        finally:
            watch._leave()
            if isinstance(failed, UserError) and not world.is_main and watch._beats.last[0].ended == watch._ended:
                failed.shared = True

    def _start(self) -> None:
        self._store = _open_store(self._world)
        if self._world.is_main:
            self._store.set(_VERDICT, "")
        self._store.set(str(self._world.rank), json.dumps(self._beat()))
        self._world.barrier()  # to read a key that is not yet there would take long
        self._round()
        for work in (self._run, self._mind):
            threading.Thread(target=work, name="watch", daemon=True).start()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, Stopped) or getattr(error, "shared", False):  # all ranks leave so
            return
        text = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text or isinstance(error, dist.DistError)):
            self._patience = self._dead + 5 * self._every  # first it must be seen whether another rank has died
        place = self._world.place
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
            if self._beat().ended is None and self._beats.last[0].ended is None:
                self._condemned = True
                self._say(f"no answer any more from {self._beats.named([0])}")
        finally:
            if self._condemned:
                os._exit(EXIT_CODE)
            self._finished.set()

    def _round(self) -> bool:
        """Tell and hear; whether to go on."""
        self._number += 1
        own, world = self._beat(), self._world
        self._store.set(str(world.rank), json.dumps(own))
        heard = range(world.size if world.is_main else 1)
        verdict, *texts = self._store.multi_get([_VERDICT, *map(str, heard)])
        self._beats.hear([Beat(*json.loads(text)) for text in texts])
        if own.ended is None:
            self._heed(verdict.decode())
            return True
        return self._kept() if world.is_main else not verdict and self._may_be_shared()

    def _beat(self) -> Beat:
        ended = self._ended  # before the place: `_fail` writes them in the other order
        place, doing, since = self._world.place.now
        seconds, frame = time.monotonic() - since, sys._current_frames().get(self._main)
        waits = ended is not None or (frame is not None and frame.f_code.co_filename.startswith(_EXCHANGES))
        told = "" if self._condemned else ended if seconds >= self._patience else None
        return Beat(self._number, list(place), doing, seconds, waits, told, socket.gethostname())

    def _heed(self, verdict: str) -> None:
        """End where there is a verdict, or where there must be one."""
        found = "" if verdict else self._beats.verdict()
        if found:
            own = json.dumps([self._world.rank, found])
            verdict = self._store.compare_set(_VERDICT, "", own).decode()
            if verdict == own:
                self._say(found)
        if verdict:
            self._condemned = True
            self._wake.set()
        elif self._world.is_main and (stall := self._beats.stall()):
            self._say(stall)

    def _kept(self) -> bool:
        """Whether the store is still needed by others."""
        self._left = self._left or self._beats.clock
        since = self._beats.clock - self._left
        return since < (KEPT if self._beats.needed() else self._every if self._ended else 0.0)

    def _may_be_shared(self) -> bool:
        """Whether the first rank may yet fail in the same way, a moment later."""
        self._left = self._left or self._beats.clock
        return bool(self._ended) and self._beats.last[0].ended is None and self._beats.clock - self._left < self._every


def _open_store(world: World) -> TCPStore:
    """The first rank's, on a port that is free."""
    host = os.environ.get("MASTER_ADDR", "localhost")
    timeout = timedelta(seconds=30)

    def opened(port: int) -> TCPStore:
        return TCPStore(host, port, is_master=world.is_main, wait_for_workers=False, timeout=timeout)

    hosted = world.run_on_all(lambda: opened(0) if world.is_main else None)
    port = world.all_reduce_max(hosted.port if hosted else 0)
    return world.run_on_all(lambda: hosted or opened(port))
