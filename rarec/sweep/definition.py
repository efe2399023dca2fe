"""From the file of a sweep to its runs, each with its whole configuration; what can be refused is refused here."""

import copy
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

from rarec.config import COMPARING, RunConfig
from rarec.config.load import parse_override, read_tree, set_field, validated
from rarec.config.section import Section
from rarec.errors import UserError
from rarec.sweep.schema import Entry, StageName, SweepFile

SHARED = "shared"
"""The directory beside the runs where what they have in common lies."""
TAKEN = (SHARED, "slurm")
"""Directories beside the runs."""
T = TypeVar("T")
_OURS = {"run.dir": "the sweep gives each run its own", "run.seed": "list `seeds`, of the sweep or of the run"}
_NAME = re.compile(r"[A-Za-z0-9][\w.+=,@-]*")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep with one seed.

    Attributes:
        entry: its name in the file.
        name: the same, and behind a slash the place in the grid.
        seed: of the run.
        grid: the fields of the grid, each with this run's value.
        overrides: every field that is not as the base has it.
        config: what comes of it.
    """

    entry: str
    name: str
    seed: int
    grid: Mapping[str, Any]
    overrides: Mapping[str, Any]
    config: RunConfig

    @property
    def label(self) -> str:
        """Its name and seed, and its directory inside the sweep's."""
        return f"{self.name}/seed-{self.seed}"

    @property
    def directory(self) -> Path:
        """`run.dir`."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Sweep:
    """A sweep that can be run.

    Attributes:
        path: of its file.
        directory: of all its runs.
        base: the configuration that they start from.
        stages: what is made of each, in the order of `rarec run`.
        runs: in the file's order, grids expanded, the seeds of a run together.
    """

    path: Path
    directory: Path
    base: Path
    stages: tuple[str, ...]
    runs: tuple[SweepRun, ...]

    def matching(self, pattern: str | None) -> list[SweepRun]:
        """The runs whose name, or name and seed, a glob matches; all of them without one.

        Raises:
            UserError: it matches none.
        """
        if pattern is None:
            return list(self.runs)
        found = [run for run in self.runs if fnmatchcase(run.name, pattern) or fnmatchcase(run.label, pattern)]
        if not found:
            names = ", ".join(dict.fromkeys(run.name for run in self.runs))
            raise UserError(f"{self.path}: no run is called {pattern!r}", f"there are: {names}")
        return found


def load_sweep(path: Path, overrides: Iterable[str] = ()) -> Sweep:
    """Read a sweep and expand it.

    Args:
        path: of its file.
        overrides: `section.field=value` for every run, on top of its own.

    Raises:
        UserError: the file, its base or a run is not as it should be; it names the file and the run.
    """
    file = validated(SweepFile, read_tree(path), str(path))
    base, common = path.parent / file.base, dict(map(parse_override, overrides))
    if not base.is_file():
        raise UserError(f"{path}, field `base`: {base} does not exist", "it is named as seen from the sweep's file")
    tree = read_tree(base)
    _refuse(common, f"{path}, override for all runs")
    own_place = isinstance(tree.get("run"), dict) and tree["run"].get("shared")
    place = {} if own_place else {"run.shared": str(Path(file.dir, SHARED))}
    compared = any(stage in COMPARING for stage in file.stages)
    runs = []
    for name in file.runs:
        for whole, seed, grid, fields in _points(file, name, common, f"{path}: run {name!r}"):
            overrides = {**place, **fields}
            config = _resolved(tree, overrides, f"{path}: run {whole!r} over {base}")
            if compared and config.export.variant not in config.train.variants:
                problem = f"{path}: run {whole!r}: export.variant is {config.export.variant}, which is not among train.variants"
                raise UserError(problem, "compare one that is trained: set export.variant, or add it to train.variants")
            runs.append(SweepRun(name, whole, seed, grid, overrides, config))
    twice = _repeated(run.label for run in runs)
    if twice is not None:
        raise UserError(f"{path}: two runs are called {twice}", "list each value of a grid once")
    stages = tuple(stage for stage in get_args(StageName) if stage in file.stages)
    return Sweep(path, Path(file.dir), base, stages, tuple(runs))


def _points(
    file: SweepFile, name: str, common: Mapping[str, Any], told: str
) -> Iterator[tuple[str, int, dict[str, Any], dict[str, Any]]]:
    """Each run of an entry: its name with its place in the grid, its seed, the grid's fields, and all that it sets."""
    _check_name(name, told)
    entry = file.runs[name]
    own = _own(entry, told)
    again = next((field for field in entry.grid if field in own or field in common), None)
    if again is not None:
        raise UserError(f"{told}: field `{again}` is in its grid, and given beside it", "give it once")
    seeds = entry.seeds or file.seeds
    twice = _repeated(seeds)
    if twice is not None:
        raise UserError(f"{told}: seed {twice} is listed twice", "list each seed once")
    for values in product(*entry.grid.values()):
        grid = dict(zip(entry.grid, values, strict=True))
        whole = name + (f"/{_place(grid)}" if grid else "")
        for seed in seeds:
            ours = {"run.dir": str(Path(file.dir, whole, f"seed-{seed}")), "run.seed": seed}
            yield whole, seed, grid, {**own, **grid, **common, **ours}


