"""The run configuration: one typed tree, strict, with every default in sight.

A section bears the name of the stage that reads it. [P], [N] and "ours" say where a choice comes from:
the paper's abstract, a reader's notes on the full paper, or this project.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rarec.config.arms import ArmName

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Blocks = Annotated[list[NonNegative], Field(min_length=1)]


class Section(BaseModel):
    """A strict part of the configuration: unknown fields and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Run(Section):
    """Where a run lives and what seeds it."""

    dir: str
    """Directory of every artefact of this run, relative to the current directory."""
    shared: str | None = None
    """Directory of prepared data, ID vectors and shards that runs have in common, each under a name with a digest of
    what shapes it: whichever run needs one first makes it. By default each run has its own."""
    seed: NonNegative = 17
    """Seeds every random choice; each stage derives its own stream from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run: by default on a GPU if there is one. Several ranks are for GPUs unless it is `cpu`."""
    ranks: Positive | None = None
    """Processes that the launcher is to start; any other number is refused. Whatever it starts is taken by default."""


class Table(Section):
    """Where a table lies: in files, or in the engine under a name."""

    path: str | None = None
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
    """Column of the user's id, of any type."""
    item: str
    """Column of the item's id, of any type."""
    time: str | None = None
    """Column of the time: epoch seconds or milliseconds, ISO 8601, or a timestamp of the file's own."""
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
    text: list[str] = []
    """Further text columns, appended to the title in the item prompt."""
    untitled: str = "untitled item"
    """The text that stands for a missing title."""


class Split(Section):
    """Which interactions train, validate and test."""

    kind: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """Last item tests and the one before it validates; or two global cuts in time."""
    validation_users: Positive | None = None
    """Leave-one-out only: a fixed random subset of the users validates, and of the others the item before the last
    trains (as in RecTools' SASRec, eSASRec); all validate by default."""
    validation_share: Share = 0.1
    """Temporal only: share of the interactions, in time order, in the validation window."""
    test_share: Share = 0.1
    """Temporal only: share of the interactions, in time order, in the test window."""


class Prepare(Section):
    """Logs to a prepared dataset."""

    engine: str = "duckdb"
    """What computes: `duckdb` in this process, `spark` (extra `spark`, Java 17), or an Ibis URL such as
    `postgres://user:password@host/database`, for tables there."""
    spark: dict[str, str] = {}
    """Settings of the Spark session, such as `spark.master: yarn`; local on all cores by default."""
    memory: str | None = None
    """Most memory that DuckDB takes before it spills, such as `8GB`; 80% of the machine's by default."""
    scratch: str | None = None
    """Directory for what an engine spills or keeps between steps; for Spark one that every executor sees. Inside
    `run.dir` by default."""
    interactions: Interactions
    items: Items
    min_user_interactions: Positive = 5
    """Users with fewer are dropped and counted."""
    min_item_interactions: NonNegative = 0
    """Items with fewer are dropped with their interactions; 0 keeps the whole catalogue."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Rows of the same user, item and time: written twice, or three bought at once."""
    repeats: Literal["first", "last", "runs", "keep"] = "first"
    """When a user meets an item again at another time: keep the first or the last, collapse runs with nothing between
    (to their first), or keep all."""
    split: Split = Split()


