"""Words of titles, and which interactions share one with what their user met before.

Shape letters: N items, W word occurrences over all items, E word occurrences over interactions, I interactions.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


class _Letters(dict[int, str]):
    """For `str.translate`: letters, marks, digits and apostrophes as they are, everything else a space."""

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
"""English function words: to share one of these says nothing about two titles (ours)."""


def split_words(title: str) -> list[str]:
    """The distinct words of a title, case-folded, without punctuation and stop words, in order of appearance.

    A word is a run of letters and digits of any script, apostrophes inside it included; a script that puts nothing
    between its words gives whole phrases.
    """
    folded = unicodedata.normalize("NFKC", title).casefold().translate(_LETTERS)
    distinct = dict.fromkeys(word.strip("'") for word in folded.split())
    return [word for word in distinct if word and word not in STOP_WORDS]


@dataclass(frozen=True)
class TitleWords:
    """Every item's words as numbers, one item after another.

    Attributes:
        starts_N: where an item's words begin in `words_W`.
        counts_N: how many it has.
        words_W: word numbers.
        total: distinct words.
    """

    starts_N: Int64
    counts_N: Int64
    words_W: Int64
    total: int

    @classmethod
    def of(cls, titles: Sequence[str], untitled: str) -> "TitleWords":
        """Split titles; the text that stands for a missing one has no words."""
        numbers: dict[str, int] = {}
        split = [[] if title == untitled else split_words(title) for title in titles]
        words_W = np.array([numbers.setdefault(word, len(numbers)) for item in split for word in item], np.int64)
        counts_N = np.array([len(item) for item in split], np.int64)
        return cls(np.cumsum(counts_N) - counts_N, counts_N, words_W, len(numbers))

    def shared_with_earlier(self, user_rows_I: Int64, item_rows_I: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Whether an interaction's title has a word that an earlier title of the same user has.

        Args:
            user_rows_I: ascending.
            item_rows_I: in each user's own order.
        """
        counts_I = self.counts_N[item_rows_I]
        interactions_E = np.repeat(np.arange(len(item_rows_I)), counts_I)
        within_E = np.arange(len(interactions_E)) - np.repeat(np.cumsum(counts_I) - counts_I, counts_I)
        words_E = self.words_W[self.starts_N[item_rows_I[interactions_E]] + within_E]
        keys_E = user_rows_I[interactions_E] * self.total + words_E
        # np.unique gives the first occurrence of each user's word: any later one shares it
        _, first, of_E = np.unique(keys_E, return_index=True, return_inverse=True)
        repeats_E = interactions_E[first][of_E] < interactions_E
        shared: npt.NDArray[np.bool_] = np.bincount(interactions_E[repeats_E], minlength=len(item_rows_I)) > 0
        return shared
