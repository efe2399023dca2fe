"""Hybrid prompts: a template of hard text and named soft slots, filled, tokenised and batched (docs/method.md, 1).

Shape letters: T tokens of a prompt, K slots, B batch.

A filled prompt (`Encoded`) has its text tokens and, for each source, the position of that source's slots. The model
decides the number of slots (`lay_out`), so one tokenised prompt serves every variant; without slots it is the text-only
prompt. The items of a history may have slots of their own, one for each item and source (`at_titles`).
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from rarec.errors import UserError

Int32 = npt.NDArray[np.int32]
Marks = dict[str, int | list[int]]
"""For each source, the index of the token before which its slots are inserted; of slots at titles, a list of these, one
for each title."""
AT_TITLES = "@titles"
_NOTHING: Int32 = np.empty(0, np.int32)
_PART = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")
_SPACES = ("▁", "Ġ")
_ANCHOR = "\n"
"""Text that merges with nothing. A tokenizer that adds a space at the start of a text adds none after it."""


class TextTokenizer:
    """Tokenise pieces of text that will be joined.

    Args:
        tokenizer: of the language model.
        opens: start every text with a special token, even if the tokenizer adds none. Decoders need it: their attention
            concentrates on the first position (attention sink), which a slot must not replace.

    Attributes:
        prefix: special tokens before a text, such as [CLS].
        suffix: special tokens after a text, such as [SEP].
        filler: a token id for positions that are never read.
        adds_space: whether the tokenizer adds a space before a text, as SentencePiece mostly does.
        fingerprint: sha256 of the tokenizer's vocabulary and rules, prefix and suffix.
    """

    def __init__(self, tokenizer: Any, opens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._core = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = Lock()  # each call sets how the shared tokenizer reads special tokens
        bare, whole = self._ids("a"), self._ids("a", add_special_tokens=True)
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
        opening = [next(token for token in ends if token is not None)] if opens and not start else whole[:start]
        self.prefix: Int32 = np.array(opening, np.int32)
        self.suffix: Int32 = np.array(whole[start + len(bare) :], np.int32)
        self.filler: int = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        self.adds_space = bool(bare) and str(tokenizer.convert_ids_to_tokens(bare[0])).startswith(_SPACES)
        self._anchor = self._ids(_ANCHOR)
        rules = repr(sorted(tokenizer.get_vocab().items())) if self._core is None else self._core.to_str()
        described = f"{rules} {self.prefix.tolist()} {self.suffix.tolist()}"
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def __call__(self, text: str, spaced: bool = False, most: int | None = None, plain: bool = True) -> Int32:
        """Return the token ids of a piece of text.

        Args:
            text: may be empty.
            spaced: put a space before it.
            most: cut after this many tokens.
            plain: read special tokens such as `[SEP]` as plain text; set for titles, but not for templates.
        """
        return np.array(self._piece(text, spaced, plain)[:most] if text else [], np.int32)

    def __len__(self) -> int:
        """Return the size of the vocabulary. A model's embedding table may have more rows, which are unused."""
        return len(self._tokenizer)

    def save(self, path: Path) -> None:
        """Write it in the format of the package `tokenizers`, if it has one."""
        if self._core is not None:
            self._core.save(str(path))

    def word(self, token: int) -> str:
        """Return a token id as text; as the raw token if the text is white space or an incomplete character."""
        text = str(self._tokenizer.decode([token])).strip()
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return text

    def _piece(self, text: str, spaced: bool, plain: bool) -> list[int]:
        if spaced and not self.adds_space:
            text = " " + text
        if self.adds_space and not spaced and self._anchor:
            anchored = self._ids(_ANCHOR + text, split_special_tokens=plain)
            if anchored[: len(self._anchor)] == self._anchor:
                return anchored[len(self._anchor) :]
        return self._ids(text, split_special_tokens=plain)

    def _ids(self, text: str, **options: bool) -> list[int]:
        with self._lock:
            encoded = self._tokenizer(text, **{"add_special_tokens": False, "verbose": False, **options})
        ids: list[int] = encoded["input_ids"]
        return ids


@dataclass(frozen=True)
class Encoded:
    """A filled prompt.

    Attributes:
        tokens_T: text tokens, (T,).
        marks: where each source's slots are inserted in `tokens_T`. Sources with the same index are inserted in the
            order of the mapping.
        cut: whether text was cut for lack of room.
        titles_H: item rows of the titles, in the order of the text.
    """

    tokens_T: Int32
    marks: Marks
    cut: bool = False
    titles_H: Int32 = field(default_factory=lambda: _NOTHING)


def at_titles(source: str) -> str:
    """Return the name of a source's slots at the titles of a history, as marks and alignments have it."""
    return source + AT_TITLES


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

    @property
    def is_history(self) -> bool:
        """Return whether it is the field `history`."""
        return self.kind == "field" and self.value == "history"