class Recipe(Section):
    """What ID models trained here share: sampled softmax, the strong recipe of 2024-25, and when to stop."""

    dim: Positive = 64
    max_history: Positive = 50
    """The newest interactions it reads."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    negatives: Positive = 256
    """Uniform negatives, shared by a batch."""
    batch_size: Positive = 128
    lr: Rate = 1e-3
    epochs: Positive = 100
    patience: Positive = 10
    """Stop after this many epochs without a better validation NDCG@10."""

    kind: ClassVar[str]
    """The name of its section."""
    title: ClassVar[str]
    """For people."""

    @property
    def shape(self) -> dict[str, Any]:
        """What makes the model; the rest is about its training."""
        return self.model_dump(exclude={"negatives", "batch_size", "lr", "epochs", "patience"})

    @property
    def per_user(self) -> int:
        """Vectors that a user has."""
        return 1


class SasRec(Recipe):
    """Self-attention (ours: the paper's main ID model is ComiRec)."""

    kind, title = "sasrec", "SASRec"
    blocks: Positive = 1
    heads: Positive = 1


class Gru4Rec(Recipe):
    """A recurrent net."""

    kind, title = "gru4rec", "GRU4Rec"
    hidden: Positive = 128
    layers: Positive = 1


class ComiRec(Recipe):
    """Several interests of a user, each a vector, by self-attention (ComiRec-SA)."""

    kind, title = "comirec", "ComiRec"
    interests: Positive = 4
    hidden: Positive = 256

    @property
    def per_user(self) -> int:
        """Its interests."""
        return self.interests


RECIPES: dict[str, type[Recipe]] = {recipe.kind: recipe for recipe in (SasRec, Gru4Rec, ComiRec)}


class Import(Section):
    """Vectors made elsewhere."""

    items: str
    """Item vectors: `.npy` or `.safetensors` (one tensor, rows named by `item_ids`), or Parquet of id and vector."""
    item_ids: str | None = None
    """One id a row, in order: a text file, `.npy`, or Parquet (first column). Not for Parquet vectors."""
    users: str | None = None
    """User vectors, in the same formats; without it they are made from the history by `user_rule`."""
    user_ids: str | None = None
    """One id a row of `users`."""
    user_rule: Literal["mean", "last", "recency"] = "recency"
    """From the history's item vectors: their mean, the last one, or a mean with weights halving every `half_life`."""
    half_life: Rate = 5.0
    """In interactions, for `recency`."""
    max_history: Positive = 50
    """The newest interactions that the rule reads."""


class Ids(Section):
    """The ID embeddings, the method's source `id`: trained here, or imported."""

    model: Literal["sasrec", "gru4rec", "comirec", "import"] = "sasrec"
    sasrec: SasRec = SasRec()
    gru4rec: Gru4Rec = Gru4Rec()
    comirec: ComiRec = ComiRec()
    holdout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of each user's training interactions, the newest and at least one, that the vectors in the slots are not
    trained on; the alignment is trained on these alone, since a vector that has seen a target is over-confident about
    it (ours). A second ID model, trained on all, is then the rival and the partner in a fusion. By default a tenth
    where the ID model is trained here, and 0 for imported vectors: set it if they were trained so, they are taken at
    their word."""
    imported: Import | None = None

    @model_validator(mode="after")
    def _import_is_named(self) -> "Ids":
        if self.model == "import" and self.imported is None:
            raise ValueError("`model: import` needs a section `imported` that names the vectors")
        return self

    @property
    def chosen(self) -> Recipe | Import:
        """The section that `model` names."""
        section: Recipe | Import = getattr(self, "imported" if self.model == "import" else self.model)
        return section

    @property
    def held_out(self) -> float:
        """The share that is held out."""
        usual = 0.1 if isinstance(self.chosen, Recipe) else 0.0
        return usual if self.holdout is None else self.holdout


class Llm(Section):
    """The frozen language model: any Hugging Face decoder or encoder."""

    path: str
    """A local directory, a hub name, `package:NAME/DIR` inside an installed package, or a `.gguf` file."""
    revision: str | None = None
    """Hub revision; ignored for local models."""
    kind: Literal["auto", "decoder", "encoder"] = "auto"
    """Causal models are decoders (last-token readout), bidirectional ones encoders (mean readout)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights. What trains stays float32."""
    quantize: Literal["none", "nf4"] = "none"
    """Frozen linear layers in 4 bits, computed in `dtype` (QLoRA; extra `qlora`). Not for engines that shard them."""
    gradient_checkpointing: bool = False
    """Recompute a block in the backward pass: less memory, about a third more time."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"


class Prompt(Section):
    """The hybrid prompt: hard text and named soft slots. `{soft:NAME}` stands for the slots of source NAME."""

    user: str = "{soft:id} {history}"
    """Fields: {history}, {soft:NAME}. The titles alone (ours); the paper's example is in configs/runs/paper.yaml."""
    item: str = "{soft:id} {title}. {text}"
    """Fields: {title}, {text}, {soft:NAME}."""
    separator: str = ", "
    """Between the titles of the history."""
    order: Literal["auto", "oldest_first", "newest_first"] = "auto"
    """Of the titles in the history. By default an encoder, read by the mean of its states, gets the newest first: it
    gives what stands first more weight; a decoder, read at its last token, gets the newest last."""
    max_history: Positive = 8
    """The newest items whose titles are written out."""
    max_title_tokens: Positive = 12
    """A longer title is cut here inside the history."""
    max_text_tokens: Positive = 24
    """Title and further text of an item are cut here in its own prompt."""
    max_tokens: Positive | None = None
    """Of a whole prompt, slots included; the model's context length by default."""


class Shards(Section):
    """Training samples: which are kept [N], and how they are laid out."""

    denoise: bool = False
    """Drop a sample whose target's title shares no word with the history's titles [N]."""
    diversify: bool = False
    """Draw evenly over buckets of history length and item popularity [N]."""
    length_buckets: Positive = 5
    popularity_buckets: Positive = 5
    share: Share = 1.0
    """Of all training samples, what to keep at most (the paper's headline: 6% [N])."""
    samples_per_shard: Positive = 1024
    writers: Positive = 2
    """Shards packed, hashed and flushed at a time, while the model computes the next; changes nothing in them."""
    state_blocks: Blocks | None = None
    """Blocks whose text-only states are stored for the alignment loss; all of them by default."""
    state_dtype: Literal["float16", "float32"] = "float16"
    """Of the stored states."""


class Alignment(Section):
    """The alignment module: for each block, side and source, W e + b and contextual instructions [N]."""

    instructions: NonNegative = 2
    """Contextual instruction vectors c in each block (m in the paper's notation)."""
    init: Literal["random", "ridge"] = "ridge"
    """W from a ridge regression of ID vectors on text-only states, in closed form (ours), or random."""
    ridge: Rate = 1.0
    """Penalty, relative to the mean variance of the standardised ID vectors."""


class Lora(Section):
    """Low-rank adapters on the language model, trained with the alignment and saved apart from it."""

    rank: Positive = 8
    alpha: Positive = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] | None = None
    """Module names; by default the query and value projections of the architecture."""


