"""Hybrid prompts: a template of hard text and named soft slots, filled and tokenised (docs/method.md, section 1).

Shape letters: T tokens of a prompt, K slots, B batch.

A filled prompt (`Encoded`) keeps its text tokens and, for each source, the place where that source's slots go. How
many slots stand there is the model's business (`lay_out`), so one tokenised prompt serves every variant, and without slots
it is the text-only prompt.
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
    """A filled prompt: its text tokens (T,), where each source's slots go among them, and whether text was cut.

    Sources at one place stand there in the order of `marks`.
    """

    tokens_T: Int32
    marks: dict[str, int]
    cut: bool = False


@dataclass(frozen=True)
class _Part:
    """A piece of a template: literal text, a field, or a source's slots. `spaced`: a space stands before it."""

    kind: str
    value: str
    spaced: bool


def parse_template(
    template: str, fields: Sequence[str], sources: Sequence[str], where: str, spaced: bool = False
) -> list[_Part]:
    """Split a template into its parts.

    A space before a field or a word belongs to what follows it, as byte-pair tokenizers have it. It skips over slots,
    which are no text.

    Args:
        template: from the configuration; white space around it is dropped.
        fields: the names that it may use.
        sources: those that it may use behind `soft:`.
        where: the field of the configuration, for messages.
        spaced: whether a space stands before the whole.

    Raises:
        UserError: an unknown field or source, one that is used twice, or a brace without its partner.
    """
    parts: list[_Part] = []
    template, at, seen = template.strip(), 0, set()
    for match in [*_PART.finditer(template), None]:
        literal = template[at : match.start() if match else len(template)]
        if set(literal) & set("{}"):
            raise UserError(f"{where}: a brace without its partner in {literal.strip()!r}", "close it or leave it out")
        text = literal.removeprefix(" ").removesuffix(" ")
        if text:
            parts.append(_Part("text", text, spaced or literal.startswith(" ")))
        spaced = literal.endswith(" ") or (spaced and not literal)
        if match is None:
            break
        at, (name, source) = match.end(), match.groups()
        known = name == "soft" and source in sources if source or name == "soft" else name in fields
        if not known:
            names = [f"{{{field}}}" for field in fields] + [f"{{soft:{source}}}" for source in sources]
            raise UserError(f"{where}: unknown field {match[0]}", f"it may use {', '.join(names)}")
        if match[0] in seen:
            raise UserError(f"{where}: {match[0]} is used twice", "keep one of them")
        seen.add(match[0])
        parts.append(_Part("soft", source, spaced) if source else _Part("field", name, spaced))
        spaced = spaced and bool(source)
    return parts


class HybridPrompt:
    """One side's template over a tokenizer.

    Args:
        parts: from `parse_template`.
        tokenizer: text to token ids.
        slots: how many slots each source may take, to be reserved when a prompt is cut to `max_tokens`.
        max_tokens: of a whole prompt, slots included.
        where: the field of the configuration, for messages.

    Raises:
        UserError: the fixed text and the slots alone leave no room for anything else.
    """

    def __init__(
        self, parts: list[_Part], tokenizer: TextTokenizer, slots: Mapping[str, int], max_tokens: int, where: str
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
                f"{where}: fixed text and slots take {fixed} tokens of the {max_tokens} there are",
                "shorten the template, use fewer alignment.instructions, or raise prompt.max_tokens",
            )

    def fill(self, **fields: Int32) -> Encoded:
        """Fill the fields with token ids.

        What is beyond the room is cut from the end of the last field, never from slots or fixed text. Where no text is
        left, a full stop stands there: something must be read out.
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
