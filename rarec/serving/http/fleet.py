"""The bundles of a service: loaded by name, chosen by share, and replaced while they serve.

A thread looks at the disk once a second. Where another bundle stands at a path, it is loaded beside the old one; then
new requests get the new one, and the old one answers those that wait for it. What cannot be loaded changes nothing.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarec.artefacts import MANIFEST
from rarec.errors import UserError
from rarec.serving.http.batcher import Batcher
from rarec.serving.http.engine import Engine
from rarec.serving.http.settings import ServedBundle, ServeSettings

LOOK_EVERY = 1.0
"""Seconds between two looks at the disk."""
RETRY_AFTER = 30.0
"""Seconds after which a bundle that could not be loaded is tried again."""
Stamp = tuple[str, int, int, int]
"""Path of a manifest without links, inode, time in nanoseconds and size: another bundle has another one."""


class Unavailable(Exception):
    """No bundle is loaded yet."""


class Unknown(Exception):
    """There is no bundle of this name."""


@dataclass(frozen=True)
class Loaded:
    """A bundle that serves.

    Attributes:
        name: in the settings.
        stamp: of its manifest when it was read.
        batcher: runs it.
        folded: titles of the catalogue, without case, to search.
    """

    name: str
    stamp: Stamp
    batcher: Batcher
    folded: list[str]

    @property
    def engine(self) -> Engine:
        """Return the engine that answers."""
        return self.batcher.engine


class Fleet:
    """All bundles of a service.

    Args:
        settings: reads the settings, again at each look at the disk.
        load: opens a bundle's engine.
        observe: is told the users of each pass of a model.
        event: is told, in one line, what was loaded, and what could not be.
    """

    def __init__(
        self,
        settings: Callable[[], ServeSettings],
        load: Callable[[ServeSettings, Path], Engine],
        observe: Callable[[int], None],
        event: Callable[[str, str], None],
    ) -> None:
        self._read, self._load, self._observe, self._event = settings, load, observe, event
        self.settings = settings()
        self._loaded: Mapping[str, Loaded] = {}
        self._troubles: dict[str, str] = {}
        self._tried: dict[str, tuple[Stamp | None, float]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fleet", daemon=True)

    def start(self) -> None:
        """Begin to load, in the background."""
        self._thread.start()

    def load(self) -> None:
        """Load every bundle now.

        Raises:
            UserError: one cannot be loaded.
        """
        for name, bundle in self.settings.bundles.items():
            error = self._refresh(name, bundle)
            if error is not None:
                raise error

    def close(self) -> None:
        """Answer what waits, and end."""
        self._end.set()
        self._thread.join()
        for one in self._loaded.values():
            one.batcher.close()

    def pick(self, name: str | None, user: str) -> Loaded:
        """Return the bundle of a request: by name, or by the user's share, always the same one for a user.

        Raises:
            Unknown: there is no such name.
            Unavailable: it is not loaded yet.
        """
        loaded = self._loaded
        if name is not None and name not in self.settings.bundles:
            raise Unknown(name)
        wanted = name if name is not None else self._by_share(user)
        if wanted not in loaded:
            raise Unavailable(wanted)
        return loaded[wanted]

    def state(self) -> dict[str, Any]:
        """Return, by name, what is loaded, and what is wrong with it or on the disk."""
        loaded = self._loaded
        return {
            name: {
                "loaded": name in loaded and loaded[name].batcher.alive,
                "version": loaded[name].engine.version if name in loaded else None,
                "row": loaded[name].engine.row if name in loaded else None,
                "share": bundle.share,
                "trouble": self._troubles.get(name),
            }
            for name, bundle in self.settings.bundles.items()
        }

    @property
    def ready(self) -> bool:
        """Return whether every bundle serves."""
        return self._thread.is_alive() and all(one["loaded"] for one in self.state().values())

    @property
    def waiting(self) -> int:
        """Return the number of users who wait."""
        return sum(one.batcher.waiting for one in self._loaded.values())

    def _by_share(self, user: str) -> str:
        bundles = self.settings.bundles
        total = sum(bundle.share for bundle in bundles.values())
        at = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8]) / 2**64 * total
        for name, bundle in bundles.items():
            at -= bundle.share
            if at < 0:
                return name
        return next(iter(bundles))

    def _watch(self) -> None:
        while not self._end.is_set():
            self._refresh_settings()
            for name, bundle in self.settings.bundles.items():
                self._refresh(name, bundle)
            self._retire()
            self._end.wait(LOOK_EVERY)

    def _refresh_settings(self) -> None:
        try:
            found = self._read()
        except UserError as error:
            self._trouble("settings", error)
            return
        self._troubles.pop("settings", None)
        self.settings = found

    def _refresh(self, name: str, bundle: ServedBundle) -> Exception | None:
        """Load a bundle if there is another one at its path than the one that serves; return what is wrong with it."""
        there, stamp = self._loaded.get(name), stamp_of(Path(bundle.path))
        if there and stamp == there.stamp:
            self._troubles.pop(name, None)
            return None
        tried, at = self._tried.get(name, (None, 0.0))
        if stamp is not None and tried == stamp and time.monotonic() - at < RETRY_AFTER:
            return None
        try:
            if stamp is None:
                raise UserError(f"{bundle.path} has no {MANIFEST}", "put a bundle there")
            engine = self._load(self.settings, Path(bundle.path))
        except Exception as error:  # whatever it is, those that serve go on
            self._tried[name] = (stamp, time.monotonic())
            self._trouble(name, error)
            return error
        self._troubles.pop(name, None)
        self._tried.pop(name, None)
        settings = self.settings
        batcher = Batcher(engine, settings.max_batch, settings.window_ms / 1000, settings.max_queue, self._observe)
        assert stamp is not None
        folded = [title.casefold() for title in engine.titles]
        self._loaded = {**self._loaded, name: Loaded(name, stamp, batcher, folded)}
        self._event("loaded", f"{name}: {engine.row}, version {engine.version[:12]}, from {bundle.path}")
        if there:
            there.batcher.close()
        return None

    def _retire(self) -> None:
        """Let go of bundles that the settings name no more."""
        for name in set(self._loaded) - set(self.settings.bundles):
            gone = self._loaded[name]
            self._loaded = {other: one for other, one in self._loaded.items() if other != name}
            gone.batcher.close()

    def _trouble(self, name: str, error: Exception) -> None:
        said = f"{error.problem} -> {error.remedy}" if isinstance(error, UserError) else repr(error)
        if self._troubles.get(name) != said:
            self._troubles[name] = said
            self._event("refused", f"{name}: {said}")


def stamp_of(bundle: Path) -> Stamp | None:
    """Return what tells one bundle at a path from another; None if there is none."""
    try:
        manifest = (bundle / MANIFEST).resolve(strict=True)
        status = manifest.stat()
    except (OSError, RuntimeError):
        return None
    return str(manifest), status.st_ino, status.st_mtime_ns, status.st_size
