"""What a service asks of a bundle, whatever runs its model."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from rarec.bundle.recommended import Explanation, History, Id, Place, Recommended, Request


class Answer(NamedTuple):
    """What one user gets: items, best first, and how many ids of the history the catalogue lacks."""

    items: list[Recommended]
    unknown: int


class NotOffered(Exception):
    """This backend cannot do it; the text says which can."""


class Engine(Protocol):
    """A bundle's model. Calls do not overlap."""

    @property
    def row(self) -> str:
        """Return the name of the row that is served."""

    @property
    def version(self) -> str:
        """Return the hash of the bundle's manifest."""

    @property
    def ids(self) -> Sequence[Id]:
        """Return the ids of the catalogue."""

    @property
    def titles(self) -> Sequence[str]:
        """Return the titles of the catalogue."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Recommend. Raises `UserError` where a request names what is not there."""

    def vectors(self, histories: Sequence[History]) -> list[Any]:
        """Return query vectors, (B, F) or (B, K, F), as lists."""

    def similar(self, item: Id, k: int) -> list[Recommended]:
        """Return the items most like one."""

    def explain(self, history: History, item: Id) -> Explanation:
        """Return what speaks for an item."""

    def compare(self, history: History, k: int) -> dict[str, list[Recommended]]:
        """Return the best new items by each part of the row alone, by the part's title."""

    def sample(self) -> list[tuple[Id, str]]:
        """Return the history of a user who might be, ids and titles."""

    def place(self, history: History, title: str, text: str, k: int) -> Place:
        """Return where a new item would stand."""
