"""A run: its configuration, its folder, its stages, and what they have made, opened when it is needed."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rarec.config import RunConfig, Variant, dump_config, load_config
from rarec.config.ids import Ids
from rarec.config.neighbours import REFIT
from rarec.console.inert import inert
from rarec.distributed.hardware import machine
from rarec.errors import Stopped, UserError
from rarec.stages.stage import STAGES, Stage
from rarec.storage.artefacts import read_sealed, sha256_json, write_sealed
from rarec.storage.directories import protect_inputs
from rarec.storage.files import read_json, remove_stale, write_text
from rarec.version import source

if TYPE_CHECKING:
    import pandas as pd

    from rarec.data.dataset import PreparedDataset
    from rarec.data.tables import Scratch
    from rarec.distributed.world import World
    from rarec.ids.source import Source
    from rarec.models.build import SourceShape
    from rarec.models.encode import Encoder
    from rarec.models.language_model import LoadedModel
    from rarec.models.towers import RaRec
    from rarec.prompts import PromptPair
    from rarec.ranking.rankers import NeighbourRanker
    from rarec.training.engines import Engine

Say = Callable[[str], None]
HEADER = "# The resolved configuration of this run, written by rarec. Edit the file that it comes from instead.\n"
OPENED = ("dataset", "sources", "sample_sources", "prompts", "neighbours")
"""Properties of a run that hold artefacts of its first three stages, which may be built anew."""
_TABLES = ("field `prepare.interactions.path`", "field `prepare.items.path`")


def print_line(line: str) -> None:
    """Print one line to standard error."""
    print(inert(line), file=sys.stderr, flush=True)


class Run:
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

    Attributes:
        file: that the configuration was read from, if any.
        root: `run.dir`.
        config_file: the resolved configuration, written by every stage that builds something.
        record_file: `record.json`: the time, machine and commit of each stage.
        converted_llm: the language model as a plain directory, where it comes as a GGUF file.
        tar_cache: shards fetched from elsewhere; what is missing here is fetched again.
        reads_all: whether files are read and checked although they were before, and are the same by size and time.

    Raises:
        UserError: the configuration is not valid.
    """

    def __init__(self, config: str | Path | RunConfig, overrides: Iterable[str] = (), *, say: Say = print_line) -> None:
        self.file = None if isinstance(config, RunConfig) else config
        self.config = config if isinstance(config, RunConfig) else load_config(config, overrides)
        self.say = say
        self.root = Path(self.config.run.dir)
        self.config_file = self.root / "resolved.yaml"
        self.record_file = self.root / "record.json"
        self.converted_llm = self.root / "llm"
        self.tar_cache = self.root / "cache"
        self.reads_all = False

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
        wanted = named_stages(STAGES if stages is None else stages)
        for stage in self.all_stages(wanted):  # what is refused is refused now, not after hours of training
            stage.settings()
            stage.check_place(fresh)
        self.reads_all = verify
        for name in wanted:
            self.say(f"\n{name}")
            started = time.monotonic()
            self.make(name, fresh=fresh)
            self.say(f"{name} took {time.monotonic() - started:.0f} s")

    def make(self, name: str, part: str | None = None, *, fresh: bool = False) -> bool:
        """Build the artefacts of one stage, or of one part, that are not there yet; return whether anything was built.

        What it took is written to the run's `record.json`.
        """
        source()  # the commit as it was when the code was loaded, not as it may be hours later
        started = time.monotonic()
        built = False
        stages = self.stages(name) if part is None else [self.stage(name, part)]
        self.world.run_on_main(lambda: self._check_places(stages, fresh))
        try:
            for stage in stages:
                built |= stage.make(fresh)
        except Stopped:
            built = True
            raise
        finally:
            for opened in OPENED if built and name in ("prepare", "ids", "neighbours") else ():
                self.__dict__.pop(opened, None)
            if built and self.world.is_main:
                self._record(name, time.monotonic() - started, fresh)
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

    def read_record(self) -> dict[str, Any]:
        """Return each stage's time, machine and commit, as `record.json` has it; an empty one if there is none.

        Raises:
            UserError: the file is damaged, or not rarec's.
        """
        remedy = f"move {self.record_file} away: only notes of times and machines are lost"
        return read_sealed(self.record_file, remedy) if os.path.lexists(self.record_file) else {}

    def _record(self, stage: str, seconds: float, fresh: bool) -> None:
        """Add a stage's time, machine and commit to `record.json`.

        The time of a process that was killed is unknown; a training's own manifest counts it.
        """
        record = self.read_record()
        before = {} if fresh else record.get(stage, {})
        now = {"hardware": machine(self.world.device), "ranks": self.world.size, **source()}
        places = [*before.get("earlier", []), {name: before.get(name) for name in now}] if before else []
        earlier = [place for place in places if place != now]
        seconds = round(before.get("seconds", 0.0) + seconds, 2)
        record[stage] = {"seconds": seconds, **now, **({"earlier": earlier} if earlier else {})}
        write_sealed(self.record_file, record)

    def _check_places(self, stages: Sequence[Stage], fresh: bool) -> None:
        """Check, before anything is written, that nothing of the user's would be replaced.

        Raises:
            UserError: an input is where rarec replaces files, or a file of the user's has the name of one of rarec's.
        """
        for path in (self.config_file, self.record_file):
            remove_stale(path.parent, path.name)
        self._check_config_file()
        self.read_record()
        inputs = [(f"field `{field}`", path) for field, path in self.config.inputs.items()]
        replaced = [*(stage.directory for stage in self.all_stages(STAGES)), self.converted_llm, self.tar_cache]
        protect_inputs([*inputs, ("the configuration", str(self.file or ""))], replaced, searched=_TABLES)
        for stage in stages:
            stage.check_place(fresh)

    def _check_config_file(self) -> None:
        """Refuse to replace a file that does not begin as the resolved configuration does."""
        path = self.config_file
        if os.path.lexists(path) and not (path.is_file() and path.read_bytes().startswith(HEADER.encode())):
            problem = f"{path} is not rarec's: the run's resolved configuration would replace it"
            raise UserError(problem, "choose another run.dir, or move that file away")

    @cached_property
    def world(self) -> "World":
        """This process among those that the launcher has started, if any."""
        from rarec.training.accelerator import start_world

        return start_world(self.config)

    @property
    def scratch(self) -> "Scratch":
        """Return where the large arrays of a stage are kept."""
        from rarec.data.tables import Scratch

        return Scratch(int(self.config.run.memory_gb * 1e9), self.root)

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

    def source(self, name: str) -> "Source":
        """Return the vectors that `rarec ids` has made under a name."""
        from rarec.ids.source import open_source

        directory = self.stage("ids", name).checked()
        section = self.config.vectors_by_name[name]
        return open_source(directory, section.recipe if isinstance(section, Ids) else None)

    @cached_property
    def sources(self) -> dict[str, "Source"]:
        """Every source of vectors that become slots, `id` first."""
        return {name: self.source(name) for name in self.config.sources_by_name}

    @cached_property
    def sample_sources(self) -> "list[dict[str, Source]]":
        """The sources as the samples of each part of the users read them, with an `id` that has not seen them."""
        names = self.config.ids.for_samples
        return [{**self.sources, "id": self.source(name)} if name != "id" else self.sources for name in names]

    @cached_property
    def neighbours(self) -> "dict[str, NeighbourRanker]":
        """Every neighbour table as a ranker."""
        return {name: self._neighbours(name) for name in self.config.neighbour_tables}

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
                remedy = f"write {{soft:{name}}} where its slots should go, or source:{name} in neighbours.models"
                raise UserError(problem, remedy)
        return pair

    def encoder(self, model: "RaRec", sources: "dict[str, Source] | None" = None) -> "Encoder":
        """Return the encoder of users and items by a model, from the run's sources or from others."""
        from rarec.models.encode import Encoder

        batch_size = self.config.evaluate.batch_size
        return Encoder(model, self.prompts, sources or self.sources, batch_size, self.world, self.scratch)

    @property
    def model_inputs(self) -> dict[str, str]:
        """Hashes of the language model and the prompt: what shards and models are made from beside artefacts."""
        return {"llm": self.llm_hash, "prompt": self.prompts.fingerprint}

    @property
    def llm_hash(self) -> str:
        """Hash of the language model, wherever it is."""
        return sha256_json({key: value for key, value in self.llm.identity.items() if key not in ("name", "revision")})

    def _neighbours(self, name: str) -> "NeighbourRanker":
        from rarec.neighbours.base import TABLE, read_table
        from rarec.ranking.rankers import NeighbourRanker

        config = self.config.neighbours
        table_NN = read_table(self.stage("neighbours", name).checked() / TABLE, self.dataset.n_items, self.scratch)
        return NeighbourRanker(
            table_NN, config.newest, config.decay, config.class_of(name.removesuffix(REFIT)).knows_new_items
        )

    def _evaluated(self, name: str) -> Path:
        """Return a file of the evaluation, checked to be of the variants as they are configured."""
        stage = self.stage("evaluate")
        for made_from in stage.inputs().values():
            made_from.require()
        return stage.checked(name) / name

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
