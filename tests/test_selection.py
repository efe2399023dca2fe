"""Test the selection: denoising against a direct implementation, an even draw, and the report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarec.config.schema import Prepare, Shards
from rarec.data.dataset import PreparedDataset
from rarec.data.selection import (
    LARGEST_GROUP,
    GroupSampler,
    Selection,
    equal_frequency,
    even_shares,
    select_samples,
    shares_word,
    split_words,
    title_words,
)
from rarec.errors import UserError
from tests.datasets import prepare_dataset
from tests.synthetic import write_log
from tests.test_readers import write_table

Ints = npt.NDArray[np.int64]
TITLES = {
    "a": "The Red Lamp",
    "b": "A lamp, of course!",
    "c": "Stone chair",
    "d": "RED, and the",
    "e": "",
    "f": "Of the and",
    "g": "Chair",
}


def make(folder: Path, log: Path, items: Path) -> PreparedDataset:
    interactions = {"path": str(log), "user": "user", "item": "item", "time": "time"}
    catalogue = {"path": str(items), "item": "item", "title": "title"}
    config = Prepare.model_validate({"interactions": interactions, "items": catalogue})
    return prepare_dataset(config, folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Two users; the last two interactions of each do not train."""
    folder = tmp_path_factory.mktemp("small")
    sequences = {"u": "abcdefgab", "v": "cefgdba"}
    log = [(user, item, at) for user, own in sequences.items() for at, item in enumerate(own)]
    items = write_table(folder / "items.csv", ["item", "title"], list(TITLES.items()))
    return make(folder, write_table(folder / "log.csv", ["user", "item", "time"], log), items)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("synthetic")
    return make(folder, *write_log(folder, users=200, items=60))


def pairs(selection: Selection) -> list[tuple[int, int]]:
    return list(zip(selection.user_rows.tolist(), selection.positions.tolist(), strict=True))


def test_words_are_case_folded_without_punctuation_and_stop_words() -> None:
    assert split_words("The Lord of the Rings: LORD-like (2002)") == ["lord", "rings", "like", "2002"]
    assert split_words("Straße, ÉCOLE ﬁne") == split_words("STRASSE école fine") == ["strasse", "école", "fine"]
    assert split_words("'Rock’n’Roll' isn't") == ["rock'n'roll", "isn't"]
    assert split_words("हिन्दी फ़िल्म") == ["हिन्दी", split_words("फ़िल्म")[0]]
    assert split_words("— of the !?") == []


def test_denoise_by_hand(small: PreparedDataset) -> None:
    # without repeats, u trains on a b c d e: b shares lamp, d shares red, c shares nothing, e has no title
    # v trains on c e f g d: g shares chair, d shares nothing, e has no title and f no words but stop words
    assert small.titles[4] == "untitled item"
    selection = select_samples(small, Shards(denoise=True), seed=3)
    kept = {(int(user), str(small.item_ids[small.sequence(user)[at]])) for user, at in pairs(selection)}
    assert kept == {(0, "b"), (0, "d"), (1, "g")}
    report = selection.report
    assert report["samples"] == {"all": 8, "after_denoise": 3, "wanted": 8, "kept": 3}
    dropped = {"target_without_words": 3, "no_shared_word": 2, "trains_the_id_model": 0, "not_drawn": 0}
    assert report["dropped"] == dropped
    assert {"history": ["The Red Lamp", "A lamp, of course!"], "target": "Stone chair"} in report["noise"]


def test_only_what_the_id_model_was_not_trained_on_is_drawn(small: PreparedDataset) -> None:
    # of a b c d e the newest two are d and e, of c e f g d they are g and d; e and d share no word
    whole = select_samples(small, Shards(share=0.5), seed=3, holdout=0.4)
    assert {(int(user), int(at)) for user, at in pairs(whole)} == {(0, 3), (0, 4), (1, 3), (1, 4)}
    assert whole.report["dropped"]["trains_the_id_model"] == 4
    kept = pairs(select_samples(small, Shards(denoise=True), seed=3, holdout=0.4))
    assert {(int(user), int(at)) for user, at in kept} == {(0, 3), (1, 3)}


def test_the_newest_of_what_the_id_model_was_not_trained_on_come_first(small: PreparedDataset) -> None:
    """Of equally new ones some at random; each user may have the newest three of five."""

    def drawn(wanted: int, seed: int) -> list[int]:
        return sorted(at for _, at in pairs(select_samples(small, Shards(max_samples=wanted), seed, holdout=0.6)))

    assert [drawn(wanted, 3) for wanted in (2, 3, 4, 5)] == [[4, 4], [3, 4, 4], [3, 3, 4, 4], [2, 3, 3, 4, 4]]
    users = {tuple(pairs(select_samples(small, Shards(max_samples=1), seed, holdout=0.6))) for seed in range(20)}
    assert users == {((0, 4),), ((1, 4),)}


