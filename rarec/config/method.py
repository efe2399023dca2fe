"""The sections of the method: `llm`, `prompt`, `alignment`, `lora`, `readout` and `loss`; and its variants.

[P], [N] and [D] say where a choice comes from, as in `schema.py`.
"""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field

from rarec.config.registry import check, find
from rarec.config.section import Count, Location, NonNegativeFew, Part, Positive, Section, Temperature, Weight

_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
NO_VARIANTS = ("id_only", "popularity", "cheap")
"""Rows of the results that are no variants: the ID model, popularity, and the untrained baselines together."""


class Llm(Section):
    """The frozen language model: a Hugging Face decoder or encoder that keeps its blocks in one list."""

    path: Location
    """A local directory, a hub name, `package:NAME/DIR` inside an installed package, or a `.gguf` file."""
    revision: str | None = None
    """Revision on the hub. Ignored for local models."""
    allow_pickle_weights: bool = False
    """Read weights that are a pickle (`pytorch_model.bin`) if there are none in safetensors, with PyTorch's reader for
    plain tensors. A pickle can be made to run code: set it only for a model whose origin you trust."""
    kind: Literal["auto", "decoder", "encoder"] = "auto"
    """Kind of architecture. Set it if the model is refused as neither. A decoder's prompts begin with a special token
    that is not read out."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights. Trainable weights are float32."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` stores frozen linear layers in 4 bits and computes in `dtype` (QLoRA). It needs the extra `qlora`, and does
    not work with engines that shard frozen weights (ZeRO-3, FSDP2)."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass. It takes less memory and about a third more time."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers. `auto` is its default; on a CPU with bfloat16 weights, `sdpa` computed
    in float32, which is faster there. `flex_attention` does not train on CPUs."""
    packing: bool = False
    """Run the prompts of a batch end to end instead of padded. Only for decoders, and faster only with
    `flash_attention_2` or `flex_attention`, which skip other prompts' positions."""
    compile: bool = False
    """Compile the blocks by `torch.compile`, once, within the first steps. Not for ZeRO-3."""


class Prompt(Section):
    """The hybrid prompt: text with named places for slots. `{soft:NAME}` is the place of the slots of source NAME."""

    user: str = "{soft:id} {history}"
    """Template of a user's prompt. Fields: {history}, {soft:NAME}. The default, titles alone, is [D]; the paper's
    example is in configs/runs/paper.yaml."""
    item: str = "{soft:id} {title}. {text}"
    """Template of an item's prompt. Fields: {title}, {text}, {soft:NAME}."""
    title: str = "{title}"
    """Template of an item of the history. Fields: {title}, {soft:NAME}. With `"{title} {soft:id}"` the item's own ID
    vector follows its title, in a slot of its own [D]; with `"{soft:id}"` it is alone."""
    separator: str = ", "
    """Text between the titles of a history."""
    order: Literal["auto", "oldest_first", "newest_first"] = "auto"
    """Order of the titles in a history. `auto` is newest first for an encoder, which gives the beginning more weight,
    and oldest first for a decoder."""
    max_history: Positive = 8
    """Number of items of a history whose titles are written out; the newest ones are."""
    max_title_tokens: Positive = 12
    """Tokens of a title within a history. Longer titles are truncated."""
    max_text_tokens: Positive = 24
    """Tokens of title and text in an item's own prompt. Longer ones are truncated."""
    max_tokens: Count | None = None
    """Tokens of a whole prompt, with its slots. The default is the model's context length."""


class Alignment(Section):
    """The alignment module: W e + b and contextual instructions for each block, side and source [N]."""

    instructions: NonNegativeFew = 2
    """Number of contextual instruction vectors c in each block (m in the paper's notation)."""
    init: Literal["random", "ridge"] = "ridge"
    """First values of W: a ridge regression of text-only states on ID vectors [D], or random. In both cases b and c
    start at the mean text-only state; in a decoder, at the states of the most typical position."""
    id_dropout: Part = 0.05
    """Share of the training samples whose item's vectors are hidden. On these, the vector that replaces missing ones,
    as of new items, is trained [D]."""
    map: Annotated[str, AfterValidator(check("alignment_maps"))] = "linear"
    """Map of vectors to slots: `linear` is W e + b [N]; or one of your own as `package.module:Name`."""


class Lora(Section):
    """Low-rank adapters on the language model, trained with the alignment and saved apart from it."""

    rank: Annotated[int, Field(gt=0, le=4_096)] = 16
    """Rank of the adapters."""
    alpha: Positive = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: Part = 0.0
    """Dropout on the adapters' input."""
    targets: list[str] | None = None
    """Names of the linear modules that get adapters. The default is the query and value projections."""


