"""The sections of the method: `llm`, `prompt`, `alignment`, `lora`, `readout` and `loss`.

[P], [N] and "ours" say where a choice comes from, as in `schema.py`.
"""

from typing import Annotated, Literal

from pydantic import Field

from rarec.config.section import NonNegative, Part, Positive, Rate, Section


class Llm(Section):
    """The frozen language model: any Hugging Face decoder or encoder that keeps its blocks in one list."""

    path: str
    """A local directory, a hub name, `package:NAME/DIR` inside an installed package, or a `.gguf` file."""
    revision: str | None = None
    """Hub revision; ignored for local models."""
    kind: Literal["auto", "decoder", "encoder"] = "auto"
    """Causal models are decoders, whose prompts begin with a token that is not read; others are encoders."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights. What trains stays float32."""
    quantize: Literal["none", "nf4"] = "none"
    """Frozen linear layers in 4 bits, computed in `dtype` (QLoRA; extra `qlora`). Not for engines that shard them."""
    gradient_checkpointing: bool = False
    """Recompute a block in the backward pass: less memory, about a third more time."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """By default what transformers chooses; on a CPU with bfloat16 weights its `sdpa` in float32, faster there."""


class Prompt(Section):
    """The hybrid prompt: hard text and named soft slots. `{soft:NAME}` stands for the slots of source NAME."""

    user: str = "{soft:id} {history}"
    """Fields: {history}, {soft:NAME}. The titles alone (ours); the paper's example is in configs/runs/paper.yaml."""
    item: str = "{soft:id} {title}. {text}"
    """Fields: {title}, {text}, {soft:NAME}."""
    separator: str = ", "
    """Between the titles of the history."""
    order: Literal["auto", "oldest_first", "newest_first"] = "auto"
    """Of the titles in the history. By default an encoder gets the newest first, for it gives what stands first more
    weight; a decoder gets the newest last."""
    max_history: Positive = 8
    """The newest items whose titles are written out."""
    max_title_tokens: Positive = 12
    """A longer title is cut here inside the history."""
    max_text_tokens: Positive = 24
    """Title and further text of an item are cut here in its own prompt."""
    max_tokens: Positive | None = None
    """Of a whole prompt, slots included; the model's context length by default."""


class Alignment(Section):
    """The alignment module: for each block, side and source, W e + b and contextual instructions [N]."""

    instructions: NonNegative = 2
    """Contextual instruction vectors c in each block (m in the paper's notation)."""
    init: Literal["random", "ridge"] = "ridge"
    """W from a ridge regression of text-only states on ID vectors, in closed form (ours), or random. With either, b and
    c start at the mean text-only state; in a decoder at the states of the most typical position."""
    ridge: Rate = 1.0
    """Penalty, relative to the mean variance of the standardised ID vectors."""
    id_dropout: Part = 0.05
    """Share of the training samples whose item stands without its vectors, so that what takes the place of a new item's
    is learned (ours)."""


class Lora(Section):
    """Low-rank adapters on the language model, trained with the alignment and saved apart from it."""

    rank: Positive = 8
    alpha: Positive = 16
    dropout: Part = 0.0
    targets: list[str] | None = None
    """Module names; by default the query and value projections of the architecture."""


class Readout(Section):
    """From the final hidden states of the text to the vector that is scored (all ours)."""

    pool: Literal["mean", "last"] = "mean"
    """Of the text's states: their mean, or the last of them."""
    whiten: bool = True
    """Move what is read, of the text and of the slots, to its mean, and stretch it until no direction stands out, by
    users and items as they are before the first step. A language model's states point nearly one way; what tells texts
    apart is small in them."""
    size: Positive = 384
    """With `whiten`, the most dimensions that are read: of a wider model, the directions that vary most."""
    normalise: bool = True
    """L2-normalise, then a learned scale multiplies the score."""
    head: bool = True
    """A learned linear map of each part that is read, on each side, before they are added and normalised; starts at the
    identity."""
    slots: bool = True
    """Add what the last block makes of the slots: the mean of those that hold vectors, and that of the instructions. In
    a decoder, where they see nothing, what one more map makes of the vectors."""


class Loss(Section):
    """The training loss: L_rec + weight (L_align,user + L_align,item) [N]."""

    recommendation: Literal["bpr", "softmax"] = "softmax"
    """BPR over in-batch pairs is the paper's [N]; in-batch softmax with logQ correction is ours."""
    temperature: Rate = 0.1
    """Divides the scores at the start; learned from there when `readout.normalise` is on. BPR without it has none."""
    logq: bool = True
    """Softmax: subtract the log of each in-batch item's chance to be drawn."""
    align_weight: Annotated[float, Field(ge=0)] = 0.1
    """lambda [N]."""
    align_temperature: Rate = 0.1
    align_pool: Literal["projected", "all"] = "projected"
    """What is compared with the text-only state: the slots W e + b, or the mean of all slots with the instructions."""
