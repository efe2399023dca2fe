"""ID models and imported sources for tests, made by the stage `ids` from a dataset that is there already."""

from collections.abc import Callable
from pathlib import Path

from rarec.config import RunConfig
from rarec.config.ids import Ids, Import
from rarec.data.dataset import PreparedDataset
from rarec.ids.source import Source, open_source
from rarec.stages.data import IdsStage, PrepareStage
from rarec.stages.run import Run
from rarec.storage.artefacts import Manifest


class FinishedPrepare(PrepareStage):
    """The stage of a dataset that was not made by it, such as one by hand."""

    @property
    def hash(self) -> str:
        """The hash of the dataset."""
        return self.run.dataset.hash

    def require(self, *, outside: bool = False) -> Manifest:
        """See `Stage`."""
        return {"hash": self.hash}


class SourceRun(Run):
    """A run of which only a source is wanted, over a dataset that is there already."""

    def __init__(self, config: RunConfig, dataset: PreparedDataset, say: Callable[[str], None]) -> None:
        super().__init__(config, say=say)
        self._given = dataset

    @property
    def dataset(self) -> PreparedDataset:
        """The dataset that was given."""
        return self._given

    def stage(self, name: str, part: str = "") -> IdsStage | FinishedPrepare:
        """Return the stage `ids`, or the dataset's."""
        return IdsStage(self, part) if name == "ids" else FinishedPrepare(self)


def ids_stage(
    name: str,
    section: Ids | Import,
    dataset: PreparedDataset,
    root: Path,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> IdsStage:
    """Return the stage that makes a source in `root/ids/name`."""
    tree = {
        "run": {"dir": str(root), "seed": seed},
        "prepare": {
            "interactions": {"path": "log.csv", "user": "user", "item": "item", "time": "time"},
            "items": {"path": "items.csv", "item": "item", "title": "title"},
        },
        "llm": {"path": "-"},
        **({"ids": section} if isinstance(section, Ids) else {"sources": {name: section}}),
    }
    return IdsStage(SourceRun(RunConfig.model_validate(tree), dataset, say), name)


def make_source(
    name: str, section: Ids | Import, dataset: PreparedDataset, root: Path, *, fresh=False, **more
) -> Source:
    """Make a source in `root/ids/name`, and before it those that it goes on from; open it. Arguments of `ids_stage`."""
    stage = ids_stage(name, section, dataset, root, **more)
    for before in stage.inputs().values():
        if isinstance(before, IdsStage):
            make_source(before.part, section, dataset, root, **more)
    stage.make(fresh)
    return open_source(stage.directory)
