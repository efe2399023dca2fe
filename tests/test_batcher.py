"""The queue of a service is bounded by time: what is late, left or hopeless costs nothing, and goodput stays."""

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from rarec.bundle.recommended import Request
from rarec.errors import UserError
from rarec.serve.batcher import SHARE, Batcher, Busy, Closed, Late
from tests.batching import Slow, Timed


def soon(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def wait_for(what: Any) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def paced(seconds: float, most: int = 4) -> tuple[Batcher, Timed]:
    """Return a batcher that knows how long a user takes."""
    engine = Timed(seconds)
    batcher = Batcher(engine, most=most, window=0.0)
    batcher.answer([Request(["first"])], soon()).result(10)
    wait_for(lambda: batcher.idle)
    engine.passes.clear()
    return batcher, engine


def test_requests_that_wait_share_a_pass_and_a_wrong_one_is_alone_with_its_error():
    engine = Slow()
    batcher = Batcher(engine, most=4, window=0.0)
    first = batcher.answer([Request(["first"])], soon())
    wait_for(lambda: not batcher.waiting)
    others = [batcher.answer([Request([str(at)])], soon()) for at in range(3)]
    wrong = batcher.answer([Request(["bad"])], soon())
    last = batcher.call(lambda: "alone", soon())
    engine.go.set()
    assert first.result(10)[0].items[0].item == "first"
    assert [one.result(10)[0].items[0].item for one in others] == ["0", "1", "2"]
    with pytest.raises(UserError, match="bad"):
        wrong.result(10)
    assert last.result(10) == "alone"
    assert engine.passes[:2] == [[["first"]], [["0"], ["1"], ["2"], ["bad"]]]
    batcher.close()
    with pytest.raises(Closed):
        batcher.answer([Request(["late"])], soon())


@pytest.mark.alone
def test_what_cannot_be_answered_in_time_by_the_measured_pace_is_refused_with_the_time_that_the_rest_takes():
    batcher, _ = paced(0.1)
    timeout = 1.0 / SHARE  # one second of work may wait
    kept = []
    while not (seconds := batcher.refusal(1, timeout)):
        kept.append(batcher.answer([Request(["a"])], soon(timeout)))
    assert 8 <= len(kept) <= 11
    with pytest.raises(Busy) as refused:
        batcher.answer([Request(["b"])], soon(timeout))
    assert refused.value.seconds == pytest.approx(seconds, abs=0.1) == pytest.approx(1.0, abs=0.25)
    with pytest.raises(Busy):
        batcher.call(lambda: None, soon(timeout), users=8)
    assert [len(one.result(10)) for one in kept] == [1] * len(kept), "what was taken is answered"
    batcher.close()


def test_an_idle_batcher_takes_whatever_comes():
    batcher, _ = paced(0.1)
    assert len(batcher.answer([Request(["a"])] * 8, soon(0.5)).result(10)) == 8
    batcher.close()


def test_what_has_waited_too_long_is_not_computed_and_what_comes_after_it_is():
    batcher, engine = paced(0.02, most=1)
    running = batcher.call(lambda: time.sleep(0.5), soon())  # nobody could have known
    wait_for(lambda: not batcher.waiting)
    late, good = (batcher.answer([Request([name])], soon(left)) for name, left in (("late", 0.3), ("good", 5.0)))
    with pytest.raises(Late):
        late.result(10)
    assert good.result(10)
    assert running.result() is None
    assert engine.passes == [[["good"]]]
    batcher.close()


def test_a_request_that_is_cancelled_while_it_waits_is_neither_computed_nor_counted():
    engine = Slow()
    batcher = Batcher(engine, most=2, window=0.0)
    running = batcher.answer([Request(["a"])], soon())
    wait_for(lambda: not batcher.waiting)
    waiting = batcher.answer([Request(["b"])] * 3, soon())
    assert batcher.waiting == 3
    waiting.cancel()
    assert batcher.waiting == 0
    engine.go.set()
    running.result(10)
    batcher.close()
    assert engine.passes == [[["a"]]]


@pytest.mark.alone
def test_a_pass_takes_no_more_users_than_its_first_request_has_time_for():
    batcher, engine = paced(0.05, most=100)
    running = batcher.call(lambda: time.sleep(0.2), soon())
    wait_for(lambda: not batcher.waiting)
    waiting = [batcher.answer([Request([str(at)])], soon(left)) for at, left in enumerate([0.8] + [60.0] * 8)]
    assert [len(one.result(10)) for one in waiting] == [1] * 9
    assert len(engine.passes[0]) <= SHARE * 0.8 / 0.05 + 1
    assert running.done()
    batcher.close()


@pytest.mark.alone
@pytest.mark.parametrize("load", [3, 10])
def test_goodput_stays_at_any_load(load):
    """Arrivals that do not wait for answers, at several times the capacity of 50 a second, for four timeouts."""
    pace, timeout, seconds = 0.02, 0.5, 2.0
    batcher, _ = paced(pace, most=8)
    moment = start = time.monotonic()
    refused, spent, lock = 0, list[float](), threading.Lock()

    def note(began: float, future: "Future[Any]") -> None:
        with lock:
            spent.extend([] if future.exception() else [time.monotonic() - began])

    while (now := time.monotonic()) < start + seconds:
        try:
            batcher.answer([Request(["a"])], now + timeout).add_done_callback(lambda done, now=now: note(now, done))
        except Busy:
            refused += 1
        moment += pace / load
        time.sleep(max(0.0, moment - time.monotonic()))
    batcher.close()
    good = [each for each in spent if each <= timeout]
    assert len(good) >= 0.8 * seconds / pace
    assert len(good) >= 0.98 * len(spent)
    assert refused > (load - 2) * seconds / pace / 2
