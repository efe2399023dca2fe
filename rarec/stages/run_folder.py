"""A run's folder: its configuration and processes, and the files that rarec writes beside the stages' artefacts."""

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import RunConfig, dump_config
from rarec.distributed.hardware import machine
from rarec.errors import UserError
from rarec.storage.artefacts import read_sealed, write_sealed
from rarec.storage.directories import protect_inputs
from rarec.storage.files import remove_stale, write_text
from rarec.version import source

if TYPE_CHECKING:
    from rarec.distributed.world import World

Say = Callable[[str], None]
HEADER = "# The resolved configuration of this run, written by rarec. Edit the file that it comes from instead.\n"
_TABLES = ("field `prepare.interactions.path`", "field `prepare.items.path`")


class RunFolder:
    """What the stages of a run share.

    Args:
        config: of the run.
        say: called with each line for the user.
        file: that the configuration was read from, if any.

    Attributes:
        reads_all: whether files are read and checked although they were before, and are the same by size and time.
    """

    def __init__(self, config: RunConfig, say: Say, file: str | Path | None = None) -> None:
        self.config = config
        self.say = say
        self.file = file
        self.reads_all = False

    @property
    def root(self) -> Path:
        """`run.dir`."""
        return Path(self.config.run.dir)

    @property
    def record_file(self) -> Path:
        """`record.json`: the time, machine and commit of each stage."""
        return self.root / "record.json"

    @property
    def config_file(self) -> Path:
        """The resolved configuration, written by every stage that builds something."""
        return self.root / "resolved.yaml"

    @property
    def converted_llm(self) -> Path:
        """The language model as a plain directory, where it comes as a GGUF file."""
        return self.root / "llm"

    @property
    def tar_cache(self) -> Path:
        """Shards fetched from elsewhere; what is missing here is fetched again."""
        return self.root / "cache"

    @cached_property
    def world(self) -> "World":
        """This process among those that the launcher has started, if any."""
        from rarec.training.accelerator import start_world

        return start_world(self.config)

    def protect(self, artefacts: Iterable[Path]) -> None:
        """Check, before anything is written, that nothing of the user's would be replaced.

        Args:
            artefacts: directories of all stages.

        Raises:
            UserError: an input is where rarec replaces files, or a file of the user's has the name of one of rarec's.
        """
        for path in (self.config_file, self.record_file):
            remove_stale(path.parent, path.name)
        self._check_config_file()
        read_record(self.record_file)
        inputs = [(f"field `{field}`", path) for field, path in self.config.inputs.items()]
        inputs.append(("the configuration", str(self.file or "")))
        protect_inputs(inputs, [*artefacts, self.converted_llm, self.tar_cache], searched=_TABLES)

    def write_config(self, *, only_if_there: bool = False) -> None:
        """Write the resolved configuration.

        Args:
            only_if_there: only in place of one that differs: nothing is built.

        Raises:
            UserError: a file of the user's has its name.
        """
        self._check_config_file()
        path = self.config_file
        text = HEADER + dump_config(self.config)
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if before != text and (before is not None or not only_if_there):
            write_text(path, text)

    def _check_config_file(self) -> None:
        """Refuse to replace a file that does not begin as the resolved configuration does."""
        path = self.config_file
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes().startswith(HEADER.encode())):
            problem = f"{path} is not rarec's: the run's resolved configuration would replace it"
            raise UserError(problem, "choose another run.dir, or move that file away")

    def record(self, stage: str, seconds: float, fresh: bool) -> None:
        """Add a stage's time, machine and commit to `record.json`.

        The time of a process that was killed is unknown; a training's own manifest counts it.

        Raises:
            UserError: the file is damaged, or not rarec's.
        """
        record = read_record(self.record_file)
        before = {} if fresh else record.get(stage, {})
        now = {"hardware": machine(self.world.device), "ranks": self.world.size, **source()}
        places = [*before.get("earlier", []), {name: before.get(name) for name in now}] if before else []
        earlier = [place for place in places if place != now]
        seconds = round(before.get("seconds", 0.0) + seconds, 2)
        record[stage] = {"seconds": seconds, **now, **({"earlier": earlier} if earlier else {})}
        write_sealed(self.record_file, record)


def read_record(path: Path) -> dict[str, Any]:
    """Return each stage's time, machine and commit, as `record.json` has it; an empty one if there is none.

    Raises:
        UserError: the file is damaged, or not rarec's.
    """
    remedy = f"move {path} away: only notes of times and machines are lost"
    return read_sealed(path, remedy) if os.path.lexists(path) else {}
