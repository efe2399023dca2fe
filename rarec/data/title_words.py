"""Split titles into words, and find interactions that share a word with the user's earlier titles.

Shape letters: N items, W word occurrences over all items, E word occurrences over interactions, I interactions.
"""

import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rarec.data.dataset import Int64


class _Letters(dict[int, str]):
    """Table for `str.translate`: keeps letters, marks, digits and apostrophes, and maps the rest to spaces."""

    def __missing__(self, code: int) -> str:
        character = "'" if chr(code) == "’" else chr(code)
        kept = character == "'" or unicodedata.category(character)[0] in "LMN"
        return self.setdefault(code, character if kept else " ")


_LETTERS = _Letters()

_STOP = """
a about above after all also am an and any are as at be been before being below between both but by can could
did do does doing down during each for from further had has have having he her here hers him his how i if in
into is it its just me more most my no nor not now of off on once only or other our ours out over own same she
should so some such than that the their theirs them then there these they this those through to too under
until up very was we were what when where which while who whom why will with would you your yours
"""
STOP_WORDS = frozenset(_STOP.split())
"""English function words, which say nothing about the similarity of two titles (our list)."""


def split_words(title: str) -> list[str]:
    """Return the distinct words of a title in order of appearance: case-folded, no punctuation, no stop words.

    A word is a run of letters and digits of any script, with apostrophes inside it; in a script without word separators
    whole phrases are returned.
    """
    folded = unicodedata.normalize("NFKC", title).casefold().translate(_LETTERS)
    distinct = dict.fromkeys(word.strip("'") for word in folded.split())
    return [word for word in distinct if word and word not in STOP_WORDS]


@dataclass(frozen=True)
class TitleWords:
    """The words of all items as integers, stored item after item.

    Attributes:
        starts_N: index of an item's first word in `words_W`.
        counts_N: number of words of each item.
        words_W: word numbers.
        total: number of distinct words.
    """

    starts_N: Int64
    counts_N: Int64
    words_W: Int64
    total: int

    @classmethod
    def of(cls, titles: Iterable[str], untitled: str) -> "TitleWords":
        """Split titles into words; the placeholder for a missing title has none."""
        numbers: dict[str, int] = {}
        words, counts = array("q"), array("q")  # a list of objects would take ten times as much
        for title in titles:
            own = [] if title == untitled else split_words(title)
            words.extend(numbers.setdefault(word, len(numbers)) for word in own)
            counts.append(len(own))
        counts_N = np.array(counts, np.int64)
        return cls(np.cumsum(counts_N) - counts_N, counts_N, np.array(words, np.int64), len(numbers))

    def shared_with_earlier(
        self, user_rows_I: npt.NDArray[np.integer], item_rows_I: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.bool_]:
        """Return (I,) True where a title shares a word with an earlier title of the same user.

        Args:
            user_rows_I: ascending user rows.
            item_rows_I: item rows, in each user's order.
        """
        counts_I = self.counts_N[item_rows_I]
        interactions_E = np.repeat(np.arange(len(item_rows_I)), counts_I)
        within_E = np.arange(len(interactions_E)) - np.repeat(np.cumsum(counts_I) - counts_I, counts_I)
        words_E = self.words_W[self.starts_N[item_rows_I[interactions_E]] + within_E]
        keys_E = user_rows_I[interactions_E].astype(np.int64) * self.total + words_E
        # np.unique returns the first occurrence of each (user, word); later ones share it
        _, first, inverse_E = np.unique(keys_E, return_index=True, return_inverse=True)
        repeats_E = interactions_E[first][inverse_E] < interactions_E
        shared: npt.NDArray[np.bool_] = np.bincount(interactions_E[repeats_E], minlength=len(item_rows_I)) > 0
        return shared
