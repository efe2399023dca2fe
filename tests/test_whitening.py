"""Whitening of what is read, and a readout that does it."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.config.method import Readout
from rarec.models.initialise import SHRINK, Moments, directions, fit_whitening
from rarec.models.towers import ReadoutModule, Whitening


def states(count, *spreads, seed=0, center=30.0):
    """With a mean far away, and so much spread in every direction."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, len(spreads))) * np.array(spreads) + center).float()


def fitted(size, *every_ND):
    """Return the whitening fitted to each of these states."""
    hidden = every_ND[0].shape[1]
    whitenings = [Whitening(hidden, min(size, hidden)) for _ in every_ND]
    every = [Moments(hidden) for _ in every_ND]
    for moments, states_ND in zip(every, every_ND, strict=True):
        for part_BD in states_ND.split(64):
            moments.add(part_BD)
    directions_ZD = directions(every, hidden, size)
    for whitening, moments in zip(whitenings, every, strict=True):
        fit_whitening(whitening, moments, directions_ZD)
    return [partial(whitening, directions_ZD=directions_ZD.float()) for whitening in whitenings]


def map_of(whiten):
    """Return the matrix by which a whitening multiplies centred states, (Z, D)."""
    return whiten.func.stretch_ZZ @ whiten.keywords["directions_ZD"]


def test_by_hand():
    """Variances 9 and 1, of four states: OAS takes 25/32 of their mean, which leaves 5.875 and 4.125.

    Then 5 * SHRINK is added to each before its root, and by those variances the mean square length is 1.
    """
    corners = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]) + torch.tensor([7.0, -7.0])
    (whiten,) = fitted(2, corners)
    stretch = torch.tensor([1 / (5.875 + 5 * SHRINK), 1 / (4.125 + 5 * SHRINK)]).sqrt()
    length = (stretch.square() * torch.tensor([5.875, 4.125])).sum().sqrt()
    torch.testing.assert_close(whiten.func.center_D, torch.tensor([7.0, -7.0]))
    torch.testing.assert_close(map_of(whiten), torch.diag(stretch / length))


@settings(max_examples=30)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 1000), size=st.integers(1, 6))
def test_white_states_have_mean_zero_and_mean_square_length_one_whatever_the_scale(seed, scale, size):
    both = [states(200, 9, 3, 1, 1, 0.5, 0.1, seed=seed + shift) * scale for shift in (0, 100)]
    for whiten, states_ND in zip(fitted(size, *both), both, strict=True):
        white_NZ = whiten(states_ND)
        assert white_NZ.shape == (200, size)
        assert white_NZ.mean(0).abs().max() < 1e-2
        assert white_NZ.square().sum(1).mean() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("size", [4, 2])
def test_a_random_step_of_one_unit_is_white_of_length_one(size):
    """However unlike the directions are."""
    (whiten,) = fitted(size, states(4000, 30, 3, 2, 0.5))
    steps_ND = whiten.func.center_D + whiten.func.unit * states(20_000, 1, 1, 1, 1, center=0.0)
    assert whiten(steps_ND).square().sum(1).mean() == pytest.approx(1, abs=0.05)


def test_no_direction_stands_out_and_a_faint_one_stays_faint():
    states_ND = states(4000, 30, 3, 2, 1e-3)
    spread_Z = fitted(4, states_ND)[0](states_ND).std(0)
    assert spread_Z[0] / spread_Z[2] < 3  # of 15
    assert spread_Z[3] < 0.05 * spread_Z[0]


def test_of_a_wide_model_the_directions_that_vary_most_are_read_the_same_in_all_parts():
    both = states(500, 1, 20, 0.1, 0.1, 10), states(500, 2, 30, 0.1, 0.1, 5, seed=1)
    maps = [map_of(whiten) for whiten in fitted(2, *both)]
    for map_ZD in maps:
        assert map_ZD.shape == (2, 5)
        assert map_ZD[:, [0, 2, 3]].abs().max() < 0.1 * map_ZD[:, [1, 4]].abs().max()
    axes_ND = torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    assert torch.cosine_similarity(*(axes_ND @ map_ZD.T for map_ZD in maps)).min() > 0.95


@pytest.mark.parametrize("count", [5, 20, 100, 2000])
def test_unseen_states_are_as_long_as_those_seen_however_few_those_were(count):
    """In 64 directions, some of which hardly vary; with the plain covariance of 20 they would be far longer."""
    spreads = np.geomspace(10, 0.1, 64)
    (whiten,) = fitted(64, states(count, *spreads))
    unseen_NZ = whiten(states(5000, *spreads, seed=1))
    assert 0.5 < unseen_NZ.square().sum(1).mean().sqrt() < 2


@pytest.mark.parametrize("size", [8, 4])
@pytest.mark.parametrize(
    "same_ND", [states(100, *[1e-2] * 8), states(1, *[3.0] * 8), torch.zeros(9, 8), torch.zeros(0, 8)]
)
def test_where_all_are_one_or_none_nothing_is_read(size, same_ND):
    same, other = fitted(size, same_ND, states(100, *[3.0] * 8))
    assert same(states(5, *[3.0] * 8, seed=1)).abs().max() == 0
    assert other(states(5, *[3.0] * 8, seed=1)).abs().min() > 0
    (alone,) = fitted(size, same_ND)
    assert alone(states(5, *[3.0] * 8)).abs().max() == 0


def test_what_is_read_as_zero_has_no_unit():
    (whiten,) = fitted(2, torch.ones(9, 2))
    assert whiten.func.unit is None


def test_the_parts_of_several_ranks_add_up():
    states_ND = states(50, 3, 2, 1)
    whole, first, second = (Moments(3) for _ in range(3))
    whole.add(states_ND)
    first.add(states_ND[:20])
    second.add(states_ND[20:])
    first.sums += second.sums
    assert first.count == whole.count == 50
    torch.testing.assert_close(first.covariance_DD, whole.covariance_DD)
    torch.testing.assert_close(whole.mean_D.float(), states_ND.mean(0))


def test_a_readout_whitens_the_text_and_the_slots_that_there_are_each_by_itself():
    readout = ReadoutModule(3, Readout(normalise=False, head=False, size=2), reads=("vectors",))
    readout.white["text"].center_D.copy_(torch.tensor([1.0, 1, 1]))
    readout.directions_ZD.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    readout.white["text"].stretch_ZZ.copy_(torch.tensor([[2.0, 0], [0, 5]]))
    readout.white["vectors"].stretch_ZZ.copy_(torch.tensor([[0.0, 1], [3, 0]]))
    hidden_BTD = torch.tensor([[[2.0, 9, 2], [4, 9, 2]], [[3, 9, 3], [7, 7, 7]]])
    text_BT, slots_BKD = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[[2.0, 0, 1]], [[8, 8, 8]]])
    read_BZ = readout(hidden_BTD, text_BT, slots_BKD, {"vectors": torch.tensor([[True], [False]])})
    assert read_BZ.tolist() == [[2 * (3 - 1) + 3 * 1, 5 * (2 - 1) + 2], [2 * (3 - 1), 5 * (3 - 1)]]
