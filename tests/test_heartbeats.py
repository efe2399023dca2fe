"""What follows from the beats of ranks: who has failed, who is silent, who is behind."""

import pytest
from rarec.training.beats import Beat, Beats

from rarec.training import beats as module

EVERY, STALL, DEAD = 2.0, 60.0, 30.0


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when told to."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def heard(*beats: Beat) -> Beats:
    known = Beats(EVERY, STALL, DEAD)
    known.hear(beats)
    return known


def beat(number: int = 1, *, step: int = 7, calls: int = 0, waits: bool = False, ended: str | None = None) -> Beat:
    return Beat(number, [0, step, calls], "reading samples 448-511", 75.0, waits, ended, "node1")


def test_a_rank_that_failed_ends_all_with_what_it_said():
    assert heard(beat(), beat(ended="disk full")).verdict() == "rank 1 stopped at step 7: disk full"
    assert heard(beat(), beat(ended="")).verdict() == "", "it has left in good order"


def test_a_rank_whose_number_stands_still_is_dead(clock):
    known = heard(beat(1), beat(1))
    for number in range(2, 18):
        clock[0] += EVERY
        known.hear([beat(number), beat(1)])
    said = "no sign of life for 30 s from rank 1 on node1 (last at step 7: reading samples 448-511)"
    assert known.verdict() == said


def test_what_a_batch_system_suspends_does_not_die_of_it(clock):
    known = heard(beat(1), beat(1))
    clock[0] += 3600
    known.hear([beat(2), beat(1)])
    assert known.verdict() == ""
    assert known.clock == 2 * EVERY


def test_behind_is_the_one_least_in_progress_and_it_is_told_once():
    known = heard(beat(step=8), beat(step=7), beat(step=8))
    said = "no progress for 75 s: the others wait for rank 1 on node1 (last at step 7: reading samples 448-511)"
    assert known.stall() == said
    assert known.stall() == ""


def test_of_ranks_in_the_same_place_the_one_that_does_not_wait_is_behind():
    assert "wait for rank 1 on" in heard(beat(waits=True), beat(), beat(waits=True)).stall()
    assert "all ranks wait: rank 0 on" in heard(*[beat(waits=True)] * 2).stall()


def test_a_message_names_four_ranks_at_most():
    known = heard(*[beat()] * 9)
    assert known.named(range(9)).endswith(" and 5 more")
    assert known.named(range(9)).count("node1") == 4
