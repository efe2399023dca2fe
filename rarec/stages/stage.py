"""A stage of a run: the settings that shape its artefact, the inputs it is made from, and how it is built.

`Stage.make` locks, decides whether anything is to be done, builds in a separate directory, resumes, writes the manifest
and replaces the previous artefact, for every stage and on any number of ranks. Sweeps and plans ask the same objects
how far a run is. So the modules of stages import what is heavy (torch, models) inside the functions that need it.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rarec.errors import Stopped, UserError
from rarec.storage import artefacts
from rarec.storage.artefacts import BEGUN, MANIFEST, SCHEMA, Manifest, read_manifest, sha256_json
from rarec.storage.directories import (
    discard,
    new_directory,
    refuse_foreign,
    replace_directory,
    restore_replaced,
    sync_directory,
)
from rarec.storage.files import lock_file, try_lock

if TYPE_CHECKING:
    from rarec.stages.run import Run

POLL = 0.5
"""Seconds between attempts to take a lock that another process holds."""
_DIGITS = 16
"""Length of a digest in a directory's name."""


@dataclass(frozen=True)
class Built:
    """The result of building a stage.

    Attributes:
        figures: counts and other facts for the manifest.
        files: names of the artefact's files, with the sha256 of those that are hashed already; None for every file in
            the directory.
        stop: message, if a signal asked the run to stop after this stage.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, str | None] | None = None
    stop: str = ""


class Stage(ABC):
    """One artefact of a run. A stage with several artefacts (`ids`, `train`) has one object for each part.

    Args:
        run: the run that it belongs to.
        part: name of the artefact within the stage, such as a variant's; empty if the stage has one artefact.
    """

    name: ClassVar[str]
    """Name of the command, of the configuration's section, and in `record.json`."""
    kind: ClassVar[str]
    """Kind of artefact in its manifest; default: the stage's name."""
    folder: ClassVar[str]
    """Directory inside `run.dir`; default: the stage's name."""
    summary: ClassVar[str]
    """One line for `rarec --help`."""
    resumable: bool = False
    """Whether an interrupted build is resumed. It is then built in its own directory, otherwise in a temporary one."""
    claims: ClassVar[tuple[str, ...]] = ()
    """Names of the files of a resumable build, `name/` for all in a directory: others of these names are refused."""
    cheap: ClassVar[bool] = False
    """Whether an outdated artefact is rebuilt. Others are refused: what took hours is replaced on request only."""
    remembers: ClassVar[bool] = True
    """Whether it is noted in the artefact which of its files were checked; see `check_files`."""
    shareable: ClassVar[bool] = False
    """Whether the artefact is kept in `run.shared`, if the configuration sets that."""

    def __init_subclass__(cls) -> None:
        for attribute in ("kind", "folder"):
            if "name" in cls.__dict__ and attribute not in cls.__dict__:
                setattr(cls, attribute, cls.name)

    def __init__(self, run: "Run", part: str = "") -> None:
        self.run, self.part = run, part

    @classmethod
    def parts(cls, run: "Run") -> list[str]:
        """Return the parts that a run has, in their order."""
        return [""]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the part of the configuration that shapes the artefact, as plain JSON values.

        Raises:
            UserError: the configuration contradicts itself.
        """

    def inputs(self) -> "dict[str, Stage]":
        """Return the stages whose artefacts this one is made from, by the name under which it records their hashes."""
        return {}

    def outside_inputs(self) -> dict[str, str]:
        """Return hashes of what else it is made from: files of the user's, the language model. It may take seconds."""
        return {}

    def location_key(self) -> object:
        """Return what tells two artefacts in `run.shared` apart, beside settings and inputs: names of files."""
        return None

    @abstractmethod
    def build(self, directory: Path) -> Built:
        """Write the artefact's files. Every rank is here; rank 0 alone may write, except where ranks share files.

        Args:
            directory: to write to; of a resumable stage, with what an interrupted build has left there.
        """

    def verify(self, directory: Path) -> None:  # noqa: B027 - most stages have nothing to check
        """Check what was built, manifest and all, before it takes its place."""

    @property
    def remedy(self) -> str:
        """The command that makes the artefact again where a file of it is damaged."""
        return artefacts.rebuild(self.kind)

    @property
    def label(self) -> str:
        """The stage's name, and its part if it has several."""
        return f"{self.name} {self.part}".strip()

    @property
    def directory(self) -> Path:
        """The artefact's directory."""
        shared = self.run.config.run.shared
        if shared is not None and self.shareable:
            return Path(shared, "-".join(filter(None, [self.folder, self.part, self.digest])))
        return Path(self.run.config.run.dir, self.folder, self.part)

    @property
    def digest(self) -> str:
        """A hash of everything the configuration says about the artefact and its inputs, for its name in `run.shared`.

        Files enter by their names; the manifest has the hashes of their contents.
        """
        below = {name: stage.digest for name, stage in self.inputs().items()}
        return sha256_json([self.settings(), self.location_key(), below])[:_DIGITS]

    def require(self, *, outside: bool = False) -> Manifest:
        """Return the manifest of the finished artefact.

        Args:
            outside: compare the outside inputs as well, which may take seconds.

        Raises:
            UserError: it is missing or unfinished, or was made with other settings or from other inputs than
                those of now.
        """
        if not (self.directory / MANIFEST).exists() and (self.directory / BEGUN).exists():
            raise UserError(f"{self.directory} is not finished", f"run rarec {self.name} CONFIG: it resumes")
        manifest = read_manifest(self.directory, self.kind)
        expected = {name: stage.hash for name, stage in self.inputs().items()}
        expected |= self.outside_inputs() if outside else {}
        artefacts.check_origin(self.directory, manifest, self.settings(), expected)
        return manifest

    @property
    def hash(self) -> str:
        """The hash of the finished artefact, from its manifest."""
        return str(read_manifest(self.directory, self.kind)["hash"])

    def checked(self, *names: str) -> Path:
        """Require the finished artefact, check these of its files, by default all, and return its directory."""
        remember = self.remembers and not self.run.reads_all
        artefacts.check_files(self.directory, self.require(), self.remedy, names=names or None, remember=remember)
        return self.directory

    def is_done(self) -> bool:
        """Return whether the artefact is finished as the configuration says, as far as manifests tell."""
        try:
            self.require()
        except (UserError, OSError):  # missing, damaged or of other settings: the stage itself says which
            return False
        return True

    def make(self, fresh: bool = False) -> bool:
        """Build the artefact unless it is there; return whether anything was built.

        Args:
            fresh: build it anew. What is there stays until its replacement is whole.

        Raises:
            UserError: it was made with other settings or from other inputs, or the directory is not rarec's.
            Stopped: a signal asked to stop.
        """
        world = self.run.world
        for stage in self.inputs().values():
            world.run_on_all(stage.require)  # what is missing is named before anything is written
        if not fresh and self._is_up_to_date():  # a finished artefact is only read, without a lock
            return False
        world.run_on_main(lambda: self.check_place(fresh))
        with self._lock():
            if not fresh and self._is_up_to_date():
                return False
            identity = self._identity()
            self._agree(identity)
            with self._resumable_build(identity, fresh) if self.resumable else self._build() as directory:
                world.run_on_main(self.run.write_config)
                built = self.build(directory)
                world.report(f"finishing {self.directory}")
                world.run_on_main(lambda: self._finish(directory, identity, built))
        if built.stop:
            raise Stopped(built.stop)
        return True

    def check_place(self, fresh: bool) -> None:
        """Check that making the artefact replaces nothing that rarec has not made.

        Raises:
            UserError: naming what is in the way.
        """
        has_artefact = any((self.directory / name).exists() for name in (MANIFEST, BEGUN))
        if fresh or not has_artefact:  # a finished one is left alone, and a build that resumes replaces nothing
            folder = self.run.root / self.folder
            refuse_foreign(folder if folder.is_symlink() else self.directory)

    def _is_up_to_date(self) -> bool:
        """Return whether the artefact is finished, made as the configuration says, from the inputs of now; print it.

        Raises:
            UserError: it was made from other settings or inputs, and is not cheap.
        """
        world = self.run.world
        # Rank 0 decides for all: another machine may not list yet what was written a moment ago.
        if not world.all_reduce_max(int(world.is_main and (self.directory / MANIFEST).exists())):
            return False
        try:
            world.run_on_all(lambda: self.require(outside=True))
            world.run_on_main(self.checked)
        except UserError as error:
            if not self.cheap:
                raise
            self.run.say(f"{error.problem}: built anew")
            return False
        world.run_on_main(lambda: artefacts.end_build(self.directory))  # a kill may have come before that
        self.run.say(f"{self.directory} is up to date")
        world.run_on_main(lambda: self.run.write_config(only_if_there=True))
        return True

    def _identity(self) -> dict[str, Any]:
        """Return what the manifest says of settings and inputs."""
        made_from = {name: stage.require()["hash"] for name, stage in self.inputs().items()}
        settings = json.loads(json.dumps(self.settings()))
        return {"settings": settings, "made_from": made_from | self.outside_inputs()}

    def _agree(self, identity: Mapping[str, Any]) -> None:
        """Check that all ranks build the same: on another machine, a path may lead to something else.

        Raises:
            UserError: naming the first rank that differs, and what.
        """
        first, *others = map(json.loads, self.run.world.exchange(json.dumps(identity)))
        for rank, other in enumerate(others, start=1):
            lines = artefacts.differences(first, other)
            if lines:
                problem = f"rank {rank} would build another {self.label} than rank 0: {'; '.join(lines)}"
                remedy = f"start all ranks with one configuration, and let {self.run.root} be one folder for all"
                raise UserError(problem, remedy, shared=True)

    def _finish(self, directory: Path, identity: Mapping[str, Any], built: Built) -> None:
        sync_directory(directory)  # the manifest must not outlive a power failure that the files do not
        manifest = artefacts.write_manifest(directory, self.kind, **identity, files=built.files, **built.figures)
        if self.remembers:
            artefacts.note_checks(directory, manifest)
        self.verify(directory)

    @contextmanager
    def _build(self) -> Iterator[Path]:
        """Yield a temporary directory, which becomes `self.directory` at the end; rank 0 alone writes to it."""
        world = self.run.world
        with ExitStack() as stack:
            yield stack.enter_context(new_directory(self.directory)) if world.is_main else self.directory
            world.run_on_main(stack.close)  # the other ranks go on when it is in its place

    @contextmanager
    def _resumable_build(self, identity: Mapping[str, Any], fresh: bool) -> Iterator[Path]:
        """Yield the directory in which the build resumes; what is replaced stays until the build is whole."""
        world = self.run.world
        final = self.directory
        directory = final.with_name(f".{final.name}.fresh") if fresh else final
        begun = {"kind": self.kind, "schema": SCHEMA, **identity}
        world.run_on_main(lambda: artefacts.begin_build(directory, final, begun, self.claims))
        try:
            yield directory
        except BaseException:
            if world.is_main and artefacts.is_only_begun(directory):  # refused: the next may be configured otherwise
                discard(directory)
            raise
        if fresh:
            world.run_on_main(lambda: replace_directory(directory, final))
        world.run_on_main(lambda: artefacts.end_build(final))  # last: until then, the same command resumes

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep other processes from building the same: the second one waits, and then finds it finished."""
        world = self.run.world
        directory = self.directory
        with ExitStack() as stack:
            lock = directory.with_name(f".{directory.name}.lock")
            handle = stack.enter_context(lock_file(lock)) if world.is_main else None
            waits = False
            # Every rank polls: one long wait in a collective would look like a hang.
            while world.all_reduce_max(int(handle is not None and not try_lock(handle))):
                if not waits:
                    self.run.say(f"{directory} is being built by another process: waiting for it")
                waits = True
                world.report(f"waiting for {directory}")
                time.sleep(POLL)
            world.run_on_main(lambda: restore_replaced(directory))  # of a process that was killed between two renames
            yield


STAGES: dict[str, type[Stage]] = {}
"""The stages of a run, in their order, as `rarec.stages` fills it."""
