"""The two prompts of RA-Rec: a user's history, and an item's text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rarec.config.method import Prompt
from rarec.errors import UserError
from rarec.prompts.hybrid import (
    Encoded,
    HybridPrompt,
    Int32,
    Marks,
    TemplatePart,
    TextTokenizer,
    at_titles,
    parse_template,
    soft_sources,
)
from rarec.storage.artefacts import sha256_json

PIECES = 1 << 18
"""Titles whose tokens are kept, at most."""
FIELDS = {"user": ["history"], "item": ["title", "text"]}
"""Fields of each side's template."""


class PromptPair:
    """User and item prompts of a catalogue; the tokens of titles are kept.

    Args:
        config: the templates and their limits.
        tokenizer: of the language model.
        titles: of all items, by item row.
        texts: further text of all items, by item row; "" where there is none.
        slots: largest number of slots of each source, for the sides "user" and "item".
        context_length: of the language model, in tokens.
        kind: of the language model, `encoder` or `decoder`. By default an encoder gets the newest title first, a
            decoder the oldest.

    Attributes:
        cut: number of prompts of each side whose text was cut.
        user_prompt: the template of users.
        max_titles: most titles in a user's prompt; 0 if it has no history.

    Raises:
        UserError: a template has an unknown field or source, or leaves no room.
    """

    def __init__(
        self,
        config: Prompt,
        tokenizer: TextTokenizer,
        titles: Sequence[str],
        texts: Sequence[str],
        slots: Mapping[str, Mapping[str, int]],
        context_length: int,
        kind: str,
    ) -> None:
        self.config, self.tokenizer, self.titles, self.texts = config, tokenizer, titles, texts
        self.newest_first = config.order == "newest_first" or (config.order == "auto" and kind == "encoder")
        most = min(config.max_tokens or context_length, context_length)
        sources = list(slots["item"])
        start = tokenizer.adds_space
        user = parse_template(config.user, FIELDS["user"], sources, "prompt.user", start)
        item = parse_template(config.item, FIELDS["item"], sources, "prompt.item", start)
        self.user_prompt = HybridPrompt(user, tokenizer, slots["user"], most, "prompt.user")
        self._item = HybridPrompt(item, tokenizer, slots["item"], most, "prompt.item")
        self._spaced = {part.value: part.spaced for part in (*user, *item) if part.kind == "field"}
        self.max_titles = config.max_history if "history" in self._spaced else 0
        separator = tokenizer(config.separator.removesuffix(" "), plain=False)
        spaced = {True: self._spaced.get("history", False), False: config.separator.endswith(" ")}
        title_parts = {
            first: parse_template(config.title, ["title"], sources, "prompt.title", spaced[first]) for first in spaced
        }
        self._at_titles = [at_titles(source) for source in soft_sources(title_parts[True])]
        if self._at_titles and "history" not in self._spaced:
            raise UserError("prompt.title has slots, but prompt.user has no {history}", "write {history} there")
        tokens = TitleTokens(tokenizer, titles, separator, title_parts, config.max_title_tokens)
        self.title = lru_cache(PIECES)(tokens)  # not a method: it would refer to this object, and keep it
        self.cut = {"user": 0, "item": 0}

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """The sources whose slots each side's prompt has; those at titles by the name of `at_titles`."""
        return {"user": (*self.user_prompt.sources, *self._at_titles), "item": self._item.sources}

    @property
    def fingerprint(self) -> str:
        """The sha256 of the templates, their limits, the order of titles and the tokenizer."""
        prompt = {**self.config.model_dump(mode="json"), "order": self.newest_first}
        return sha256_json({"prompt": prompt, "tokenizer": self.tokenizer.fingerprint})

    def user(self, history: Sequence[int] | npt.NDArray[np.integer]) -> Encoded:
        """Return the prompt of a user.

        It has the newest `max_history` titles; where the model's context is too short, the oldest of them are left out.

        Args:
            history: item rows, oldest first.
        """
        wanted = [int(item) for item in history[::-1][: self.max_titles]]
        kept = self._newest_that_fit(wanted)
        encoded = self._filled(self._in_order(kept))
        if len(kept) < len(wanted):
            encoded = replace(encoded, cut=True)
        self.cut["user"] += encoded.cut
        return encoded

    def around_history(self) -> Encoded:
        """Return a user's prompt whose history, if the template has one, is a single token."""
        inside = {source: [0] for source in self._at_titles}
        return self.user_prompt.fill({"history": np.array([self.tokenizer.filler], np.int32)}, inside)

    def stored(self, tokens_T: Int32, marks: Marks, history: Int32) -> Encoded:
        """Return a user's prompt that was filled before, from what shards have of it."""
        counts = [len(places) for places in marks.values() if isinstance(places, list)]
        newest = [int(item) for item in history[::-1][: max(counts, default=0)]]
        return Encoded(tokens_T, marks, titles_H=np.array(self._in_order(newest), np.int32))

    def _in_order(self, newest: list[int]) -> list[int]:
        """Return items, newest first, in the order of the text."""
        return newest if self.newest_first else newest[::-1]

    def _filled(self, items: list[int]) -> Encoded:
        """Return the user prompt with these items in this order."""
        titles = [self.title(item, not position) for position, item in enumerate(items)]
        starts = np.cumsum([0, *(len(tokens_T) for tokens_T, _ in titles)]).tolist()
        inside = {
            source: [start + marks[index] for start, (_, marks) in zip(starts, titles, strict=False)]
            for index, source in enumerate(self._at_titles)
        }
        history = np.concatenate([self.tokenizer(""), *(tokens_T for tokens_T, _ in titles)])
        return replace(self.user_prompt.fill({"history": history}, inside), titles_H=np.array(items, np.int32))

    def item(self, item: int) -> Encoded:
        """Return the prompt of an item."""
        most = self.config.max_text_tokens
        title = self.tokenizer(self.titles[item], self._spaced.get("title", False), most)
        text = self.tokenizer(self.texts[item], self._spaced.get("text", False), most - len(title))
        fields = {"title": title, "text": text}
        encoded = self._item.fill({name: tokens for name, tokens in fields.items() if name in self._spaced})
        self.cut["item"] += encoded.cut
        return encoded

    def _newest_that_fit(self, wanted: list[int]) -> list[int]:
        """Return the items, newest first, that have room; at least the newest, whose title may be cut."""
        if not wanted:
            return []
        later, first = (
            np.array([len(self.title(item, is_first)[0]) for item in wanted]) + len(self._at_titles)
            for is_first in (False, True)
        )
        saved = later - first  # the first title needs no separator
        fit = np.cumsum(later) - (saved[0] if self.newest_first else saved) <= self.user_prompt.room
        return wanted[: max(int(fit.sum()), 1)]


