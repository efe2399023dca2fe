"""The run configuration: one typed tree, strict, with every default in sight, here and in the files beside this one.

A section bears the name of the stage that reads it. [P], [N] and [D] say where a choice comes from:
the paper's abstract, a reader's notes on the full paper, or this project (docs/method.md).
"""

from collections import Counter
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rarec.config.ids import IMPORTED_FILES, OLDER, Ids, Import
from rarec.config.method import Alignment, Llm, Lora, Loss, Prompt, Readout, Variant, VariantName, variant_of
from rarec.config.neighbours import REFIT, SOURCE, Neighbours
from rarec.config.section import (
    Blocks,
    ColumnName,
    Count,
    ExternalName,
    Few,
    Folder,
    Location,
    NonNegative,
    NonNegativeFew,
    Part,
    Positive,
    Rate,
    RowName,
    Section,
    Seed,
    Share,
    SourceName,
    Weight,
)

MODEL_SECTIONS = ("llm", "prompt", "alignment", "readout", "loss", "train", "lora")
"""The sections that say what a bundle's model is."""


class RunSection(Section):
    """Where a run is kept, and what seeds it."""

    dir: Folder
    """Folder of everything this run writes, relative to the current directory."""
    shared: Folder | None = None
    """Folder of prepared data, ID vectors and shards that several runs share, each under a digest of the settings that
    shape it. The first run that needs one builds it. By default each run has its own."""
    memory_gb: Rate = 4.0
    """Size of the largest table of the catalogue that a stage holds in memory, in GB, such as item vectors or states. A
    larger one is kept in a file of `run.dir` while it is needed. (DuckDB has `prepare.memory`.)"""
    seed: Seed = 17
    """Seed of every random choice; each stage derives its own random stream from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run: by default on a GPU if there is one. Set `cpu` to start several processes on CPUs."""
    num_processes: Positive | None = None
    """Number of processes that the launcher must start; any other number is refused. By default any number is
    accepted."""


class Table(Section):
    """Location of a table: files, or a name that the engine knows."""

    path: Location | None = None
    """A file, a directory or a glob, local or an fsspec URL (`s3://bucket/log/*.parquet`); `package:NAME/FILE` is a
    file inside an installed Python package. Formats: CSV, TSV, Parquet, JSONL, RecBole's `.inter` and `.item`."""
    table: str | None = None
    """Instead of `path`: a table that the engine knows, as `NAME` or `SCHEMA.NAME`."""

    @model_validator(mode="after")
    def _one_place(self) -> "Table":
        if (self.path is None) == (self.table is None):
            raise ValueError("name exactly one of `path` and `table`")
        return self


class Interactions(Table):
    """The log: one row an interaction."""

    user: str
    """Column of the user's id, integers or text."""
    item: str
    """Column of the item's id, integers or text."""
    time: str | None = None
    """Column of the time: epoch seconds or milliseconds, ISO 8601, or a timestamp of the file's own."""
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    """Unit of times that are numbers. `auto` finds it by their size, and refuses a column that mixes sizes of several
    units."""
    position: str | None = None
    """Column of the rank in the user's own order, where there is no time."""

    @model_validator(mode="after")
    def _one_order(self) -> "Interactions":
        if (self.time is None) == (self.position is None):
            raise ValueError("name exactly one of `time` and `position`: the order of a user's interactions")
        return self


class Items(Table):
    """The catalogue: one row an item."""

    item: str
    """Column of the item's id."""
    title: str
    """Column of the title."""
    text: list[str] = Field(default=[])
    """Further text columns, appended to the title in the item prompt."""
    untitled: str = "untitled item"
    """Text used in place of a missing title."""
    columns: list[ColumnName] = Field(default=[])
    """Columns that a bundle keeps for conditions of requests, such as `in_stock` or `category`; no part of a model."""
    date: ColumnName | None = None
    """Column of a date, such as of the release, which a bundle keeps for `fallback: recent`: a time or a number."""

    @property
    def kept(self) -> list[str]:
        """The columns that a bundle keeps."""
        return list(dict.fromkeys([*self.columns, *([self.date] if self.date else [])]))