class Readout(Section):
    """From final hidden states to the vector that is scored [D]."""

    pool: Literal["mean", "last"] = "mean"
    """Pooling of the text's states: their mean, or the last one."""
    whiten: bool = True
    """Whiten the states of text and slots: subtract their mean and equalise their variances. Mean and variances are
    computed from users and items before the first step. Without it, all states of a language model point nearly the
    same way."""
    size: Positive = 384
    """Dimensions that are kept by `whiten`, at most. A wider model keeps its directions of largest variance."""
    normalise: bool = True
    """L2-normalise the vector, and multiply scores by a learned scale."""
    head: bool = True
    """Map each part by a learned linear map, which starts at the identity, before the parts are added."""
    slots: bool = True
    """Read the slots' states beside the text: the mean over those that hold vectors, and over the instructions. In a
    decoder, the output of one more map of the vectors is read in their place."""
    module: Annotated[str, AfterValidator(check("readouts"))] = "sum"
    """The readout: `sum` adds what the fields above describe; or one of your own as `package.module:Name`."""


class Loss(Section):
    """The training loss: L_rec + align_weight (L_align,user + L_align,item) [N] + distil_weight L_distil [D]."""

    recommendation: Annotated[str, AfterValidator(check("losses"))] = "softmax"
    """L_rec: `bpr` over in-batch pairs [N], in-batch `softmax` [D], or one of your own as `package.module:name`."""
    temperature: Temperature = 0.1
    """Divides the scores at the first step. With `readout.normalise` it is learned from there. `bpr` without
    `readout.normalise` does not use it."""
    logq: bool = True
    """With `softmax`, subtract the log of each in-batch item's chance to be drawn, so that popular items are not
    penalised."""
    align_weight: Weight = 0.1
    """Weight of the alignment losses (lambda [N]); 0 switches them off."""
    align_temperature: Temperature = 0.1
    """Temperature of the alignment losses (tau [N]). A lower one contrasts more sharply."""
    distil_weight: Weight = 0.0
    """Weight of a distillation in the manner of LLM-SRec [D]: an InfoNCE over the batch, with `align_temperature`,
    between a linear map of the user's vector and the ID model's. 0 switches it off."""
    align_pool: Literal["projected", "all"] = "projected"
    """Slots that are compared with the text-only state: the mean of the projected vectors W e + b, or of all slots
    including the instructions."""


@dataclass(frozen=True)
class Variant:
    """One variant of the method.

    Attributes:
        name: its name in directories and in results: letters, digits, `_` and `-`.
        title: its name in tables and reports.
        blocks: the blocks that get slots: `all` that `train.blocks` names, the `input` alone, or `none`; with
            `readout`, vectors do not enter the model, but are added to the text at the readout.
        instructions: True if slots hold the contextual instructions c.
        projections: True if slots hold the projected vectors p = W e + b.
        lora: True if LoRA weights are trained as well.
    """

    name: str
    title: str
    blocks: Literal["all", "input", "readout", "none"]
    instructions: bool = True
    projections: bool = True
    lora: bool = False

    @property
    def identity(self) -> str | dict[str, Any]:
        """Return what manifests record: the name of a variant of rarec's; of a user's own, all fields but the title."""
        if VARIANTS.get(self.name) == self:
            return self.name
        return {field: value for field, value in asdict(self).items() if field != "title"}


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("text_only", "text only", "none", instructions=False, projections=False),
        Variant("text_lora", "text only + LoRA", "none", instructions=False, projections=False, lora=True),
        Variant("prefix_only", "prefix only", "all", projections=False),
        Variant("readout", "ID vectors at the readout", "readout", instructions=False),
        Variant("input", "input injection", "input"),
        Variant("input_lora", "input injection + LoRA", "input", lora=True),
        Variant("per_layer", "RA-Rec (per layer)", "all"),
        Variant("per_layer_lora", "RA-Rec + LoRA", "all", lora=True),
    )
}
"""The variants that rarec brings, by name."""
VARIANT_TITLES = {name: variant.title for name, variant in VARIANTS.items()}
"""Titles of all variants that this process has met, by name."""


def variant_of(given: str) -> Variant:
    """Return the variant that an entry of `train.variants` names: one above, or one of the user's own.

    Raises:
        ValueError: there is none, or its name cannot be used.
    """
    if given in VARIANTS:
        return VARIANTS[given]
    variant = cast(Variant, find("variants", given, VARIANTS))
    check_own_name(given, variant.name, (*VARIANTS, *NO_VARIANTS, "id", "new"))
    VARIANT_TITLES[variant.name] = variant.title
    return variant


def check_own_name(given: str, name: str, taken: Collection[str]) -> None:
    """Refuse a name of a part of the user's own that cannot be a row or a folder of the results.

    Raises:
        ValueError: it has other characters, or is taken.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{given} has the name {name!r}: use letters, digits, _ and -, at most 40")
    if name in taken:
        raise ValueError(f"{given} has the name {name!r}, which is taken: give it another one")


def check_variant(given: str) -> str:
    """Validate an entry of `train.variants`, and return it."""
    variant_of(given)
    return given


VariantName = Annotated[str, AfterValidator(check_variant)]