@dataclass(frozen=True)
class TitleTokens:
    """An item's title as a history has it: its tokens, and where the slots at titles are inserted in them.

    Attributes:
        tokenizer: of the language model.
        titles: of the catalogue.
        separator: tokens before every title but the first of the text.
        parts: of the template, by whether it is the first.
        most: longest title, in tokens.
    """

    tokenizer: TextTokenizer
    titles: Sequence[str]
    separator: Int32
    parts: Mapping[bool, list[TemplatePart]]
    most: int | None

    def __call__(self, item: int, first: bool) -> tuple[Int32, list[int]]:
        """Return tokens and places of slots, given an item's row and whether it is the first of the text."""
        tokens = [self.tokenizer("") if first else self.separator]
        marks: list[int] = []
        for part in self.parts[first]:
            if part.kind == "soft":
                marks.append(sum(map(len, tokens)))
            elif part.kind == "text":
                tokens.append(self.tokenizer(part.value, part.spaced, plain=False))
            else:
                tokens.append(self.tokenizer(self.titles[item], part.spaced, self.most))
        return np.concatenate(tokens), marks


def slot_names(config: Prompt, side: str, sources: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the slots in one side's prompt, `user` or `item`; those at titles as `at_titles` names them.

    Raises:
        UserError: a template has an unknown field or source, or an unmatched brace.
    """
    names = soft_sources(parse_template(getattr(config, side), FIELDS[side], sources, f"prompt.{side}"))
    if side == "item":
        return names
    title = parse_template(config.title, ["title"], sources, "prompt.title")
    return names + tuple(map(at_titles, soft_sources(title)))