class Readout(Section):
    """From the final hidden states of the text to the vector that is scored (all ours)."""

    pool: Literal["auto", "mean", "last"] = "auto"
    """Mean for encoders, last token for decoders."""
    normalise: bool = True
    """L2-normalise, then a learned scale multiplies the score."""
    head: bool | None = None
    """A learned linear map after pooling, one a side, starting at the identity. By default where the hidden size is at
    most 1024: all maps together then take 17 MB at most, with an 8B model they would take 270."""
    slots: bool = True
    """Add what the last block makes of the slots, their mean; with `head` through a map of its own."""
    residual: bool = False
    """Add alpha (e_u . e_i) to the score, alpha learned from 0."""


class Loss(Section):
    """The training loss: L_rec + weight (L_align,user + L_align,item) [N]."""

    recommendation: Literal["bpr", "softmax"] = "softmax"
    """BPR over in-batch pairs is the paper's [N]; in-batch softmax with logQ correction is ours."""
    temperature: Rate = 0.05
    """Softmax: divides the scores at the start; learned from there when `readout.normalise` is on."""
    logq: bool = True
    """Softmax: subtract the log of each in-batch item's chance to be drawn."""
    align_weight: Annotated[float, Field(ge=0)] = 0.1
    """lambda [N]."""
    align_temperature: Rate = 0.1
    align_pool: Literal["projected", "all"] = "projected"
    """What is compared with the text-only state: the slots W e + b, or the mean of all slots with the instructions."""


