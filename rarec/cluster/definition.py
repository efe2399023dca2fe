"""Read a sweep's file, expand it into runs with resolved configurations, and look how far each run is.

The progress is read from manifests alone: it takes milliseconds, loads no model and hashes no file. The stages look
closer when they are run: at the contents of logs, of imported vectors and of the language model.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from rarec.config import RunConfig
from rarec.config.load import PRESET, above_preset, parse_override, read_tree, set_field, validated
from rarec.config.section import Folder, Section, Seed
from rarec.errors import UserError
from rarec.stages import STAGES
from rarec.stages.data import LLM_FIELDS
from rarec.stages.run import Run

if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(STAGES)]
SHARED = "shared"
"""Name of the directory, beside the runs, for the artefacts that they share."""
RESERVED = (SHARED, "slurm")
"""Names of directories beside the runs, which no run may have."""
MAX_RUNS = 10_000
"""Largest number of runs of a sweep. They are counted before any is listed."""
State = Literal["done", "begun", "to do"]
_SET_BY_SWEEP = {"run.dir": "the sweep sets it for each run", "run.seed": "list `seeds`, of the sweep or of the run"}
_NAME = re.compile(r"[A-Za-z0-9][\w.+=,@-]*")


def _check_name(name: str) -> str:
    """Validate the name of an entry, which becomes a directory beside the sweep's own, and return it."""
    if name in RESERVED or not _NAME.fullmatch(name):
        allowed = "a letter or digit, then letters, digits and . _ + = , @ -"
        raise ValueError(f"this name is not free, or is no directory's: choose another name, {allowed}")
    return name


Seeds = Annotated[list[Seed], Field(min_length=1)]


class Entry(Section):
    """An entry of `runs`: `seeds`, `grid`, and overrides of the base's fields, dotted or nested."""

    model_config = ConfigDict(extra="allow")

    seeds: Seeds | None = None
    """Seeds of this run; default: those of the sweep."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    """Lists of values by field: one run for each combination."""


class SweepFile(Section):
    """The fields of a sweep's file."""

    dir: Folder
    """Directory of the runs, relative to the current one: each run in NAME/seed-SEED, shared artefacts in `shared`."""
    base: str
    """Run configuration that all runs start from, relative to this file."""
    seeds: Seeds = Field([17])
    stages: Annotated[list[StageName], Field(min_length=1)] = Field(
        ["prepare", "ids", "neighbours", "shards", "train", "evaluate"]
    )
    """Stages of each run; they run in the order of `rarec run`."""
    runs: Annotated[dict[Annotated[str, AfterValidator(_check_name)], Entry | None], Field(min_length=1)]
    """Entries by name; a name alone is the base without overrides."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, with one seed.

    Attributes:
        entry: name of its entry in the file.
        name: the same, followed by a slash and the point of the grid if there is a grid.
        seed: seed of the run.
        grid: fields of the grid with this run's values.
        overrides: all fields that differ from the base, dotted.
        config: resolved configuration.
    """

    entry: str
    name: str
    seed: int
    grid: Mapping[str, Any]
    overrides: Mapping[str, Any]
    config: RunConfig

    @property
    def label(self) -> str:
        """The name and seed, which are also the run's directory inside the sweep's."""
        return f"{self.name}/seed-{self.seed}"

    @property
    def directory(self) -> Path:
        """The directory `run.dir`."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Sweep:
    """A valid sweep.

    Attributes:
        path: path of its file.
        directory: directory of all its runs.
        base: path of the base configuration.
        stages: stages of each run, in the order of `rarec run`.
        runs: runs in the file's order, grids expanded, the seeds of a run together.
    """

    path: Path
    directory: Path
    base: Path
    stages: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    def matching(self, pattern: str | None) -> list[SweepRun]:
        """Return the runs whose name or label matches a glob pattern; all runs for None.

        Raises:
            UserError: no run matches.
        """
        if pattern is None:
            return list(self.runs)
        runs = [run for run in self.runs if fnmatchcase(run.name, pattern) or fnmatchcase(run.label, pattern)]
        if not runs:
            names = ", ".join(dict.fromkeys(run.name for run in self.runs))
            raise UserError(f"{self.path}: no run matches {pattern!r}", f"names of runs: {names}")
        return runs


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep's file and expand it.

    Args:
        path: path of the file.
        overrides: `section.field=value` for every run, applied after its own.

    Raises:
        UserError: the file, its base or a run is invalid; the message names the file and the run.
    """
    file = validated(SweepFile, read_tree(path), str(path), remedy="correct it: docs/sweeps.md has every field")
    base = path.parent / file.base
    common = dict(map(parse_override, overrides))
    if not base.is_file():
        raise UserError(f"{path}, field `base`: {base} does not exist", "give its path relative to the sweep's file")
    _refuse_fields_of_the_sweep(common, f"{path}, override for all runs")
    entries = {name: entry or Entry() for name, entry in file.runs.items()}
    count = sum(math.prod(map(len, (*entry.grid.values(), entry.seeds or file.seeds))) for entry in entries.values())
    if count > MAX_RUNS:
        remedy = f"list fewer values in each `grid`, or fewer seeds: at most {MAX_RUNS:,} runs"
        raise UserError(f"{path}: {count:,} runs", remedy)
    runs = list(_runs(file, entries, path, base, common))
    label, times = Counter(run.label for run in runs).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path}: {times} runs are called {label}", "list each seed, and each value of a grid, once")
    stages = tuple(stage for stage in STAGES if stage in file.stages)
    return Sweep(path, Path(file.dir), base, stages, tuple(runs))


