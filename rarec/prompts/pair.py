"""The two prompts of RA-Rec: a user's history, and an item's text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from rarec.artefacts import sha256_json
from rarec.config.method import Prompt
from rarec.prompts.hybrid import Encoded, HybridPrompt, parse_template
from rarec.prompts.tokens import TextTokenizer

Int32 = npt.NDArray[np.int32]


class PromptPair:
    """User and item prompts of a catalogue; each title is tokenised once.

    Args:
        config: the templates and their limits.
        tokenizer: of the language model.
        titles: of all items, by item row.
        texts: further text of all items, by item row; "" where there is none.
        slots: number of slots of each source, for the sides "user" and "item".
        context_length: of the language model, in tokens.
        kind: of the language model, `encoder` or `decoder`. By default an encoder gets the newest title first, a
            decoder the oldest.

    Attributes:
        cut: number of prompts of each side whose text was cut.

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
        sources = list(slots["user"])
        start = tokenizer.adds_space
        user = parse_template(config.user, ["history"], sources, "prompt.user", start)
        item = parse_template(config.item, ["title", "text"], sources, "prompt.item", start)
        self._user = HybridPrompt(user, tokenizer, slots["user"], most, "prompt.user")
        self._item = HybridPrompt(item, tokenizer, slots["item"], most, "prompt.item")
        self._spaced = {part.value: part.spaced for part in (*user, *item) if part.kind == "field"}
        self._separator = tokenizer(config.separator.removesuffix(" "), plain=False)
        self._separator_spaced = config.separator.endswith(" ")
        self._first: dict[int, Int32] = {}
        self._later: dict[int, Int32] = {}
        self.cut = {"user": 0, "item": 0}

    @property
    def sources(self) -> dict[str, tuple[str, ...]]:
        """The sources whose slots each side's template has."""
        return {"user": self._user.sources, "item": self._item.sources}

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
        written = self.config.max_history if "history" in self._spaced else 0
        wanted = [int(item) for item in history[::-1][:written]]
        kept = self._newest_that_fit(wanted)
        in_order = kept if self.newest_first else kept[::-1]
        pieces = [self._title(item, first=at == 0) for at, item in enumerate(in_order)]
        encoded = self._user.fill(history=np.concatenate(pieces)) if pieces else self._user.fill()
        if len(kept) < len(wanted):
            encoded = replace(encoded, cut=True)
        self.cut["user"] += encoded.cut
        return encoded

    def item(self, item: int) -> Encoded:
        """Return the prompt of an item."""
        most = self.config.max_text_tokens
        title = self.tokenizer(self.titles[item], self._spaced.get("title", False), most)
        text = self.tokenizer(self.texts[item], self._spaced.get("text", False), most - len(title))
        encoded = self._item.fill(
            **{name: tokens for name, tokens in (("title", title), ("text", text)) if name in self._spaced}
        )
        self.cut["item"] += encoded.cut
        return encoded

    def _newest_that_fit(self, wanted: list[int]) -> list[int]:
        """Return the items, newest first, that have room; at least the newest, whose title may be cut."""
        if not wanted:
            return []
        later, first = (np.array([len(self._title(item, start)) for item in wanted]) for start in (False, True))
        saved = later - first  # the first title needs no separator
        fit = np.cumsum(later) - (saved[0] if self.newest_first else saved) <= self._user.room
        return wanted[: max(int(fit.sum()), 1)]

    def _title(self, item: int, first: bool) -> Int32:
        """Return a title's tokens inside a history; all but the first title start with the separator."""
        cache = self._first if first else self._later
        if item not in cache:
            spaced = self._spaced.get("history", False) if first else self._separator_spaced
            tokens = self.tokenizer(self.titles[item], spaced, self.config.max_title_tokens)
            cache[item] = tokens if first else np.concatenate([self._separator, tokens])
        return cache[item]