class Split(Section):
    """Which interactions train, validate and test."""

    kind: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """Each user's last item tests and the one before it validates; or two global cuts in time."""
    validation_users: Count | None = None
    """Leave-one-out only: number of users who validate, a fixed random subset; the item before the last of all others
    trains. By default all validate, as in most published tables."""
    new_items: Part = 0.0
    """Leave-one-out only, to measure new items: share of the items, chosen by a hash of their ids, that are removed
    from training. Only interactions that are a user's last are kept of them, so they occur in the test alone."""
    validation_share: Share = 0.1
    """Temporal only: share of the interactions, in time order, in the validation window."""
    test_share: Share = 0.1
    """Temporal only: share of the interactions, in time order, in the test window."""


class Prepare(Section):
    """Logs to a prepared dataset."""

    engine: str = "duckdb"
    """What computes: `duckdb` in this process, `spark` (extra `spark`, Java 17 or 21), or an Ibis URL such as
    `postgres://user:password@host/database`, for tables there."""
    spark: dict[str, str] = Field(default={})
    """Settings of the Spark session, such as `spark.master: yarn`; local on all cores by default."""
    memory: str | None = None
    """Largest memory of DuckDB before it spills to disk, such as `8GB`; 80% of the machine's by default."""
    scratch: Location | None = None
    """Folder of an engine's temporary files; for Spark one that every executor sees. Inside `run.dir` by default."""
    interactions: Interactions
    items: Items
    min_user_interactions: Count = 5
    """Users with fewer interactions are dropped and counted."""
    min_item_interactions: NonNegative = 0
    """Items with fewer interactions are dropped together with these; 0 keeps the whole catalogue."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Rows of the same user, item and time, such as a row written twice: drop all but one, or keep them. `keep` has an
    effect only with `repeats: keep`; the other choices of `repeats` leave one of them anyway."""
    repeats: Literal["first", "last", "runs", "keep"] = "first"
    """When a user meets an item again at another time: keep the first or the last, keep the first of each uninterrupted
    run, or keep all."""
    split: Split = Split()

    @property
    def drops_duplicates(self) -> bool:
        """Return whether one row per user, item and time is kept."""
        return self.duplicates == "drop" or self.repeats != "keep"