@given(
    titles=st.lists(st.lists(st.sampled_from("vwxyz"), max_size=3), min_size=4, max_size=8),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    data=st.data(),
)
def test_sharing_a_word_is_what_sets_say(titles: list[list[str]], lengths: list[int], data: st.DataObject) -> None:
    items = [data.draw(st.lists(st.integers(0, len(titles) - 1), min_size=n, max_size=n)) for n in lengths]
    table = title_words([" ".join(title) for title in titles], untitled="v w")
    sets = [set() if title == ["v", "w"] else set(title) for title in titles]
    expected = [
        bool(sets[item] & set().union(*(sets[earlier] for earlier in own[:at])))
        for own in items
        for at, item in enumerate(own)
    ]
    users = np.repeat(np.arange(len(items)), lengths)
    assert shares_word(table, users, np.concatenate(items)).tolist() == expected


def test_denoise_in_parts_is_denoise_at_once(synthetic: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pairs(select_samples(synthetic, Shards(denoise=True), seed=0))
    monkeypatch.setattr("rarec.data.selection.BLOCK", 50)
    assert pairs(select_samples(synthetic, Shards(denoise=True), seed=0)) == whole
    assert 0 < len(whole) < synthetic.manifest["counts"]["training_samples"]


def test_buckets_hold_equally_many_and_equal_numbers_share_one() -> None:
    buckets, ranges = equal_frequency(np.array([9, 1, 0, 5, 3, 7, 2, 8, 4, 6, 10]), 5, above=0)
    assert buckets.tolist() == [4, 0, -1, 2, 1, 3, 0, 3, 1, 2, 4]
    assert ranges == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    buckets, ranges = equal_frequency(np.array([1, 1, 1, 1, 1, 1, 2, 3]), 4, above=0)
    assert len(set(buckets[:6].tolist())) == 1
    assert [pair for pair in ranges if pair] == [(1, 1), (2, 3)]


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), wanted=st.integers(1, 30), seed=st.integers(0, 99))
def test_an_even_draw_fills_the_buckets_alike_until_they_are_exhausted(
    sizes: list[int], wanted: int, seed: int
) -> None:
    shares = even_shares(np.array(sizes), wanted, np.random.default_rng(seed))
    assert shares.sum() == min(wanted, sum(sizes))
    assert all(share == size or share >= shares.max() - 1 for share, size in zip(shares, sizes, strict=True))
    assert (shares <= sizes).all()


def draw_from(groups: Ints, wanted: Ints, blocks: int, seed: int) -> Ints:
    rng = np.random.default_rng(seed)
    sampler = GroupSampler(np.bincount(groups[groups >= 0], minlength=len(wanted)), wanted, rng)
    parts = np.array_split(np.arange(len(groups)), blocks)
    return np.concatenate([part[0] + sampler.draw(groups[part]) for part in parts])


@given(groups=st.lists(st.integers(-1, 2), min_size=8, max_size=40), blocks=st.integers(1, 8), seed=st.integers(0, 99))
def test_what_passes_by_is_drawn_once_and_as_often_as_wanted(groups: list[int], blocks: int, seed: int) -> None:
    groups_S, wanted = np.array(groups), np.array([0, 3, 99])
    drawn = draw_from(groups_S, wanted, blocks, seed)
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    sizes = np.bincount(groups_S[groups_S >= 0], minlength=3)
    assert np.bincount(groups_S[drawn], minlength=3).tolist() == np.minimum(wanted, sizes).tolist()


def test_of_more_samples_than_numpy_draws_from_as_many_are_drawn_as_wanted() -> None:
    """A block of a group of three billion; all but one of a group."""
    sampler = GroupSampler(np.array([3 * 10**9]), np.array([10**9]), np.random.default_rng(0))
    drawn = len(sampler.draw(np.zeros(30_000, np.int64)))
    assert drawn == pytest.approx(10_000, abs=500)
    size = LARGEST_GROUP + 30_000
    sampler = GroupSampler(np.array([size]), np.array([size - 1]), np.random.default_rng(0))
    assert len(sampler.draw(np.zeros(30_000, np.int64))) in (29_999, 30_000)


