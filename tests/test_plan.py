"""Plans of batches: each sample once an epoch, equal batches on any layout, direct access to any step."""

import tracemalloc
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarec.config.schema import Train
from rarec.data.shards.batch_plan import BatchPlan, plan_batches
from rarec.data.shards.samples import INDEX_ROW
from rarec.errors import UserError
from tests.shards import plan_of


@dataclass
class World:
    """Shards of some sizes, prompts of some lengths, and how a plan is to be made of them."""

    shard_S: np.ndarray
    tokens_S: np.ndarray
    seed: int
    excluded: list[int] = field(default_factory=list)
    cut: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> BatchPlan:
        return plan_of(self.shard_S, self.tokens_S, self.seed, excluded=self.excluded, **self.cut)

    @property
    def kept(self) -> list[int]:
        return sorted(set(range(len(self.shard_S))) - set(self.excluded))


def world(sizes: list[int], seed: int = 0, longest: int = 40, **cut: Any) -> World:
    shard_S = np.repeat(np.arange(len(sizes), dtype=np.uint32), sizes)
    tokens_S = np.random.default_rng(seed).integers(1, longest + 1, len(shard_S)).astype(np.uint32)
    return World(shard_S, tokens_S, seed, cut=cut)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    made = world(draw(st.lists(st.integers(1, 40), min_size=1, max_size=14)), draw(st.integers(0, 2**40)))
    total = len(made.shard_S)
    made.excluded = draw(st.lists(st.integers(0, total - 1), max_size=total - 1))
    by_size = st.fixed_dictionaries({"batch_size": st.integers(2, 30)})
    by_tokens = st.fixed_dictionaries({"tokens_per_batch": st.integers(45, 400), "slots": st.integers(0, 5)})
    made.cut = draw(st.one_of(by_size, by_tokens))
    return made


def lists(batches) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@given(worlds(), st.integers(0, 3))
def test_an_epoch_visits_every_kept_sample_once_and_no_excluded_one(made, epoch):
    plan = made.plan()
    batches = lists(plan.batches(epoch))
    assert sorted(number for batch in batches for number in batch) == made.kept
    assert len(batches) == plan.steps(epoch)
    assert all(batches)