class Shards(Section):
    """Training samples: which are kept [N], and how they are laid out."""

    denoise: bool = False
    """Drop a sample whose target's title shares no word with the history's titles [N]."""
    diversify: bool = False
    """Draw evenly over buckets of users by the length of their history, and of items by popularity [N]."""
    length_buckets: Positive = 5
    """Number of buckets of users, for `diversify`."""
    popularity_buckets: Positive = 5
    """Number of buckets of items, for `diversify`."""
    share: Share = 1.0
    """Largest share of all training samples to keep (the paper's headline: 6% [N]). Where `ids.holdout` is above 0, the
    newest of each user come first."""
    max_samples: Count | None = None
    """Largest number of samples to keep, if fewer than the share has."""
    samples_per_shard: Count = 1024
    """Samples in one tar file."""
    writers: Few = 2
    """Number of shards written in parallel while the model computes the next. Does not change their content."""
    state_blocks: Blocks | None = None
    """Blocks whose text-only states are stored, for the alignment loss and the initialisation; all by default. A block
    that is not stored is initialised from the nearest one that is."""
    state_dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored states."""


class Stream(Section):
    """How training reads its shards. Nothing here changes what is trained, but for `damaged: skip`."""

    workers: NonNegativeFew = 1
    """Number of processes that read and collate ahead; with 0 the training process reads between the steps."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """For samples that differ from the manifest: `refuse` ends with an error; `skip` checks all samples before the
    first step, leaves the damaged ones out on every process, and prints their number."""
    remote: Location | None = None
    """An fsspec URL of a copy of `run.dir/shards`, such as `s3://bucket/mine/shards`: tars are read from there."""
    cache_gb: Rate = 10.0
    """Largest size of the local cache of fetched tars, in GB; the least recently read are deleted first."""


class Train(Section):
    """The loop: one optimizer, warm-up and cosine, early stopping on a validation ranking metric."""

    variants: Annotated[list[VariantName], Field(min_length=1)] = Field(
        default=["text_only", "text_lora", "per_layer_lora"]
    )
    """Variants to train, each with the same budget: `text_only`, `text_lora`, `prefix_only`, `readout`, `input`,
    `input_lora`, `per_layer`, `per_layer_lora`, or ones of your own as `package.module:NAME`. The last one is the main
    one: the others are compared with it, and sanity checks and diagnostics are of it."""
    blocks: Blocks | None = None
    """Blocks with slots, for `per_layer`, `per_layer_lora` and `prefix_only`; all by default."""
    batch_size: Annotated[Positive, Field(ge=2)] = 128
    """Samples in a step, over all processes."""
    tokens_per_batch: Count | None = None
    """Replaces `batch_size`: a step takes as many samples as keep its padded user prompts, slots included, within
    this many tokens."""
    accumulate: Positive = 1
    """Number of parts into which a step's batch is cut, one after the other, to save memory. In-batch negatives
    come from one part, so this changes the result; more processes do not."""
    epochs: Positive = 2
    """Passes over the kept samples."""
    max_steps: Count | None = None
    """Largest number of steps, if fewer than the epochs have."""
    lr: Rate = 2e-3
    """Learning rate of heads and scale."""
    lr_slots: Rate = 5e-3
    """Learning rate of the alignment, in units of the standard deviation of each block's text-only states."""
    lr_lora: Rate = 1e-3
    """Learning rate of LoRA."""
    weight_decay: Weight = 0.0
    """Weight decay of AdamW."""
    warmup: Part = 0.1
    """Share of all steps over which the learning rates rise linearly; then they fall as a cosine."""
    clip: Rate = 1.0
    """Largest gradient norm; longer gradients are scaled down."""
    validate_every: Count | None = None
    """Steps between validations, an epoch by default; each also writes a checkpoint."""
    validation_users: Count = 1000
    """Number of validation users that are ranked, a fixed random subset."""
    patience: Count = 5
    """Stop after this many validations without a better NDCG@100."""
    keep: Few = 2
    """Number of newest checkpoints to keep, beside the best."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; by default only at validations."""
    trackers: list[str] = Field(default=["tensorboard"])
    """Names of Accelerate's trackers, such as `tensorboard`."""
    stream: Stream = Stream()

    @field_validator("variants")
    @classmethod
    def _check_names(cls, given: list[str]) -> list[str]:
        variants = set(map(variant_of, given))
        for name, times in Counter(variant.name for variant in variants).items():
            if times > 1:
                raise ValueError(f"two variants have the same name, {name!r}: rename one")
        return given

    def steps(self, every: int, trained: Collection[str]) -> int:
        """Return the number of steps to take of all in the epochs: 0 if only a scale trains, which changes no rank."""
        return min(every, self.max_steps or every) if set(trained) - {"log_scale"} else 0


class Evaluate(Section):
    """Ranking of the whole catalogue on the test users."""

    cutoffs: Annotated[list[Count], Field(min_length=1, max_length=1_000)] = Field(default=[1, 3, 5, 10, 20, 50, 100])
    """The K of HR@K and NDCG@K."""
    targets: Literal["first", "all"] = "first"
    """Questions of a temporal or given split: each user's first interaction in the window that has a history, or every
    one from that on, each with its own history. Intervals are over users in any case."""
    max_history: Count | None = None
    """Number of newest items of a history that are known to every model and fusion; by default all."""
    exclude_seen: bool = True
    """The items of the history do not compete; with false they may be recommended again, as where users repeat."""
    refit: Literal["validation"] | None = None
    """Add rows `ROW/refit`: fusions with the untrained baselines where those that are counted from interactions (not
    the models of texts, and nothing that chooses an epoch) are fitted on the validation interactions as well."""
    users: Count | None = None
    """Number of test users to rank, a fixed random subset that is the same for every seed; all by default."""
    sanity_checks: bool = True
    """Rank again with shuffled histories, and with ID vectors permuted among items: both must give worse figures."""
    fusion: bool = True
    """Add rows of late fusion: the variant's score plus the ID model's, by the weight that makes validation users'
    targets most likely."""
    learned_users: NonNegative = 20_000
    """Add rows `+learned`: the 200 best items of each late fusion with the untrained baselines in an order that is
    learned on so many validation users (docs/method.md, section 7). 0 adds none, and neither do fewer than 500 users
    who took one of these items."""
    batch_size: Positive = 128
    """Prompts in one forward pass."""
    resamples: Positive = 2000
    """Resamples of the bootstrap behind each interval."""
    external: dict[ExternalName, Location] = Field(default={})
    """Ranks of other systems by name, each a Parquet or CSV file with columns `user` and `rank` (1 is best, in the full
    catalogue), or `user`, `item` and `score`. Each becomes one more variant of the report."""


