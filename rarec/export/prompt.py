"""The user's prompt as token ids with its slots in place, so that a client needs no tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.prompts import AT_TITLES, Marks, PromptPair

TITLES = "titles.parquet"
NO_PROMPT = {"empty": [], "empty_slots": [], "count": 0, "most": 0}
"""Of a row without a language model."""
_LISTS = pa.list_(pa.int32())


@dataclass(frozen=True)
class _Stretch:
    """A part of a prompt that is the same for all users.

    Attributes:
        tokens: its token ids.
        groups: of each source with slots here, the token before which they stand, and their places among all slots.
    """

    tokens: list[int]
    groups: list[tuple[int, range]]

    def with_slots(self, filler: int) -> tuple[list[int], list[list[int]]]:
        """Return the token ids with fillers at slots, and of each slot its place among all slots and its index here."""
        found, text = list[list[int]](), list[int]()
        for at in range(len(self.tokens) + 1):
            for mark, places in self.groups:
                if mark == at:
                    found += [[place, len(text) + n] for n, place in enumerate(places)]
                    text += [filler] * len(places)
            text += self.tokens[at : at + 1]
        return text, found


def prompt_facts(prompts: PromptPair, slots: Mapping[str, int]) -> dict[str, Any]:
    """Return how a client builds a user's prompt.

    | field | meaning |
    | --- | --- |
    | `before`, `after`, `empty` | token ids around the history, and of a prompt without history; fillers at slots |
    | `bare_after` | `after` where no title has a word, and a full stop stands for the text |
    | `before_slots`, `after_slots`, `empty_slots` | pairs: place of a slot among all slots, its index there |
    | `titles_first` | place of the first slot at titles, for each source that has them |
    | `count`, `most`, `room` | number of slots; most titles; most tokens of a history, slots included |
    | `newest_first` | order of the titles |

    Args:
        prompts: of the bundle.
        slots: number of slots of each source in the user's prompt, as the model takes them.
    """
    places, frame, filler = _places(slots), prompts.frame(), prompts.tokenizer.filler
    stretches = _stretches(prompts, places)
    facts: dict[str, Any] = {}
    for name, stretch in stretches.items():
        facts[name], facts[f"{name}_slots"] = stretch.with_slots(filler)
    facts["bare_after"] = _bare(prompts, stretches["after"]).with_slots(filler)[0]
    at_titles = [name for name, mark in frame.encoded.marks.items() if name in places and isinstance(mark, list)]
    return facts | {
        "titles_first": [places[name].start for name in at_titles],
        "count": sum(map(len, places.values())),
        "most": frame.titles,
        "room": frame.room,
        "newest_first": prompts.newest_first,
    }


def _places(slots: Mapping[str, int]) -> dict[str, range]:
    """Return the places of each source's slots among all slots."""
    ends = np.cumsum(list(slots.values())).tolist()
    return {name: range(end - slots[name], end) for name, end in zip(slots, ends, strict=True) if slots[name]}


def _stretches(prompts: PromptPair, places: Mapping[str, range]) -> dict[str, _Stretch]:
    """Return what stands before and after the history, and the prompt without history."""
    frame, empty = prompts.frame(), prompts.user([])
    tokens, start = frame.encoded.tokens_T.tolist(), frame.start
    marks = {name: mark for name, mark in frame.encoded.marks.items() if name in places and isinstance(mark, int)}
    before = [(mark, places[name]) for name, mark in marks.items() if mark <= start]
    after = [(mark - start - 1, places[name]) for name, mark in marks.items() if mark > start]
    alone = [(mark, places[name]) for name, mark in empty.marks.items() if name in marks and isinstance(mark, int)]
    return {
        "before": _Stretch(tokens[:start], before),
        "after": _Stretch(tokens[start + bool(frame.titles) :], after),  # one token stands for the titles
        "empty": _Stretch(empty.tokens_T.tolist(), alone),
    }


def _bare(prompts: PromptPair, after: _Stretch) -> _Stretch:
    """Return `after` with what stands for the text of a prompt that has none."""
    tokenizer = prompts.tokenizer
    if prompts.frame().start > len(tokenizer.prefix) or len(after.tokens) > len(tokenizer.suffix):
        return after  # the template has words
    return _Stretch([*tokenizer(".")[:1].tolist(), *after.tokens], after.groups)


def write_titles(prompts: PromptPair, marks: Marks, path: Path) -> None:
    """Write the tokens of every item's title, as the `first` of a history and as a `later` one.

    Beside them, `first_slots` and `later_slots` are the indices of the slots there, for each source that has slots at
    titles. A title that is longer than the room is cut, as it is in a prompt.

    Args:
        prompts: of the bundle.
        marks: of a prompt with slots, by which sources with slots at titles are known.
        path: to write.
    """
    with_slots, frame = any(name.endswith(AT_TITLES) for name in marks), prompts.frame()
    columns: dict[str, list[list[int]]] = {name: [] for name in ("first", "first_slots", "later", "later_slots")}
    for item in range(len(prompts.titles)):
        for name, is_first in (("first", True), ("later", False)):
            tokens, at = prompts.title(item, is_first)
            at = at if with_slots else []
            kept = tokens.tolist()[: max(0, frame.room - len(at))]
            groups = [(min(mark, len(kept)), range(place, place + 1)) for place, mark in enumerate(at)]
            text, found = _Stretch(kept, groups).with_slots(prompts.tokenizer.filler)
            columns[name].append(text)
            columns[f"{name}_slots"].append([index for _, index in sorted(found)])
    pq.write_table(pa.table({name: pa.array(of, _LISTS) for name, of in columns.items()}), path, compression="zstd")