def state_of(run: SweepRun, stages: Sequence[str]) -> tuple[State, str]:
    """Return whether a run is done, and the stage it has reached: the last of these, or the first that is not done."""
    stage = first_to_do(run.config, stages)
    if stage is None:
        return "done", stages[-1]
    return ("begun" if Run(run.config).config_file.exists() else "to do"), stage


def first_to_do(config: RunConfig, stages: Sequence[str]) -> str | None:
    """Return the first of these stages that is not finished as the configuration says; None if all are."""
    run = Run(config)
    for name in stages:
        if name == "train" and not _same_llm(run):
            return name
        if not all(stage.is_done() for stage in run.stages(name)):
            return name
    return None


def _same_llm(run: Run) -> bool:
    """Return whether the run's resolved configuration names the same language model; its weights are not compared."""
    try:
        recorded = read_tree(run.config_file).get("llm")
    except UserError:
        return False
    wanted = run.config.llm.model_dump(mode="json", include=set(LLM_FIELDS))
    return isinstance(recorded, dict) and all(recorded.get(name) == value for name, value in wanted.items())


def _runs(
    file: SweepFile, entries: Mapping[str, Entry], path: Path, base: Path, common: Mapping[str, Any]
) -> Iterator[SweepRun]:
    """Yield every run of a sweep, with its validated configuration."""
    tree = above_preset(read_tree(base))
    sets_shared = isinstance(tree.get("run"), dict) and tree["run"].get("shared")
    shared = {} if sets_shared else {"run.shared": str(Path(file.dir, SHARED))}
    for entry, fields in entries.items():
        own = _own_fields(fields, common, f"{path}: run {entry!r}")
        for grid, seed in product(_points(fields.grid), fields.seeds or file.seeds):
            name = f"{entry}/{_point_name(grid)}" if grid else entry
            place = {"run.dir": str(Path(file.dir, name, f"seed-{seed}")), "run.seed": seed}
            overrides = {**shared, **own, **grid, **common, **place}
            config = _resolve(tree, overrides, file.stages, f"{path}: run {name!r} over {base}")
            yield SweepRun(entry, name, seed, grid, overrides, config)


def _points(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield each combination of a grid's values, by field."""
    return (dict(zip(grid, values, strict=True)) for values in product(*grid.values()))


def _own_fields(entry: Entry, common: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the fields that an entry overrides, dotted; refuse one that is set at two places."""
    fields = list(_flatten(entry.model_extra or {}, RunConfig))
    names = [*(name for name, _ in fields), *entry.grid]
    _refuse_fields_of_the_sweep(names, where)
    for name, times in Counter([*names, *(common.keys() & entry.grid.keys())]).items():
        if times > 1:
            raise UserError(
                f"{where}: field `{name}` is set twice: dotted, nested, in the grid or on the command line",
                "set it once",
            )
    return dict(fields)


def _refuse_fields_of_the_sweep(fields: Iterable[str], where: str) -> None:
    for field in fields:
        if field in _SET_BY_SWEEP:
            raise UserError(f"{where}: `{field}` cannot be overridden in a sweep", _SET_BY_SWEEP[field])


def _flatten(values: Mapping[str, Any], section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested overrides as dotted fields. Only mappings that are sections of the configuration are split."""
    for name, value in values.items():
        inside = section
        for part in name.split("."):
            fields = inside.model_fields if isinstance(inside, type) and issubclass(inside, Section) else {}
            inside = fields[part].annotation if part in fields else None
        if isinstance(value, dict) and isinstance(inside, type) and issubclass(inside, Section):
            yield from _flatten({str(key): each for key, each in value.items()}, inside, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _resolve(tree: dict[str, Any], overrides: Mapping[str, Any], stages: Iterable[str], where: str) -> RunConfig:
    """Return the base's configuration with overrides applied; refuse now what one of the stages would refuse of it."""
    own = copy.deepcopy(tree)
    with _located(where):
        for field, value in sorted(overrides.items(), key=lambda item: item[0] != PRESET):  # the preset first
            set_field(own, field, copy.deepcopy(value))
    config = validated(RunConfig, own, where)
    with _located(where):
        for stage in Run(config).all_stages(stages):
            stage.settings()
    return config


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Say in an error where the configuration is from."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error.problem}", error.remedy) from None


def _point_name(grid: Mapping[str, Any]) -> str:
    """Return the directory name of a point of a grid, such as `shards.share=0.06`."""
    text = ",".join(f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in grid.items())
    return re.sub(r"[^\w.+=,@-]", "-", re.sub(r"[\"\[\]{} ]", "", text))