class Stream(Section):
    """How training reads its shards. Nothing here changes what is trained, but for `damaged: skip`."""

    workers: NonNegative = 1
    """Processes that read and collate ahead; 0 reads between the steps."""
    damaged: Literal["refuse", "skip"] = "refuse"
    """Samples that are not what the manifest says: end with an error, or check all of them before the first step, leave
    the damaged ones out on every rank and say how many."""
    remote: str | None = None
    """An fsspec URL of a copy of `run.dir/shards`, such as `s3://bucket/mine/shards`: tars are read from there."""
    cache_gb: Rate = 10.0
    """Most that fetched tars take on the local disk; the least recently read go first."""


class Train(Section):
    """The loop: one optimizer, warm-up and cosine, early stopping on a validation ranking metric."""

    arms: Annotated[list[ArmName], Field(min_length=1)] = ["text_only", "prefix_only", "input", "per_layer"]
    """Which variants are trained, each at this same budget."""
    blocks: Blocks | None = None
    """Blocks that `per_layer` and `prefix_only` inject into; all of them by default."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Samples in a step, over all ranks."""
    tokens_per_batch: Positive | None = None
    """Instead of `batch_size`: as many samples as keep the padded user prompts of a step within this many tokens."""
    accumulate: Positive = 1
    """Parts into which a step's batch is cut, one after the other, to save memory. Negatives are those of a part: so
    this changes what is trained, and more ranks do not."""
    epochs: Positive = 2
    max_steps: Positive | None = None
    lr: Rate = 1e-3
    """For alignment, heads and scale."""
    lr_lora: Rate = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps."""
    clip: Rate = 1.0
    """Largest gradient norm."""
    validate_every: Positive | None = None
    """Steps between validations (an epoch by default); each also writes a checkpoint."""
    validation_users: Positive = 1000
    """A fixed random subset."""
    patience: Positive = 5
    """Stop after this many validations without a better NDCG@10."""
    keep: Positive = 2
    """Newest checkpoints kept, beside the best."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; by default only at validations."""
    trackers: list[str] = ["tensorboard"]
    """Accelerate's trackers, by name."""
    stream: Stream = Stream()


class Evaluate(Section):
    """Ranking of the whole catalogue on the test users, read once."""

    cutoffs: Annotated[list[Positive], Field(min_length=1)] = [1, 5, 10, 20, 50, 100]
    users: Positive | None = None
    """A fixed random subset of the test users; all of them by default."""
    probes: bool = True
    """Rank again with shuffled histories, and with ID vectors permuted among items."""
    fusion: bool = True
    """Add the ID model's score to each arm's, weighted on the validation users: the honest rival of soft prompts."""
    batch_size: Positive = 128
    resamples: Positive = 2000
    """Of the bootstrap."""


class Report(Section):
    """The HTML report."""

    examples: NonNegative = 5
    """Users shown with their history and top-10 lists."""


class Export(Section):
    """The bundle that a user takes away."""

    arm: ArmName = "per_layer"


class RunConfig(Section):
    """Everything a run needs to know."""

    run: Run
    prepare: Prepare
    ids: Ids = Ids()
    sources: dict[str, Import] = {}
    """Further frozen vectors by name (image, text, ...), beside `id`."""
    llm: Llm
    prompt: Prompt = Prompt()
    shards: Shards = Shards()
    alignment: Alignment = Alignment()
    lora: Lora = Lora()
    """Used by the arm `per_layer_lora`."""
    readout: Readout = Readout()
    loss: Loss = Loss()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    report: Report = Report()

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if "id" in self.sources:
            raise ValueError("sources: `id` is the name of the ID embeddings themselves; choose another name")
        return self