@given(worlds(), st.integers(0, 3))
def test_batches_have_even_sizes_or_fit_the_budget(made, epoch):
    sizes = [len(batch) for batch in made.plan().batches(epoch)]
    if "batch_size" in made.cut:
        assert len(sizes) == -(-len(made.kept) // made.cut["batch_size"])
        assert max(sizes) <= made.cut["batch_size"]
        assert max(sizes) - min(sizes) <= 1
    else:
        for batch in made.plan().batches(epoch):
            padded = len(batch) * (made.tokens_S[batch].max() + made.cut["slots"])
            assert padded <= made.cut["tokens_per_batch"]


@given(worlds(), st.integers(1, 9))
def test_ranks_share_every_batch_whatever_their_number(made, ranks):
    plan = made.plan()
    for batch in plan.batches(1):
        shares = [plan.share(batch, rank, ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(shares)) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(worlds(), st.data())
def test_a_run_goes_on_at_any_step_of_any_epoch(made, data):
    plan, epochs = made.plan(), 3
    whole = [batch for epoch in range(epochs) for batch in lists(plan.batches(epoch))]
    assert plan.total_steps(epochs) == len(whole)
    first = data.draw(st.integers(0, len(whole)))
    last = data.draw(st.integers(first, len(whole)))
    again = made.plan()
    epoch, step = again.epoch_and_step(first)
    assert sum(again.steps(before) for before in range(epoch)) + step == first
    assert lists(again.batches(epoch, step)) == lists(plan.batches(epoch))[step:]
    assert lists(again.batches_between(first, last)) == whole[first:last]


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[list[int]]:
        made = world([30] * 9, batch_size=8)
        made.seed = seed
        return lists(made.plan().batches(epoch))

    assert order(1, 0) == order(1, 0)
    orders = [order(1, 0), order(1, 1), order(2, 0), order(0, 0), order(0, 1)]
    assert len({str(each) for each in orders}) == len(orders)


def test_samples_of_several_shards_are_mixed_and_no_epoch_begins_like_another():
    plan = world([50] * 20, batch_size=10).plan()
    first = [np.concatenate(list(islice(plan.batches(epoch), 16))) // 50 for epoch in range(6)]
    assert all(len(np.unique(shards)) >= 4 for shards in first)
    assert len({tuple(np.unique(shards)) for shards in first}) > 1


@pytest.mark.parametrize("cut", [{"batch_size": 10}, {"tokens_per_batch": 400}])
def test_batches_hold_prompts_of_like_length_in_random_order(cut):
    made = world([200] * 4, longest=100, **cut)
    batches = list(made.plan().batches(0))
    assert np.mean([np.ptp(made.tokens_S[batch]) for batch in batches]) < 0.3 * np.ptp(made.tokens_S)
    longest = [int(made.tokens_S[batch].max()) for batch in batches[:12]]
    assert longest != sorted(longest)


def test_a_budget_leaves_little_padding_and_no_small_remainder():
    made = world([500] * 4, longest=100, tokens_per_batch=3000)
    batches = list(made.plan().batches(0))
    tokens = [made.tokens_S[batch] for batch in batches]
    assert sum(lengths.sum() for lengths in tokens) / sum(len(lengths) * lengths.max() for lengths in tokens) > 0.85
    assert min(map(len, batches)) >= 10


class Watched:
    """A column that tells which of its rows were looked at."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.seen = values, set()

    def __getitem__(self, numbers):
        self.seen.update(np.arange(len(self.values))[numbers].tolist())
        return self.values[numbers]


def test_a_step_in_the_middle_is_found_without_planning_what_lies_before():
    made = world([64] * 1000)
    column = Watched(made.tokens_S)
    plan = plan_of(made.shard_S, column, 5, batch_size=32)
    next(plan.batches(1, 1500))
    assert len(column.seen) == 16 * 32
    next(plan.batches_between(2000 * 3 + 700, 2000 * 3 + 701))
    assert len(column.seen) <= 2 * 16 * 32


def test_memory_does_not_depend_on_the_number_of_samples():
    def peak(shards: int) -> int:
        made = world([1000] * shards, batch_size=64)
        plan = made.plan()
        plan.steps(0)
        tracemalloc.start()
        for _ in plan.batches(0):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(80) < 1.2 * peak(10)


def test_a_prompt_beyond_the_budget_is_refused_with_its_slots():
    made = world([20], tokens_per_batch=42, slots=2)
    made.tokens_S[7] = 41
    with pytest.raises(UserError, match=r"43 .*train\.tokens_per_batch = 42"):
        made.plan()


def test_more_ranks_than_a_batch_has_samples_are_refused():
    plan = world([20], batch_size=8).plan()
    plan.check_world_size(6, 1)
    with pytest.raises(UserError, match=r"smallest batch, of 6, .*7"):
        plan.check_world_size(7, 1)
    made = world([20], longest=1, tokens_per_batch=40)
    made.tokens_S[3] = 40
    with pytest.raises(UserError, match=r"smallest batch, of 1, .*2"):
        made.plan().check_world_size(2, 2)


def test_nothing_left_to_train_on_is_refused():
    made = world([3, 2])
    made.excluded = [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="none of 5 samples"):
        made.plan()


@st.composite
def folded(draw: st.DrawFn) -> tuple[np.ndarray, Any, list[int]]:
    """The index of samples in the order of their users' parts, their configuration, and samples that are excluded."""
    folds = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(0, 60), min_size=folds, max_size=folds).filter(any))
    index_S = np.zeros(sum(counts), INDEX_ROW)
    index_S["user"] = np.concatenate([fold + folds * np.arange(count) for fold, count in enumerate(counts)])
    shards = [-(-count // 16) for count in counts]
    sizes = [len(part) for count in counts if count for part in np.array_split(np.arange(count), -(-count // 16))]
    index_S["shard"] = np.repeat(np.arange(sum(shards)), sizes)
    index_S["tokens"] = draw(st.integers(1, 30)) + np.arange(len(index_S)) % 7
    train = Train(batch_size=draw(st.integers(2, 20)))
    config = SimpleNamespace(
        ids=SimpleNamespace(for_samples=["id"] * folds), run=SimpleNamespace(seed=draw(st.integers(0, 9))), train=train
    )
    return index_S, config, draw(st.lists(st.integers(0, len(index_S) - 1), max_size=len(index_S) - 1))


@given(folded(), st.data())
def test_each_batch_is_of_one_part_of_the_users_and_a_run_goes_on_at_any_step(made, data):
    index_S, config, excluded = made
    plan, epoch = plan_batches(index_S, config, 0, excluded), data.draw(st.integers(0, 2))
    batches = lists(plan.batches(epoch))
    kept = set(range(len(index_S))) - set(excluded)
    assert sorted(number for batch in batches for number in batch) == sorted(kept)
    assert plan.samples == len(kept)
    folds = len(config.ids.for_samples)
    assert all(len(set(index_S["user"][batch] % folds)) == 1 for batch in batches)
    assert max(map(len, batches)) <= config.train.batch_size
    assert min(map(len, batches)) == plan.smallest(epoch)
    assert plan.steps(epoch) == len(batches)
    step = data.draw(st.integers(0, len(batches)))
    assert lists(plan.batches(epoch, step)) == batches[step:]
    assert set(plan.first_samples(5).tolist()) <= kept
