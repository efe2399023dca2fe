"""What rarec writes to `run.dir` beside the stages' directories, and what may not lie there."""

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import dump_config
from rarec.distributed.hardware import machine
from rarec.errors import UserError
from rarec.storage.artefacts import read_sealed, write_sealed
from rarec.storage.files import remove_stale, write_text
from rarec.version import source

if TYPE_CHECKING:
    from rarec.stages.run import Run

_TABLES = ("field `prepare.interactions.path`", "field `prepare.items.path`")
HEADER = "# The resolved configuration of this run, written by rarec. Edit the file that it comes from instead.\n"


def check(run: "Run") -> None:
    """Check, before anything is written, that nothing of the user's would be replaced.

    Raises:
        UserError: an input lies where rarec replaces files, or a file of the user's has the name of one of rarec's.
    """
    for path in (run.config_file, run.record_file):
        remove_stale(path.parent, path.name)
    _check_config_file(run.config_file)
    read_record(run.record_file)
    for field, path in _inputs(run):
        for place in _replaced(run):
            if path.is_relative_to(place):
                problem = f"{field}: {path} lies inside {place}, where rarec replaces files"
                raise UserError(problem, "move it elsewhere, or choose another run.dir")
            if field in _TABLES and path.is_dir() and place.is_relative_to(path):
                problem = f"{field}: {path} is searched for tables, and {place} inside it is for rarec's own"
                raise UserError(problem, "choose a run.dir outside it, or name the tables by a glob: logs/*.csv")


def write_config(run: "Run", *, only_if_there: bool = False) -> None:
    """Write the resolved configuration.

    Args:
        run: the run.
        only_if_there: only in place of one that differs: nothing is built.

    Raises:
        UserError: a file of the user's has its name.
    """
    path = run.config_file
    _check_config_file(path)
    text = HEADER + dump_config(run.config)
    before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if before != text and (before is not None or not only_if_there):
        write_text(path, text)


def record(run: "Run", name: str, seconds: float, fresh: bool) -> None:
    """Add a stage's time, machine and commit to `record.json`.

    The time of a process that was killed is not known here; a training's own manifest counts it.

    Raises:
        UserError: the file is damaged, or not rarec's.
    """
    noted = read_record(run.record_file)
    before = {} if fresh else noted.get(name, {})
    here = {"hardware": machine(run.world.device), "ranks": run.world.size, **source()}
    others = _earlier(before, here)
    seconds = round(before.get("seconds", 0.0) + seconds, 2)
    noted[name] = {"seconds": seconds, **here, **({"earlier": others} if others else {})}
    write_sealed(run.record_file, noted)


def _inputs(run: "Run") -> Iterator[tuple[str, Path]]:
    """Yield the local files and directories that a run reads, with the field that names them."""
    named = {f"field `{field}`": path for field, path in run.config.inputs.items()}
    for field, path in {**named, "the configuration": str(run.file or "")}.items():
        for found in [path] if os.path.lexists(path) else glob.iglob(path, recursive=True):  # noqa: PTH207
            yield field, _real(found)


def _replaced(run: "Run") -> set[Path]:
    """Return the directories that rarec replaces as a whole."""
    from rarec.stages import STAGES

    places = [stage.directory for stage in run.all_stages(STAGES)]
    return {_real(place) for place in (*places, run.converted_llm, run.tar_cache)}


def _real(path: str | Path) -> Path:
    """Return the path without links; not `Path.resolve`, which raises where links go round in a circle."""
    return Path(os.path.realpath(path))


def _check_config_file(path: Path) -> None:
    """Refuse to replace a file that does not begin as the resolved configuration does."""
    if os.path.lexists(path) and not (path.is_file() and path.read_bytes().startswith(HEADER.encode())):
        problem = f"{path} is not rarec's: the run's resolved configuration would replace it"
        raise UserError(problem, "choose another run.dir, or move that file away")


def read_record(path: Path) -> dict[str, Any]:
    """Return each stage's time, machine and commit, as `record.json` has it; nothing if there is none.

    Raises:
        UserError: the file is damaged, or not rarec's.
    """
    remedy = f"move {path} away: only notes of times and machines are lost"
    return read_sealed(path, remedy) if os.path.lexists(path) else {}


def _earlier(before: Mapping[str, Any], here: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return where else, and by what else, a stage was built in part, each once."""
    places = [*before.get("earlier", []), {name: before.get(name) for name in here}] if before else []
    return [one for one in places if one != here]
