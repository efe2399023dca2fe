"""The bundles of a service: loaded by name, chosen by share, and replaced while they serve.

A thread looks at the disk once a second. Where another bundle stands at a path, it is loaded beside the old one; then
new requests get the new one, and the old one answers those that wait for it. What cannot be loaded changes nothing: its
users get another bundle, and one that the settings name no more serves until all that they name are loaded. A shadow
is asked beside those that answer, when nothing else waits, and compared with them.
"""

import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rarec.bundle.base_recommender import BaseRecommender
from rarec.bundle.recommended import Request
from rarec.errors import UserError
from rarec.serve.batcher import Answer, Batcher, Busy, Closed
from rarec.serve.refusals import BUSY, Refused
from rarec.serve.settings import ServedBundle, ServeSettings, read_tokens
from rarec.serve.telemetry import Metrics
from rarec.storage.artefacts import MANIFEST

LOOK_EVERY = 1.0
"""Seconds between two looks at the disk."""
RETRY_AFTER = 30.0
"""Seconds after which a bundle that could not be loaded is tried again."""
LOADING = 5.0
"""Seconds after which a bundle that is not loaded yet may be."""
Load = Callable[[ServeSettings, Path], tuple[BaseRecommender, str]]
Stamp = tuple[str, int, int, int]
"""Path of a manifest without links, inode, time in nanoseconds and size: another bundle has another one."""


@dataclass(frozen=True)
class Loaded:
    """A bundle that serves.

    Attributes:
        name: in the settings.
        recommender: over it.
        version: hash of its manifest.
        stamp: of its manifest when it was read.
        batcher: runs it.
        folded: titles of the catalogue, without case, to search.
    """

    name: str
    recommender: BaseRecommender
    version: str
    stamp: Stamp
    batcher: Batcher
    folded: list[str]

    def find(self, query: str, most: int) -> list[int]:
        """Return rows of items whose titles hold all words of a query."""
        words = query.casefold().split()
        rows = (row for row, title in enumerate(self.folded) if all(word in title for word in words))
        return list(islice(rows, most))

    @property
    def source(self) -> dict[str, Any]:
        """Return what an answer says of the bundle that gave it."""
        return {"bundle": self.name, "version": self.version[:12]}


