"""Conclusions from heartbeats: which rank has failed, is silent, or is behind."""

import pytest

from rarec.distributed import watchdog
from rarec.distributed.watchdog import Heartbeat, Heartbeats

EVERY, STALL, DEAD = 2.0, 60.0, 30.0


@pytest.fixture
def clock(monkeypatch):
    """Seconds, advanced by the test."""
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    return now


def followed(*beats: Heartbeat) -> Heartbeats:
    known = Heartbeats(EVERY, STALL, DEAD)
    known.update(beats)
    return known


def heartbeat(
    number: int = 1, *, step: int = 7, calls: int = 0, waits: bool = False, ended: str | None = None
) -> Heartbeat:
    return Heartbeat(number, [0, step, calls], "reading samples 448-511", 75.0, waits, ended, "node1")


def test_a_rank_that_failed_ends_all_with_what_it_said():
    assert followed(heartbeat(), heartbeat(ended="disk full")).verdict() == "rank 1 stopped at step 7: disk full"
    assert followed(heartbeat(), heartbeat(ended="")).verdict() == "", "it has left in good order"


def test_a_rank_whose_number_stands_still_is_dead(clock):
    known = followed(heartbeat(1), heartbeat(1))
    for number in range(2, 18):
        clock[0] += EVERY
        known.update([heartbeat(number), heartbeat(1)])
    said = "no sign of life for 30 s from rank 1 on node1 (last at step 7: reading samples 448-511)"
    assert known.verdict() == said


def test_what_a_batch_system_suspends_does_not_die_of_it(clock):
    known = followed(heartbeat(1), heartbeat(1))
    clock[0] += 3600
    known.update([heartbeat(2), heartbeat(1)])
    assert known.verdict() == ""
    assert known.clock == 2 * EVERY


def test_behind_is_the_one_least_in_progress_and_it_is_told_once():
    known = followed(heartbeat(step=8), heartbeat(step=7), heartbeat(step=8))
    said = "no progress for 75 s: the others wait for rank 1 on node1 (last at step 7: reading samples 448-511)"
    assert known.stall() == said
    assert known.stall() == ""


def test_of_ranks_in_the_same_place_the_one_that_does_not_wait_is_behind():
    assert "wait for rank 1 on" in followed(heartbeat(waits=True), heartbeat(), heartbeat(waits=True)).stall()
    assert "all ranks wait: rank 0 on" in followed(*[heartbeat(waits=True)] * 2).stall()


def test_a_message_names_four_ranks_at_most():
    known = followed(*[heartbeat()] * 9)
    assert known.describe(range(9)).endswith(" and 5 more")
    assert known.describe(range(9)).count("node1") == 4