def parse_template(
    template: str, fields: Sequence[str], sources: Sequence[str], where: str, spaced: bool = False
) -> list[TemplatePart]:
    """Split a template into its parts.

    A space belongs to the word or field after it, as in byte-pair tokenizers. It skips slots, which are not text.

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
    template = template.strip()
    end = 0
    seen: set[str] = set()
    for match in [*_PART.finditer(template), None]:
        literal = template[end : match.start() if match else len(template)]
        if set(literal) & set("{}"):
            raise UserError(f"{where}: unmatched brace in {literal.strip()!r}", "close it or leave it out")
        text = literal.removeprefix(" ").removesuffix(" ")
        if text:
            parts.append(TemplatePart("text", text, spaced or literal.startswith(" ")))
        spaced = literal.endswith(" ") or (spaced and not literal)
        if match is None:
            break
        end = match.end()
        name, source = match.groups()
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


def soft_sources(parts: Sequence[TemplatePart]) -> tuple[str, ...]:
    """Return the sources whose slots a template names, in its order."""
    return tuple(part.value for part in parts if part.kind == "soft")


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
        self.parts = parts
        self.tokenizer = tokenizer
        self._full_stop = tokenizer(".")[:1]
        self._literals = [
            tokenizer(part.value if part.kind == "text" else "", part.spaced, plain=False) for part in parts
        ]
        self.sources = soft_sources(parts)
        fixed = sum(map(len, self._literals))
        fixed += len(tokenizer.prefix) + len(tokenizer.suffix) + sum(slots[source] for source in self.sources)
        self.room = max_tokens - fixed
        if self.room < 1:
            raise UserError(
                f"{where}: fixed text and slots take {fixed} of {max_tokens} tokens",
                "shorten the template, use fewer alignment.instructions, or raise prompt.max_tokens",
            )

    @property
    def start(self) -> int:
        """The index of the token at which the field `history` begins; the end of the text without one."""
        before = takewhile(lambda pair: not pair[0].is_history, zip(self.parts, self._literals, strict=True))
        return len(self.tokenizer.prefix) + sum(len(literal) for _, literal in before)

    def fill(self, fields: dict[str, Int32], inside: Mapping[str, Sequence[int]] = MappingProxyType({})) -> Encoded:
        """Fill the fields with token ids.

        Text that exceeds the room is cut from the end of the last field, never from slots or fixed text. A prompt
        without any text token gets a full stop: the readout needs a position.

        Args:
            fields: token ids by field.
            inside: marks inside the field `history`.
        """
        room = self.room - sum(map(len, inside.values()))
        excess = sum(map(len, fields.values())) - room
        cut = excess > 0
        kept = dict(fields)
        for name in reversed(fields):
            kept[name] = kept[name][: max(0, len(kept[name]) - max(0, excess))]
            excess -= len(fields[name]) - len(kept[name])
        tokens: list[Int32] = [self.tokenizer.prefix]
        marks: Marks = {}
        for part, literal in zip(self.parts, self._literals, strict=True):
            start = sum(map(len, tokens))
            own = kept.get(part.value, _NOTHING) if part.kind == "field" else literal
            if part.kind == "soft":
                marks[part.value] = start
            if part.is_history:
                marks |= {source: [start + min(mark, len(own)) for mark in each] for source, each in inside.items()}
            tokens.append(own)
        text = tokens if sum(map(len, tokens)) > len(self.tokenizer.prefix) else [*tokens, self._full_stop]
        return Encoded(np.concatenate([*text, self.tokenizer.suffix]).astype(np.int32), marks, cut)


@dataclass(frozen=True)
class LaidOut:
    """Prompts of a batch with their slots: ids and mask (B, T), slot positions (B, K).

    Where a prompt has fewer titles than others may have, the slots of the titles that it lacks are at the last
    position, which is padding in every prompt of the batch.
    """

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
    places = [_slot_positions(prompt, wanted) for prompt in prompts]
    own = [sum(map(len, groups.values())) for groups in places]
    lengths = [len(prompt.tokens_T) + count for prompt, count in zip(prompts, own, strict=True)]
    most = sum(wanted.values())
    width = max(lengths) + any(count < most for count in own)
    ids_BT = np.full((len(prompts), width), filler, np.int64)
    mask_BT = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    positions_BK = np.empty((len(prompts), most), np.int64)
    for row, (prompt, groups) in enumerate(zip(prompts, places, strict=True)):
        filled = ([*groups[source], *[width - 1] * (count - len(groups[source]))] for source, count in wanted.items())
        positions_BK[row] = list(chain.from_iterable(filled))
        is_text = np.arange(width) < lengths[row]
        is_text[positions_BK[row]] = False
        ids_BT[row, is_text] = prompt.tokens_T
    return LaidOut(ids_BT, mask_BT, positions_BK)


def _slot_positions(prompt: Encoded, wanted: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the positions of each source's slots among a prompt's tokens and slots."""
    missing = wanted.keys() - prompt.marks.keys()
    if missing:
        raise ValueError(f"a prompt has no place for the slots of {', '.join(sorted(missing))}")
    places: list[tuple[int, int, str, int]] = []
    for order, (source, marks) in enumerate(prompt.marks.items()):
        if isinstance(marks, list):
            places += [(mark, order, source, 1) for mark in marks[: wanted.get(source, 0)]]
        elif source in wanted:
            places.append((marks, order, source, wanted[source]))
    groups: dict[str, list[int]] = {source: [] for source in wanted}
    shift = 0
    for mark, _, source, count in sorted(places):
        groups[source] += range(mark + shift, mark + shift + count)
        shift += count
    return groups