def test_each_of_a_group_has_the_same_chance_in_every_block() -> None:
    groups = np.zeros(12, np.int64)
    drawn = [draw_from(groups, np.array([4]), 3, seed) for seed in range(900)]
    assert np.bincount(np.concatenate(drawn), minlength=12) / 900 == pytest.approx([1 / 3] * 12, abs=0.06)


def test_which_bucket_gives_one_more_is_random() -> None:
    shares = [even_shares(np.array([2, 10, 10]), 4, np.random.default_rng(seed)) for seed in range(600)]
    # four of three buckets: one each, and one more from any of them
    assert np.mean(shares, axis=0) == pytest.approx([4 / 3] * 3, abs=0.07)


@pytest.mark.parametrize("choice", [{}, {"diversify": True}, {"denoise": True}, {"denoise": True, "diversify": True}])
def test_a_share_is_of_all_samples_seeded_and_accounted_for(synthetic: PreparedDataset, choice: dict[str, Any]) -> None:
    total = synthetic.manifest["counts"]["training_samples"]
    config = Shards(share=0.25, **choice)
    first, again, other = (select_samples(synthetic, config, seed) for seed in (1, 1, 2))
    assert pairs(first) == pairs(again)
    assert len(set(pairs(first))) == len(pairs(first))
    assert json.dumps(first.report) == json.dumps(again.report)
    assert pairs(first) != pairs(other)
    assert len(pairs(first)) == round(0.25 * total)
    every = set(zip(*(part.tolist() for part in synthetic.training_samples()), strict=True))
    assert set(pairs(first)) <= every
    report = first.report
    assert report["samples"]["kept"] + sum(report["dropped"].values()) == total
    for part in ("all", "after_denoise", "kept"):
        assert sum(row[part] for row in report["buckets"]) == report["samples"][part]


def test_a_number_of_samples_caps_the_share(synthetic: PreparedDataset) -> None:
    """The cap keeps as many as it says; one above the share changes nothing."""
    capped = select_samples(synthetic, Shards(share=0.25, max_samples=40), seed=3)
    assert len(set(pairs(capped))) == capped.report["samples"]["wanted"] == 40
    share = select_samples(synthetic, Shards(share=0.25), seed=3)
    assert len(share.user_rows) > 40
    assert pairs(select_samples(synthetic, Shards(share=0.25, max_samples=10**8), seed=3)) == pairs(share)


def test_everything_is_kept_by_default_and_a_users_samples_lie_apart(synthetic: PreparedDataset) -> None:
    selection = select_samples(synthetic, Shards(), seed=0)
    users, positions = synthetic.training_samples()
    assert sorted(pairs(selection)) == list(zip(users.tolist(), positions.tolist(), strict=True))
    assert sum(selection.report["dropped"].values()) == 0
    own = np.bincount(users) / len(users)
    beside = (selection.user_rows[1:] == selection.user_rows[:-1]).mean()
    assert (users[1:] == users[:-1]).mean() > 0.8  # in the order of the dataset
    assert beside < 4 * (own**2).sum() < 0.1  # as in a draw


def test_diversify_is_even_over_history_length_and_popularity(synthetic: PreparedDataset) -> None:
    config = Shards(diversify=True, share=0.1, length_buckets=2, popularity_buckets=3)
    rows = select_samples(synthetic, config, seed=0).report["buckets"]
    assert len(rows) == 6
    most = max(row["kept"] for row in rows)
    assert all(row["kept"] in (most, most - 1, row["all"]) for row in rows)
    plain = select_samples(synthetic, config.model_copy(update={"diversify": False}), seed=0).report["buckets"]
    spread, spread_plain = (np.std([row["kept"] for row in part]) for part in (rows, plain))
    assert spread < spread_plain


@pytest.mark.parametrize("denoise", [True, False])
def test_a_log_without_a_sample_is_not_blamed_on_denoise(small: PreparedDataset, denoise: bool) -> None:
    short = replace(small, train_length_U=np.ones_like(small.train_length_U))
    with pytest.raises(UserError, match="training interactions"):
        select_samples(short, Shards(denoise=denoise), seed=0)


def test_denoise_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    log = [("u", f"i{at}", at) for at in range(6)]
    items = write_table(tmp_path / "items.csv", ["item", "title"], [(f"i{at}", f"word{at}") for at in range(6)])
    dataset = make(tmp_path, write_table(tmp_path / "log.csv", ["user", "item", "time"], log), items)
    with pytest.raises(UserError, match=r"shards\.denoise .*3 training samples"):
        select_samples(dataset, Shards(denoise=True), seed=0)
