"""A run: its configuration, its stages, and what they have made, opened when it is needed."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rarec.config import RunConfig, Variant, load_config
from rarec.config.ids import Ids
from rarec.console.inert import inert
from rarec.errors import Stopped, UserError
from rarec.stages.run_folder import RunFolder, Say
from rarec.stages.stage import STAGES, Stage
from rarec.storage.artefacts import check_files, sha256_json
from rarec.storage.files import read_json
from rarec.version import source

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pandas as pd

    from rarec.data.dataset import PreparedDataset
    from rarec.data.tables import Scratch
    from rarec.ids.source import Source
    from rarec.models.build import SourceShape
    from rarec.models.encode import Encoder
    from rarec.models.language_model import LoadedModel
    from rarec.models.towers import RaRec
    from rarec.neighbours.ranker import NeighbourRanker
    from rarec.prompts import PromptPair
    from rarec.ranking import Ranker
    from rarec.training.engines import Engine

OPENED = {
    "prepare": ("dataset", "sources", "baseline", "prompts", "neighbours"),
    "ids": ("sources", "baseline", "prompts"),
    "neighbours": ("neighbours",),
}
"""Properties of a run that hold opened artefacts, by the stage that makes these."""


def print_line(line: str) -> None:
    """Print one line to standard error."""
    print(inert(line), file=sys.stderr, flush=True)


class Run(RunFolder):
    """One run of a configuration: builds stages, and opens what they have made.

    ```python
    run = rarec.Run("mine.yaml", ["train.epochs=3"])
    run.run()  # every stage that is not done yet
    run.metrics()  # a DataFrame: variant, metric, value, interval, n
    ```

    Args:
        config: a YAML file, or a configuration that is loaded already.
        overrides: `section.field=value` strings, for a YAML file.
        say: called with each line for the user.

    Raises:
        UserError: the configuration is not valid.
    """

    def __init__(self, config: str | Path | RunConfig, overrides: Iterable[str] = (), *, say: Say = print_line) -> None:
        if isinstance(config, RunConfig):
            super().__init__(config, say)
        else:
            super().__init__(load_config(config, overrides), say, config)

    def run(self, stages: Sequence[str] | None = None, *, fresh: bool = False, verify: bool = False) -> None:
        """Build the stages that are not finished yet, in their order.

        Args:
            stages: names, such as `["prepare", "ids"]`; all of them by default.
            fresh: build them anew. What is there stays until its replacement is whole.
            verify: read every file of what is finished and compare its hash, also where that was done before and the
                file has the same size, time and inode.

        Raises:
            UserError: a name is unknown, the input is not as it should be, or an artefact was made with other settings.
            Stopped: a signal asked to stop; the same call resumes.
        """
        wanted = named_stages(stages) if stages is not None else list(STAGES)
        for stage in self.all_stages(wanted):  # what is refused is refused now, not after hours of training
            stage.settings()
            stage.check_place(fresh)
        self.reads_all = verify
        for name in wanted:
            self.say(f"\n{name}")
            started = time.monotonic()
            self.make(name, fresh=fresh)
            self.say(f"{name} took {time.monotonic() - started:.0f} s")

    def make(self, name: str, *, fresh: bool = False) -> bool:
        """Build the artefacts of one stage that are not there yet; return whether anything was built.

        What it took is written to the run's `record.json`.
        """
        source()  # the commit as it was when the code was loaded, not as it may be hours later
        started = time.monotonic()
        built = False
        stages = self.stages(name)
        self.world.run_on_main(lambda: self._check_places(stages, fresh))
        try:
            for stage in stages:
                built |= stage.make(fresh)
        except Stopped:
            built = True
            raise
        finally:
            for opened in OPENED.get(name, ()) if built else ():  # it is of what was replaced
                self.__dict__.pop(opened, None)
            if built and self.world.is_main:
                self.record(name, time.monotonic() - started, fresh)
        return built

    def metrics(self) -> "pd.DataFrame":
        """Return the test figures, a row for each variant and metric, with bootstrap 95% intervals.

        Columns: variant, metric, protocol, value, low, high, n.
        """
        return self._frame("metrics.json")

    def comparisons(self) -> "pd.DataFrame":
        """Return paired differences between variants over the same test users, with bootstrap 95% intervals.

        Columns: variant, baseline, metric, protocol, difference, low, high, n, differing (users whose values differ).
        """
        return self._frame("comparisons.json")

    def ranks(self) -> "pd.DataFrame":
        """Return the rank of each test user's target among all items, by variant.

        Columns: variant, user, target (ids as in the log), rank (1 is the best).
        """
        from rarec.data.tables import read_columns

        return read_columns(self._evaluated("ranks.parquet")).to_pandas()

    def _check_places(self, stages: Sequence[Stage], fresh: bool) -> None:
        self.protect(stage.directory for stage in self.all_stages(STAGES))
        for stage in stages:
            stage.check_place(fresh)

    def stage(self, name: str, part: str = "") -> Stage:
        """Return one artefact's stage: `stage("shards")`, `stage("train", "per_layer")`."""
        return STAGES[name](self, part)

    def stages(self, name: str) -> list[Stage]:
        """Return the stages of a name, one for each of its artefacts."""
        return [STAGES[name](self, part) for part in STAGES[name].parts(self)]

    def all_stages(self, names: Iterable[str]) -> list[Stage]:
        """Return the stages of several names."""
        return [stage for name in names for stage in self.stages(name)]

    def directory(self, name: str, part: str = "") -> Path:
        """Return the directory of an artefact: `directory("evaluate")`, `directory("train", "per_layer")`."""
        return self.stage(name, part).directory

    @property
    def scratch(self) -> "Scratch":
        """Return where the large arrays of a stage are kept."""
        from rarec.data.tables import Scratch

        return Scratch(int(self.config.run.memory_gb * 1e9), self.root)

    def ranker(self, items_NZ: "npt.NDArray[np.float32]", users: "Callable[..., npt.NDArray[np.float32]]") -> "Ranker":
        """Return a ranker over vectors, on this rank's device where its memory has room for a table of that size."""
        from rarec.distributed.world import CPU
        from rarec.ranking import VectorRanker

        fits = items_NZ.nbytes <= self.scratch.bytes
        return VectorRanker(items_NZ, users, device=self.world.device if fits else CPU)

    @cached_property
    def engine(self) -> "Engine":
        """The engine that runs models on the ranks."""
        from rarec.training.accelerator import build_engine

        return build_engine(self.world, self.config)

    @cached_property
    def dataset(self) -> "PreparedDataset":
        """The prepared dataset, every file of it checked."""
        from rarec.data.dataset import PreparedDataset

        stage = self.stage("prepare")
        stage.require()
        return PreparedDataset.open(stage.directory)

    @cached_property
    def sources(self) -> dict[str, "Source"]:
        """Every source of vectors that become slots, `id` first."""
        return {name: self._source(name) for name in self.config.sources_by_name}

    @cached_property
    def baseline(self) -> "Source":
        """The ID model that variants are compared and fused with.

        It is `id` itself, or one trained on all interactions where `id` was trained without the newest.
        """
        name, _ = self.config.baseline
        return self.sources["id"] if name == "id" else self._source(name)

    @cached_property
    def neighbours(self) -> "dict[str, NeighbourRanker]":
        """Every neighbour model as a ranker."""
        return {name: self._neighbours(name) for name in self.config.neighbours.by_name}

    @property
    def shapes(self) -> dict[str, "SourceShape"]:
        """The dimension, and the vectors per user, of every source."""
        from rarec.models.build import SourceShape

        return {name: SourceShape(source.dim, source.vectors_per_user) for name, source in self.sources.items()}

    @cached_property
    def llm(self) -> "LoadedModel":
        """The frozen language model, without LoRA."""
        from rarec.models.language_model import load_model
        from rarec.models.model_folder import locate

        config, converted = self.config.llm, self.converted_llm
        self.world.run_on_main(lambda: locate(config.path, converted))
        with self.engine.loading(config):
            return load_model(config, converted, pool=self.config.readout.pool, device=self.world.device.type)

    def load_llm(self, variant: Variant) -> "LoadedModel":
        """Return the language model as a variant has it, with fresh LoRA weights or none.

        There is one copy in memory, so it belongs to one variant at a time.
        """
        from rarec.models.language_model import with_adapter

        lora = self.config.lora if variant.lora else None
        self._adapted = with_adapter(getattr(self, "_adapted", self.llm), lora, self.config.run.seed)
        return self._adapted

    def build_model(self, variant: Variant) -> "RaRec":
        """Return a variant's towers over the language model; their weights are not set."""
        from rarec.models.build import build_model

        return build_model(self.config, variant, self.load_llm(variant), self.shapes, self.prompts.sources)

    @cached_property
    def prompts(self) -> "PromptPair":
        """Both prompts over the catalogue's titles.

        Raises:
            UserError: a source is in neither prompt.
        """
        from rarec.models.build import slots_reserved
        from rarec.prompts import AT_TITLES, PromptPair

        llm = self.llm
        pair = PromptPair(
            self.config.prompt,
            llm.tokenizer,
            self.dataset.titles,
            self.dataset.texts,
            slots_reserved(self.config, self.shapes),
            llm.context_length,
            llm.identity["kind"],
        )
        named = {name.removesuffix(AT_TITLES) for side in pair.sources.values() for name in side}
        for name in self.shapes:
            if name not in named and not (name == "id" and named):  # another source may take the place of the IDs
                problem = f"source {name!r} is in none of prompt.user, prompt.title and prompt.item"
                raise UserError(problem, f"write {{soft:{name}}} where its slots should go")
        return pair

    def encoder(self, model: "RaRec", sources: "dict[str, Source] | None" = None) -> "Encoder":
        """Return the encoder of users and items by a model, from the run's sources or from others."""
        from rarec.models.encode import Encoder

        batch_size = self.config.evaluate.batch_size
        return Encoder(model, self.prompts, sources or self.sources, batch_size, self.world, self.scratch)

    @property
    def model_inputs(self) -> dict[str, str]:
        """Hashes of the language model and the prompt: what shards and models are made from beside artefacts."""
        identity = {key: value for key, value in self.llm.identity.items() if key not in ("name", "revision")}
        return {"llm": sha256_json(identity), "prompt": self.prompts.fingerprint}

    def _source(self, name: str) -> "Source":
        from rarec.ids.source import open_source

        stage = self.stage("ids", name)
        stage.require()
        stage.check_files()
        section = self.config.vectors_by_name[name]
        return open_source(stage.directory, section.recipe if isinstance(section, Ids) else None)

    def _neighbours(self, name: str) -> "NeighbourRanker":
        from rarec.neighbours.base import TABLE, read_table
        from rarec.neighbours.ranker import NeighbourRanker

        stage, config = self.stage("neighbours", name), self.config.neighbours
        stage.require()
        stage.check_files()
        table_NN = read_table(stage.directory / TABLE, self.dataset.n_items, self.scratch)
        lacking_N = None if config.class_of(name).knows_new_items else self.dataset.train_counts_N == 0
        return NeighbourRanker(table_NN, config.newest, config.decay, lacking_N)

    def _evaluated(self, name: str) -> Path:
        """Return a file of the evaluation, checked to be of the variants as they are configured."""
        stage = self.stage("evaluate")
        for made_from in stage.inputs().values():
            made_from.require()
        check_files(stage.directory, stage.require(), names=[name], remember=True)
        return stage.directory / name

    def _frame(self, name: str) -> "pd.DataFrame":
        import pandas as pd

        return pd.DataFrame(read_json(self._evaluated(name)))


def named_stages(names: Iterable[str]) -> list[str]:
    """Return stages in their order.

    Raises:
        UserError: one is unknown, or there is none.
    """
    names = list(names)
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        problem = f"unknown stage {unknown[0]!r}" if unknown else "no stage is named"
        raise UserError(problem, f"there are: {' '.join(STAGES)}")
    return [name for name in STAGES if name in names]
