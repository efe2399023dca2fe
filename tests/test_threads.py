"""A recommender that several threads share answers each as if it were alone."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

import rarec
from rarec.entry import open_run
from tests.recommending import exported

THREADS, LISTS = 8, 400
ROWS = ["per_layer+id+cheap", "id_only+cheap", "lexical"]
"""With slots; without a language model; without vectors."""


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module", params=ROWS)
def bundle(finished: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    run = open_run(finished)
    if request.param != run.config.export.variant:
        run = exported(run, tmp_path_factory.mktemp("row"), f"export.variant={request.param}")
    return run.directory("export")


def together(call: Callable[[Any], Any], asked: Sequence[Any]) -> list[Any]:
    """Return the results of calls from several threads, the first of which begin at the same moment."""
    barrier = Barrier(THREADS, timeout=60)

    def work(thread: int) -> list[Any]:
        barrier.wait()
        return [call(value) for value in asked[thread::THREADS]]

    with ThreadPoolExecutor(THREADS) as threads:
        parts = list(threads.map(work, range(THREADS)))
    return [parts[place % THREADS][place // THREADS] for place in range(len(asked))]


def histories(items: Sequence[Any]) -> list[list[Any]]:
    """Return different histories of 1 to 9 items."""
    rng = np.random.default_rng(3)
    return [rng.choice(items, rng.integers(1, 10), replace=False).tolist() for _ in range(LISTS)]


def test_lists_and_vectors_from_many_threads_are_those_from_one(bundle):
    """Both by a recommender whose parts are all open, and at its very first use."""
    known = rarec.load(bundle)
    asked = histories(known.items)
    lists = [[entry.item for entry in known.recommend([history])[0]] for history in asked]
    for shared in (known, rarec.load(bundle)):
        found = together(lambda own, shared=shared: shared.recommend([own])[0], asked)
        assert [[entry.item for entry in items] for items in found] == lists
    if known.bundle.facts["row"] != "lexical":
        vectors = [known.query_vectors([history]) for history in asked[:80]]
        for shared in (known, rarec.load(bundle)):
            found = together(lambda own, shared=shared: shared.query_vectors([own]), asked[:80])
            np.testing.assert_allclose(np.concatenate(found), np.concatenate(vectors), rtol=1e-5, atol=1e-6)


def test_every_other_call_may_be_among_them(bundle, finished):
    """Searches, explanations and new items, which read the titles of others, beside recommendations."""
    calls = [
        lambda of, own: of.recommend([own, own[:1]]).items,
        lambda of, own: of.explain(own, own[0]),
        lambda of, own: of.compare(own),
    ]
    known = rarec.load(bundle)
    if known.bundle.facts["row"] != "lexical":
        calls += [lambda of, own: of.similar(own[0])]
    if known.bundle.facts["model"]:
        calls += [lambda of, own: of.place(own, "river [SEP] lamp", "OAK")]
    asked = list(enumerate(histories(known.items)[:80]))
    alone = [repr(calls[number % len(calls)](known, own)) for number, own in asked]
    shared = rarec.load(bundle)
    assert together(lambda pair: repr(calls[pair[0] % len(calls)](shared, pair[1])), asked) == alone