class BundleManager:
    """All bundles of a service.

    Args:
        settings: reads the settings, again at each look at the disk.
        load: opens a bundle's recommender, and returns it with the bundle's version.
        metrics: of the process: they count passes of the models, and what was loaded or could not be.
    """

    def __init__(self, settings: Callable[[], ServeSettings], load: Load, metrics: Metrics) -> None:
        self._read, self._load, self._metrics = settings, load, metrics
        self._refresh_settings()
        self._complete = False
        self._loaded: Mapping[str, Loaded] = {}
        self._troubles: dict[str, str] = {}
        self._tried: dict[str, tuple[Stamp, float, Exception]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bundles", daemon=True)

    def start(self) -> None:
        """Begin to load, in the background."""
        self._thread.start()

    def load(self) -> None:
        """Load every bundle now.

        Raises:
            UserError: one cannot be loaded.
        """
        for name, bundle in self.settings.bundles.items():
            error = self._attempt(name, partial(self._refresh, name, bundle))
            if error:
                raise error
        self._complete = True

    def close(self) -> None:
        """Answer what waits, and end. A bundle that is being loaded is not waited for."""
        self._end.set()
        self._thread.join(LOOK_EVERY)
        for loaded in self._loaded.values():
            loaded.batcher.close()

    def pick(self, name: str | None, user: str) -> Loaded:
        """Return the bundle of a request: by name, or by the user's share, always the same one for a user.

        Raises:
            Refused: there is no such name, or it is not loaded yet.
        """
        loaded, bundles = self._loaded, self.settings.bundles
        if name is not None and name not in bundles:
            raise Refused(404, f"there is no bundle {name!r}", "see /v1/bundles", "not_found")
        shares = {other: bundle.share for other, bundle in bundles.items() if other in loaded}
        wanted = name if name is not None else _by_share(shares or dict.fromkeys(loaded, 1.0), user)
        if wanted not in loaded:
            missing = wanted or next(iter(bundles))
            raise Refused(503, f"bundle {missing!r} is not loaded", BUSY, "not_loaded", LOADING)
        return loaded[wanted]

    def state(self) -> dict[str, Any]:
        """Return, by name, what is loaded, and what is wrong with it or on the disk."""
        return {name: self._state(name, bundle.share) for name, bundle in self.settings.bundles.items()}

    def _state(self, name: str, share: float) -> dict[str, Any]:
        loaded = self._loaded.get(name)
        return {
            "loaded": loaded is not None and loaded.batcher.alive,
            "version": loaded.version if loaded else None,
            "row": loaded.recommender.row if loaded else None,
            "share": share,
            "trouble": self._troubles.get(name),
        }

    @property
    def ready(self) -> bool:
        """Return whether every bundle serves, or did once: one that is added later makes no service unready."""
        alive = all(loaded.batcher.alive for loaded in self._loaded.values())
        return self._complete and alive and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Return the number of users who wait."""
        return sum(loaded.batcher.waiting for loaded in self._loaded.values())

    def idle(self, name: str) -> Loaded | None:
        """Return a bundle if it is loaded and nothing runs or waits in any."""
        busy = any(not loaded.batcher.idle for loaded in self._loaded.values())
        return None if busy else self._loaded.get(name)

    @property
    def overload(self) -> float:
        """Return the seconds until what waits is answered, where no bundle can answer more in time; else 0."""
        shares = {name: bundle.share for name, bundle in self.settings.bundles.items()}
        serving = [own.batcher for name, own in self._loaded.items() if shares.get(name)]
        return min((batcher.refusal(1, self.settings.timeout) for batcher in serving), default=0.0)

    def _watch(self) -> None:
        while not self._end.is_set():
            self._attempt("settings", self._refresh_settings)
            for name, bundle in self.settings.bundles.items():
                self._attempt(name, partial(self._refresh, name, bundle))
            if set(self._loaded) >= set(self.settings.bundles):
                self._complete = True
                self._retire()
            self._end.wait(LOOK_EVERY)

    def _attempt(self, name: str, work: Callable[[], None]) -> Exception | None:
        """Do what may fail, and return how: it is noted by name, and logged once."""
        try:
            work()
        except Exception as error:
            message = f"{error.problem} -> {error.remedy}" if isinstance(error, UserError) else repr(error)
            if self._troubles.get(name) != message:
                self._troubles[name] = message
                self._metrics.bundle("refused", f"{name}: {message}")
            return error
        self._troubles.pop(name, None)
        return None

    def _refresh_settings(self) -> None:
        settings = self._read()
        self.tokens = read_tokens(Path(settings.tokens)) if settings.tokens else None
        self.settings = settings

    def _refresh(self, name: str, bundle: ServedBundle) -> None:
        """Load a bundle if another one than the one that serves is at its path.

        Raises:
            Exception: what is wrong with it; those that serve go on.
        """
        serving = self._loaded.get(name)
        stamp = stamp_of(Path(bundle.path))
        if serving and stamp == serving.stamp:
            return
        if stamp is None:
            raise UserError(f"{bundle.path} has no {MANIFEST}", "put a bundle there")
        tried, moment, error = self._tried.get(name, (None, 0.0, None))
        if error and tried == stamp and time.monotonic() - moment < RETRY_AFTER:
            raise error.with_traceback(None)
        try:
            loaded = self._open(name, bundle, stamp)
        except Exception as error:
            # a copy: the traceback of the error itself would keep what was loaded in memory
            kept = UserError(error.problem, error.remedy) if isinstance(error, UserError) else RuntimeError(repr(error))
            self._tried[name] = (stamp, time.monotonic(), kept)
            raise
        self._tried.pop(name, None)
        self._loaded = {**self._loaded, name: loaded}
        if serving:
            self._metrics.serves.labels(*serving.source.values()).set(0)
        self._metrics.serves.labels(*loaded.source.values()).set(1)
        facts = f"{loaded.recommender.row}, version {loaded.version[:12]}, from {bundle.path}"
        self._metrics.bundle("loaded", f"{name}: {facts}")
        if serving:
            serving.batcher.close()

    def _open(self, name: str, bundle: ServedBundle, stamp: Stamp) -> Loaded:
        settings = self.settings
        recommender, version = self._load(settings, Path(bundle.path))
        folded = [title.casefold() for title in recommender.catalogue.titles]
        observe = self._metrics.observer(name, version[:12])
        batcher = Batcher(recommender, settings.max_batch, settings.window_ms / 1000, observe)
        return Loaded(name, recommender, version, stamp, batcher, folded)

    def _retire(self) -> None:
        """Let go of bundles that the settings name no more."""
        for name in set(self._loaded) - set(self.settings.bundles):
            gone = self._loaded[name]
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}
            self._metrics.serves.labels(*gone.source.values()).set(0)
            gone.batcher.close()


def _by_share(shares: Mapping[str, float], user: str) -> str:
    """Return the name that a user gets; "" where there is none."""
    position = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8]) / 2**64 * sum(shares.values())
    ends = zip(shares, accumulate(shares.values()), strict=True)
    return next((name for name, end in ends if position < end), next(iter(shares), ""))


def stamp_of(bundle: Path) -> Stamp | None:
    """Return what tells one bundle at a path from another; None if there is none."""
    try:
        manifest = (bundle / MANIFEST).resolve(strict=True)
        status = manifest.stat()
    except (OSError, RuntimeError):
        return None
    return str(manifest), status.st_ino, status.st_mtime_ns, status.st_size


class Shadow:
    """Asks the shadow for a share of what is asked.

    Args:
        manager: the bundles.
        metrics: of the process: what was asked, and how much of the lists is the same.
    """

    def __init__(self, manager: BundleManager, metrics: Metrics) -> None:
        self._manager, self._metrics = manager, metrics

    def ask(self, answered: Loaded, requests: Sequence[Request], answers: Sequence[Answer]) -> None:
        """Compare answers that were given with those of the shadow: later, if at all."""
        settings = self._manager.settings
        shadow = settings.shadow
        if shadow is None or answered.name == shadow.bundle or random.random() >= shadow.share:
            return
        loaded = self._manager.idle(shadow.bundle)
        try:
            if loaded is None:
                raise Closed
            future = loaded.batcher.answer(requests, time.monotonic() + settings.timeout)
        except (Busy, Closed):
            self._metrics.shadow.labels("dropped").inc()
            return
        future.add_done_callback(partial(self._compare, loaded, answers))

    def _compare(self, loaded: Loaded, answers: Sequence[Answer], future: "Future[list[Answer]]") -> None:
        if future.cancelled() or future.exception():
            self._metrics.shadow.labels("failed").inc()
            return
        self._metrics.shadow.labels("asked").inc()
        overlap = self._metrics.overlap.labels(*loaded.source.values())
        for given, other in zip(answers, future.result(), strict=True):
            overlap.observe(overlap_of(given, other))


def overlap_of(one: Answer, other: Answer) -> float:
    """Return the share of items that two lists have in common, of the longer one; 1 for two empty ones."""
    items = [{item.item for item in answer.items} for answer in (one, other)]
    longest = max(map(len, items))
    return len(items[0] & items[1]) / longest if longest else 1.0