def _check_name(name: str, told: str) -> None:
    """It becomes a directory."""
    if name in TAKEN:
        raise UserError(f"{told}: `{name}` is a directory of the sweep itself", "choose another name")
    if not _NAME.fullmatch(name):
        problem = f"{told}: the name becomes a directory"
        raise UserError(problem, "begin with a letter or digit; then letters, digits and . _ + = , @ - may follow")


def _repeated(values: Iterable[T]) -> T | None:
    """The first value that is there twice."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _own(entry: Entry, told: str) -> dict[str, Any]:
    """The fields that an entry overrides, dotted."""
    fields = list(_flat(entry.overrides, RunConfig))
    twice = _repeated(name for name, _ in fields)
    if twice is not None:
        raise UserError(f"{told}: field `{twice}` is given twice", "give it once, dotted or nested")
    _refuse({**dict(fields), **entry.grid}, told)
    return dict(fields)


def _refuse(fields: Mapping[str, Any], told: str) -> None:
    """What the sweep itself sets."""
    for field in fields:
        if field in _OURS:
            raise UserError(f"{told}: `{field}` cannot be overridden in a sweep", _OURS[field])


def _flat(values: Mapping[str, Any], section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested overrides, dotted. A mapping is taken apart only where the configuration has a section."""
    for name, value in values.items():
        inside = section
        for part in name.split("."):
            fields = inside.model_fields if isinstance(inside, type) and issubclass(inside, Section) else {}
            inside = fields[part].annotation if part in fields else None
        if isinstance(value, dict) and isinstance(inside, type) and issubclass(inside, Section):
            yield from _flat({str(key): each for key, each in value.items()}, inside, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _resolved(tree: dict[str, Any], overrides: Mapping[str, Any], where: str) -> RunConfig:
    own = copy.deepcopy(tree)
    for field, value in overrides.items():
        try:
            set_field(own, field, copy.deepcopy(value))
        except UserError as error:
            raise UserError(f"{where}: {error.problem}", error.remedy) from None
    return validated(RunConfig, own, where)


def _place(grid: Mapping[str, Any]) -> str:
    """A point of a grid as a directory's name: `shards.share=0.06`."""
    text = ",".join(f"{field}={_plain(value)}" for field, value in grid.items())
    return re.sub(r"[^\w.+=,@-]", "-", text)


def _plain(value: Any) -> str:
    return re.sub(r"[\"\[\]{} ]", "", json.dumps(value, ensure_ascii=False))
