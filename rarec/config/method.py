"""The sections of the method: `llm`, `prompt`, `alignment`, `lora`, `readout` and `loss`.

[P], [N] and [D] say where a choice comes from, as in `schema.py`.
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
    """Type of the frozen weights. Trainable parameters stay float32."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4` holds frozen linear layers in 4 bits and computes in `dtype` (QLoRA; extra `qlora`). Not with engines that
    shard frozen weights."""
    gradient_checkpointing: bool = False
    """Recompute a block in the backward pass: less memory, about a third more time."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation: by default what transformers chooses; on a CPU with bfloat16 weights `sdpa` computed in
    float32, which is faster there."""


class Prompt(Section):
    """The hybrid prompt: hard text and named soft slots. `{soft:NAME}` stands for the slots of source NAME."""

    user: str = "{soft:id} {history}"
    """Template of the user prompt, with {history} and {soft:NAME}. Titles alone are [D]; the paper's example is in
    `configs/runs/paper.yaml`."""
    item: str = "{soft:id} {title}. {text}"
    """Template of the item prompt, with {title}, {text} and {soft:NAME}."""
    separator: str = ", "
    """Text between the titles of the history."""
    order: Literal["auto", "oldest_first", "newest_first"] = "auto"
    """Order of the titles in the history. By default an encoder gets the newest first, since it weighs the beginning
    more; a decoder gets the newest last."""
    max_history: Positive = 8
    """Number of newest items whose titles are in the prompt."""
    max_title_tokens: Positive = 12
    """Largest length of one title inside the history; longer ones are cut."""
    max_text_tokens: Positive = 24
    """Largest length of title and further text in an item's own prompt; longer ones are cut."""
    max_tokens: Positive | None = None
    """Largest length of a whole prompt, slots included; by default the model's context length."""


class Alignment(Section):
    """The alignment module: for each block, side and source, W e + b and contextual instructions [N]."""

    instructions: NonNegative = 2
    """Number of contextual instruction vectors c in each block (m in the paper's notation)."""
    init: Literal["random", "ridge"] = "ridge"
    """How W starts: by ridge regression of text-only states on ID vectors, in closed form [D], or random. In
    both cases b and c start at the mean text-only state; in a decoder at the states of the most typical
    position."""
    ridge: Rate = 1.0
    """Penalty of the ridge regression, relative to the mean variance of the standardised ID vectors."""
    id_dropout: Part = 0.05
    """Share of the training samples that use the learned vector for new items instead of their item's own vector, to
    train it [D]."""


class Lora(Section):
    """Low-rank adapters on the language model, trained with the alignment and saved apart from it."""

    rank: Positive = 8
    """Rank of the adapters (`r` in PEFT)."""
    alpha: Positive = 16
    """Scale of the adapters (`lora_alpha` in PEFT)."""
    dropout: Part = 0.0
    """Dropout rate on the adapters' input."""
    targets: list[str] | None = None
    """Names of the modules with adapters; by default the query and value projections of the architecture."""


class Readout(Section):
    """From the final hidden states of the text to the vector that is scored [D]."""

    pool: Literal["mean", "last"] = "mean"
    """How the text's states are pooled: their mean, or the last one."""
    whiten: bool = True
    """Whiten the pooled states of text and slots: subtract the mean and make all directions equally long, by
    statistics of users and items before the first step. Otherwise a language model's states all point nearly the
    same way."""
    size: Positive = 384
    """With `whiten`: largest number of dimensions to keep; of a wider model, the directions that vary most."""
    normalise: bool = True
    """L2-normalise the vectors; a learned scale then multiplies the score."""
    head: bool = True
    """Learn a linear map of each part on each side before they are added and normalised; it starts at the identity."""
    slots: bool = True
    """Add the final states of the slots: the mean of those with ID vectors, and the mean of the instructions. In a
    decoder, where slots see no text, the ID vectors through one more map."""


class Loss(Section):
    """The training loss: L_rec + weight (L_align,user + L_align,item) [N]."""

    recommendation: Literal["bpr", "softmax"] = "softmax"
    """Recommendation loss: BPR over in-batch pairs is the paper's [N]; in-batch softmax with logQ correction is
    [D]."""
    temperature: Rate = 0.1
    """Initial temperature of the scores; learned if `readout.normalise` is on. Unused by BPR without it."""
    logq: bool = True
    """Softmax only: subtract the log of each in-batch item's chance to be drawn."""
    align_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the alignment loss, lambda [N]."""
    align_temperature: Rate = 0.1
    """Temperature of the alignment loss, tau."""
    align_pool: Literal["projected", "all"] = "projected"
    """The vector that is compared with the text-only state: the slots W e + b, or the mean of all slots with the
    instructions."""
