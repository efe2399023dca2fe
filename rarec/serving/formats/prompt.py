"""The user's prompt as token ids with its slots in place, so that a client needs no tokenizer."""

from collections.abc import Iterable, Mapping
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
    wanted = {name: count for name, count in slots.items() if count}
    first = dict(zip(wanted, np.cumsum([0, *wanted.values()]).tolist(), strict=False))
    frame, empty = prompts.frame(), prompts.user([])
    tokens, start, filler = frame.encoded.tokens_T.tolist(), frame.start, prompts.tokenizer.filler
    marks = {name: mark for name, mark in frame.encoded.marks.items() if name in wanted}
    own = {name: (mark, range(first[name], first[name] + wanted[name])) for name, mark in marks.items()}
    before = {name: of for name, of in own.items() if isinstance(of[0], int) and of[0] <= start}
    after = {name: (of[0] - start - 1, of[1]) for name, of in own.items() if isinstance(of[0], int) and of[0] > start}
    alone = {name: (mark, own[name][1]) for name, mark in empty.marks.items() if name in {**before, **after}}
    parts: dict[str, tuple[list[int], dict[str, tuple[Any, range]]]] = {
        "before": (tokens[:start], before),
        "after": (tokens[start + 1 :] if frame.titles else tokens[start:], after),
        "empty": (empty.tokens_T.tolist(), alone),
    }
    facts: dict[str, Any] = {"bare_after": _bare_after(prompts, parts["after"], start)}
    for name, (text, groups) in parts.items():
        facts[name], facts[f"{name}_slots"] = _with_slots(text, groups.values(), filler)
    return facts | {
        "titles_first": [first[name] for name, mark in marks.items() if isinstance(mark, list)],
        "count": sum(wanted.values()),
        "most": frame.titles,
        "room": frame.room,
        "newest_first": prompts.newest_first,
    }


def _bare_after(prompts: PromptPair, after: tuple[list[int], dict[str, tuple[Any, range]]], start: int) -> list[int]:
    """Return `after` with what stands for the text of a prompt that has none."""
    tokenizer, (tokens, groups) = prompts.tokenizer, after
    if start > len(tokenizer.prefix) or len(tokens) > len(tokenizer.suffix):  # the template has words
        return _with_slots(tokens, groups.values(), tokenizer.filler)[0]
    return _with_slots([*tokenizer(".")[:1].tolist(), *tokens], groups.values(), tokenizer.filler)[0]


def _with_slots(
    tokens: list[int], groups: Iterable[tuple[Any, Iterable[int]]], filler: int
) -> tuple[list[int], list[list[int]]]:
    """Insert fillers for groups of slots, each before the token at its mark; return (place among all slots, index)."""
    found, text = list[list[int]](), list[int]()
    for at, token in enumerate([*tokens, None]):
        for mark, places in groups:
            if mark == at:
                found += [[place, len(text) + n] for n, place in enumerate(places)]
                text += [filler] * len(list(places))
        if token is not None:
            text.append(token)
    return text, found


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
            groups = [(min(mark, len(kept)), [place]) for place, mark in enumerate(at)]
            text, found = _with_slots(kept, groups, prompts.tokenizer.filler)
            columns[name].append(text)
            columns[f"{name}_slots"].append([index for _, index in sorted(found)])
    pq.write_table(pa.table({name: pa.array(of, _LISTS) for name, of in columns.items()}), path, compression="zstd")
