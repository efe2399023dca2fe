"""What ranks tell of themselves, beat by beat, and what follows from it: who is dead, who has failed, who is behind."""

import time
from collections.abc import Sequence
from typing import NamedTuple

_NAMED = 4
"""Ranks that a message names."""


class Beat(NamedTuple):
    """What a rank tells of itself."""

    number: int  # that it grows shows life; clocks of two machines are never compared
    place: list[int]  # how often steps began anew, the step, calls of `at` in it: who has the least is behind
    doing: str
    seconds: float  # in that place
    waits: bool  # for other ranks, in a collective
    ended: str | None  # None under way, "" when it left in good order, else what was wrong
    host: str


class Beats:
    """The last beat of each rank that is listened to.

    Args:
        every: seconds between two beats of a rank.
        stall: seconds without progress that are worth a word.
        dead: seconds without a sign of life after which a rank is dead.

    Attributes:
        last: by rank.
        clock: seconds that were listened; it stands while a batch system suspends the job.
    """

    def __init__(self, every: float, stall: float, dead: float) -> None:
        self._every, self._stall, self._dead = every, stall, dead
        self.last: dict[int, Beat] = {}
        self.clock, self._looked = 0.0, time.monotonic()
        self._heard: dict[int, float] = {}
        self._told: list[int] = []

    def hear(self, beats: Sequence[Beat]) -> None:
        """Of the first so many ranks."""
        now = time.monotonic()
        self.clock += min(now - self._looked, 2 * self._every)
        self._looked = now
        for rank, beat in enumerate(beats):
            if rank not in self.last or self.last[rank].number != beat.number:
                self._heard[rank] = self.clock
            self.last[rank] = beat

    def verdict(self) -> str:
        """Why all must end; empty where they need not."""
        for rank, beat in self.last.items():
            if beat.ended:
                return f"rank {rank} stopped at step {beat.place[1]}: {beat.ended}"
        if self._silent(self._dead):  # with it, those of the same machine
            return f"no sign of life for {self._dead:.0f} s from {self.named(self._silent(self._dead / 2))}"
        return ""

    def stall(self) -> str:
        """For whom the others wait, told once for each place; empty where all goes on.

        Behind are the ranks least in progress; among those, the ones that do not wait themselves.
        """
        under_way = {rank: beat for rank, beat in self.last.items() if beat.ended is None}
        place, waits = min((beat.place, beat.waits) for beat in under_way.values())
        behind = [rank for rank, beat in under_way.items() if (beat.place, beat.waits) == (place, waits)]
        seconds = min(under_way[rank].seconds for rank in behind)
        if seconds < self._stall or place == self._told:
            return ""
        self._told = place
        others = "all ranks wait:" if len(behind) == len(under_way) else "the others wait for"
        return f"no progress for {seconds:.0f} s: {others} {self.named(behind)}"

    def needed(self) -> bool:
        """Whether a rank is under way, and not long silent."""
        silent = self._silent(self._dead / 2)
        return any(beat.ended is None and rank not in silent for rank, beat in self.last.items())

    def named(self, ranks: Sequence[int]) -> str:
        """In words: which, where, and at what."""
        beats = [(rank, self.last[rank]) for rank in ranks[:_NAMED]]
        each = [f"rank {rank} on {beat.host} (last at step {beat.place[1]}: {beat.doing})" for rank, beat in beats]
        return ", ".join(each) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")

    def _silent(self, seconds: float) -> list[int]:
        under_way = [rank for rank, beat in self.last.items() if beat.ended is None]
        return [rank for rank in under_way if self.clock - self._heard[rank] > seconds]
