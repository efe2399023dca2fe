"""Hybrid prompts: a template of hard text and named soft slots, filled, tokenised and batched (docs/method.md, 1).

Shape letters: T tokens of a prompt, K slots, B batch.

A filled prompt (`Encoded`) has its text tokens and, for each source, the position of that source's slots. The model
decides the number of slots (`lay_out`), so one tokenised prompt serves every variant; without slots it is the text-only
prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.errors import UserError
from rarec.prompts.tokens import TextTokenizer

Int32 = npt.NDArray[np.int32]
_NOTHING: Int32 = np.empty(0, np.int32)
_PART = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")


@dataclass(frozen=True)
class Encoded:
    """A filled prompt.

    Attributes:
        tokens_T: text tokens, (T,).
        marks: for each source, the index in `tokens_T` before which its slots are inserted. Sources with the same index
            are inserted in the order of the mapping.
        cut: whether text was cut for lack of room.
    """

    tokens_T: Int32
    marks: dict[str, int]
    cut: bool = False


@dataclass(frozen=True)
class TemplatePart:
    """A part of a template.

    Attributes:
        kind: `text`, `field`, or `soft` for a source's slots.
        value: the literal text, or the name of the field or source.
        spaced: whether a space precedes it.
    """

    kind: str
    value: str
    spaced: bool


def parse_template(
    template: str, fields: Sequence[str], sources: Sequence[str], where: str, spaced: bool = False
) -> list[TemplatePart]:
    """Split a template into its parts.

    A space belongs to the word or field after it, as in byte-pair tokenizers. It passes over slots, which are not text.

    Args:
        template: from the configuration; white space around it is dropped.
        fields: names allowed as `{name}`.
        sources: names allowed as `{soft:name}`.
        where: configuration field of the template, for messages.
        spaced: whether a space precedes the whole template.

    Raises:
        UserError: the template has an unknown field or source, uses one twice, or has an unmatched brace.
    """
    parts: list[TemplatePart] = []
    template, at, seen = template.strip(), 0, set()
    for match in [*_PART.finditer(template), None]:
        literal = template[at : match.start() if match else len(template)]
        if set(literal) & set("{}"):
            raise UserError(f"{where}: unmatched brace in {literal.strip()!r}", "close it or leave it out")
        text = literal.removeprefix(" ").removesuffix(" ")
        if text:
            parts.append(TemplatePart("text", text, spaced or literal.startswith(" ")))
        spaced = literal.endswith(" ") or (spaced and not literal)
        if match is None:
            break
        at, (name, source) = match.end(), match.groups()
        known = name == "soft" and source in sources if source or name == "soft" else name in fields
        if not known:
            names = [f"{{{field}}}" for field in fields] + [f"{{soft:{source}}}" for source in sources]
            raise UserError(f"{where}: unknown field {match[0]}", f"use {', '.join(names)}")
        if match[0] in seen:
            raise UserError(f"{where}: {match[0]} is used twice", "keep one of them")
        seen.add(match[0])
        parts.append(TemplatePart("soft", source, spaced) if source else TemplatePart("field", name, spaced))
        spaced = spaced and bool(source)
    return parts


class HybridPrompt:
    """The template of one side (user or item) with a tokenizer.

    Args:
        parts: from `parse_template`.
        tokenizer: of the language model.
        slots: number of slots reserved for each source when a prompt is cut to `max_tokens`.
        max_tokens: limit of a whole prompt, slots included.
        where: configuration field of the template, for messages.

    Raises:
        UserError: the fixed text and the slots leave no room for the fields.
    """

    def __init__(
        self, parts: list[TemplatePart], tokenizer: TextTokenizer, slots: Mapping[str, int], max_tokens: int, where: str
    ) -> None:
        self.parts, self.tokenizer, self._least = parts, tokenizer, tokenizer(".")[:1]
        self._literals = [
            tokenizer(part.value, part.spaced, plain=False) if part.kind == "text" else None for part in parts
        ]
        self.sources = tuple(part.value for part in parts if part.kind == "soft")
        fixed = sum(len(tokens) for tokens in self._literals if tokens is not None)
        fixed += len(tokenizer.prefix) + len(tokenizer.suffix) + sum(slots[source] for source in self.sources)
        self.room = max_tokens - fixed
        if self.room < 1:
            raise UserError(
                f"{where}: fixed text and slots take {fixed} of {max_tokens} tokens",
                "shorten the template, use fewer alignment.instructions, or raise prompt.max_tokens",
            )

    def fill(self, **fields: Int32) -> Encoded:
        """Fill the fields with token ids.

        Text that exceeds the room is cut from the end of the last field, never from slots or fixed text. A prompt
        without any text token gets a full stop: the readout needs a position.
        """
        excess = sum(map(len, fields.values())) - self.room
        kept = dict(fields)
        for name in reversed(fields):
            if excess > 0:
                kept[name] = kept[name][: max(0, len(kept[name]) - excess)]
                excess -= len(fields[name]) - len(kept[name])
        tokens: list[Int32] = [self.tokenizer.prefix]
        marks: dict[str, int] = {}
        for part, literal in zip(self.parts, self._literals, strict=True):
            if part.kind == "soft":
                marks[part.value] = sum(map(len, tokens))
            else:
                tokens.append(literal if literal is not None else kept.get(part.value, _NOTHING))
        cut = sum(map(len, fields.values())) > self.room
        text = tokens if sum(map(len, tokens)) > len(self.tokenizer.prefix) else [*tokens, self._least]
        return Encoded(np.concatenate([*text, self.tokenizer.suffix]).astype(np.int32), marks, cut)


@dataclass(frozen=True)
class LaidOut:
    """Prompts of a batch with their slots: ids and mask (B, T), slot positions (B, K)."""

    ids_BT: npt.NDArray[np.int64]
    mask_BT: npt.NDArray[np.int64]
    positions_BK: npt.NDArray[np.int64]


def by_length(prompts: Sequence[Encoded], size: int) -> list[npt.NDArray[np.int64]]:
    """Group rows of prompts of similar length, `size` at a time, to keep padding short."""
    order = np.argsort([len(prompt.tokens_T) for prompt in prompts], kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def lay_out(prompts: Sequence[Encoded], slots: Mapping[str, int], filler: int) -> LaidOut:
    """Insert slot positions into filled prompts and pad them on the right.

    Args:
        prompts: the batch (B).
        slots: number of slots of each source, in the order in which the model supplies them; an empty mapping gives
            text-only prompts.
        filler: token id at slots and padding, which the model never reads as text.
    """
    wanted = {source: count for source, count in slots.items() if count}
    lengths = [len(prompt.tokens_T) + sum(wanted.values()) for prompt in prompts]
    ids_BT = np.full((len(prompts), max(lengths)), filler, np.int64)
    mask_BT = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    positions_BK = np.zeros((len(prompts), sum(wanted.values())), np.int64)
    for row, prompt in enumerate(prompts):
        positions_K, is_text = _slot_positions(prompt, wanted, lengths[row])
        ids_BT[row, : lengths[row]][is_text] = prompt.tokens_T
        positions_BK[row] = positions_K
    return LaidOut(ids_BT, mask_BT, positions_BK)


def _slot_positions(
    prompt: Encoded, wanted: Mapping[str, int], length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the slot positions in the model's order of sources, and which of the prompt's positions are text."""
    groups, shift = {}, 0
    is_text = np.ones(length, bool)
    in_order = [source for source in prompt.marks if source in wanted]
    for source in sorted(in_order, key=lambda name: prompt.marks[name]):
        start = prompt.marks[source] + shift
        groups[source] = np.arange(start, start + wanted[source])
        is_text[groups[source]] = False
        shift += wanted[source]
    return np.concatenate([groups[source] for source in wanted] or [np.empty(0, np.int64)]), is_text
