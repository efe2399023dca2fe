"""The two prompts of RA-Rec over a catalogue: a user's history, and an item's own text."""

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
    """User and item prompts over the titles of a catalogue, each title tokenised once.

    Args:
        config: the templates and their limits.
        tokenizer: of the language model.
        titles: of the catalogue, by item row.
        texts: further text of the items, by item row; "" where there is none.
        slots: slots of each source, for the side "user" and "item".
        context_length: of the language model, in tokens.
        kind: of the language model, `encoder` or `decoder`: which end of the history is written first by default.

    Raises:
        UserError: a template names an unknown field or source, or leaves no room.
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
        """The sources whose slots each side's template names."""
        return {"user": self._user.sources, "item": self._item.sources}

    @property
    def fingerprint(self) -> str:
        """sha256 of the templates, their limits, the order of titles and the tokenizer."""
        prompt = {**self.config.model_dump(mode="json"), "order": self.newest_first}
        return sha256_json({"prompt": prompt, "tokenizer": self.tokenizer.fingerprint})

    def user(self, history: Sequence[int] | npt.NDArray[np.integer]) -> Encoded:
        """The prompt of a user with this history (item rows, oldest first).

        The newest `max_history` titles are written; where the model's context is too short the oldest of them go.
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
        """The prompt of an item."""
        most = self.config.max_text_tokens
        title = self.tokenizer(self.titles[item], self._spaced.get("title", False), most)
        text = self.tokenizer(self.texts[item], self._spaced.get("text", False), most - len(title))
        encoded = self._item.fill(
            **{name: tokens for name, tokens in (("title", title), ("text", text)) if name in self._spaced}
        )
        self.cut["item"] += encoded.cut
        return encoded

    def _newest_that_fit(self, wanted: list[int]) -> list[int]:
        """As many of these items, newest first, as have room; at least the newest, whose title may be cut."""
        if not wanted:
            return []
        later, first = (np.array([len(self._title(item, start)) for item in wanted]) for start in (False, True))
        saved = later - first  # the title that is written first needs no separator
        fit = np.cumsum(later) - (saved[0] if self.newest_first else saved) <= self._user.room
        return wanted[: max(int(fit.sum()), 1)]

    def _title(self, item: int, first: bool) -> Int32:
        """A title inside a history: the first as the template has it, a later one behind the separator."""
        cache = self._first if first else self._later
        if item not in cache:
            spaced = self._spaced.get("history", False) if first else self._separator_spaced
            tokens = self.tokenizer(self.titles[item], spaced, self.config.max_title_tokens)
            cache[item] = tokens if first else np.concatenate([self._separator, tokens])
        return cache[item]