class Report(Section):
    """The HTML report."""

    examples: NonNegativeFew = 5
    """Number of users shown with their history and top-10 lists."""


class Export(Section):
    """The bundle that a user takes away."""

    variant: RowName | None = None
    """Row of the results to export: a variant of `train.variants`, `id_only`, `cheap`, a neighbour model, or a fusion
    such as `per_layer_lora+id` or `per_layer_lora+id+cheap`; by default the row that is best on validation users."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the trained weights in the bundle, except LoRA. They are used in float32; float16 halves the file."""
    license: str = "other"
    """Licence of the bundle, as model hubs name it, such as `apache-2.0`; it is in the card."""
    with_llm: bool = False
    """Put the language model's files into the bundle, so that it needs nothing else."""


class RunConfig(Section):
    """Everything a run needs to know."""

    run: RunSection
    prepare: Prepare
    ids: Ids = Ids()
    sources: dict[SourceName, Import] = Field(default={})
    """Further frozen vectors by name (image, text, ...), beside `id`."""
    neighbours: Neighbours = Neighbours()
    llm: Llm
    prompt: Prompt = Prompt()
    shards: Shards = Shards()
    alignment: Alignment = Alignment()
    lora: Lora = Lora()
    """Used by the variants with the field `lora`: `text_lora`, `input_lora`, `per_layer_lora`, or ones of your own."""
    readout: Readout = Readout()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    report: Report = Report()

    @property
    def inputs(self) -> dict[str, str]:
        """The paths and names of everything that a run reads, by field."""
        sections = {f"sources.{name}": section for name, section in self.sources.items()}
        sections |= {"ids.imported": self.ids.imported} if self.ids.imported else {}
        paths = {
            "prepare.interactions.path": self.prepare.interactions.path,
            "prepare.items.path": self.prepare.items.path,
            **{f"{key}.{name}": getattr(files, name) for key, files in sections.items() for name in IMPORTED_FILES},
            **{f"evaluate.external.{name}": path for name, path in self.evaluate.external.items()},
            "llm.path": self.llm.path,
        }
        return {field: path for field, path in paths.items() if path is not None}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if "id" in self.sources:
            raise ValueError("sources: `id` is the name of the ID embeddings themselves; choose another name")
        if unknown := [name for name in self.neighbours.sources if name not in self.sources]:
            known = ", ".join(self.sources) or "none"
            raise ValueError(f"neighbours.models: `{SOURCE}{unknown[0]}` needs a section of `sources` (there: {known})")
        return self

    @property
    def sources_by_name(self) -> dict[str, Ids | Import]:
        """The section of every source whose vectors become slots, `id` first."""
        texts = self.prompt.user + self.prompt.item + self.prompt.title
        idle = {name for name in self.neighbours.sources if f"{{soft:{name}}}" not in texts}
        return {"id": self.ids, **{name: section for name, section in self.sources.items() if name not in idle}}

    @property
    def vectors_by_name(self) -> dict[str, Ids | Import]:
        """The section of everything that `rarec ids` makes, in its order: the sources, and the ID models of samples."""
        first = {OLDER: self.ids} if self.ids.for_samples != ["id"] else {}
        return {**first, "id": self.ids, **self.sources, **dict.fromkeys(self.ids.for_samples, self.ids)}

    @property
    def neighbour_tables(self) -> list[str]:
        """The tables that `rarec neighbours` makes: of each model, and those counted again for `evaluate.refit`."""
        names = list(self.neighbours.by_name)
        if not self.evaluate.refit:
            return names
        return names + [name + REFIT for name in names if not self.neighbours.class_of(name).knows_new_items]

    @property
    def variants(self) -> dict[str, Variant]:
        """The variants of `train.variants`, by name."""
        return {variant.name: variant for variant in map(variant_of, self.train.variants)}

    def variant(self, name: str) -> Variant:
        """Return the variant of a name: one of `train.variants`, or one that rarec brings."""
        return self.variants.get(name) or variant_of(name)

    @property
    def main_variant(self) -> Variant:
        """The variant that the others are compared with: the last of `train.variants`."""
        return list(self.variants.values())[-1]

    def sections(self, *names: str) -> dict[str, object]:
        """Return some sections as plain JSON values."""
        return self.model_dump(mode="json", include=set(names))
