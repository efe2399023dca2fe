"""Whitening of pooled states, and a readout that does it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarec.config.method import Readout as ReadoutConfig
from rarec.models.towers import Readout
from rarec.models.whitening import SHRINK, whiten


def states(count, *spreads, seed=0, center=30.0):
    """With a mean far away, and so much spread in every direction."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(count, len(spreads))) * np.array(spreads) + center).float()


def white(whitening, states_ND):
    return (states_ND - whitening.center_D) @ whitening.map_ZD.T


def test_by_hand():
    """Variances 9 and 1, mean 5: 5 * SHRINK is added to each before its root; then the mean square length is 1."""
    corners = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]]) + torch.tensor([100.0, -7.0])
    users, _ = whiten(corners, corners, 2)
    stretch = torch.tensor([1 / (9 + 5 * SHRINK), 1 / (1 + 5 * SHRINK)]).sqrt()
    length = (stretch.square() * torch.tensor([9.0, 1.0])).sum().sqrt()
    torch.testing.assert_close(users.center_D, torch.tensor([100.0, -7.0]))
    torch.testing.assert_close(users.map_ZD, torch.diag(stretch / length), atol=1e-2, rtol=1e-2)  # noise is added, too


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.01, 1000), size=st.integers(1, 6))
def test_white_states_have_mean_zero_and_mean_square_length_one_whatever_the_scale(seed, scale, size):
    users_ND, items_ND = (states(200, 9, 3, 1, 1, 0.5, 0.1, seed=seed + at) * scale for at in (0, 100))
    for whitening, states_ND in zip(whiten(users_ND, items_ND, size), (users_ND, items_ND), strict=True):
        white_NZ = white(whitening, states_ND)
        assert white_NZ.shape == (200, size)
        assert white_NZ.mean(0).abs().max() < 1e-2
        assert white_NZ.square().sum(1).mean() == pytest.approx(1, abs=0.1)


def test_no_direction_stands_out_and_a_faint_one_stays_faint():
    users_ND = states(4000, 30, 3, 2, 1e-3)
    spread_Z = white(whiten(users_ND, users_ND, 4)[0], users_ND).std(0)
    assert spread_Z[0] / spread_Z[2] < 9 < 30 / 2
    assert spread_Z[3] < 0.05 * spread_Z[0]


def test_of_a_wide_model_the_directions_that_vary_most_are_read_the_same_on_both_sides():
    users_ND, items_ND = states(500, 1, 20, 0.1, 0.1, 10), states(500, 2, 30, 0.1, 0.1, 5, seed=1)
    users, items = whiten(users_ND, items_ND, 2)
    for whitening in (users, items):
        assert whitening.map_ZD.shape == (2, 5)
        assert whitening.map_ZD[:, [0, 2, 3]].abs().max() < 0.1 * whitening.map_ZD[:, [1, 4]].abs().max()
    both_ND = torch.tensor([[0.0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    towards_users, towards_items = both_ND @ users.map_ZD.T, both_ND @ items.map_ZD.T
    assert torch.cosine_similarity(towards_users, towards_items).min() > 0.95


def test_where_all_texts_are_one_rounding_is_not_stretched_into_something():
    same_ND = states(100, *[1e-2] * 8)  # a thousandth of the length and less
    white_NZ = white(whiten(same_ND, states(100, *[3.0] * 8), 8)[0], same_ND)
    assert torch.linalg.vector_norm(white_NZ, dim=1).mean() < 0.2


def test_a_readout_whitens_the_text_and_the_slots_that_there_are():
    readout = Readout(3, ReadoutConfig(normalise=False, head=False, size=2), reads=("vectors",))
    readout.center_D.copy_(torch.tensor([1.0, 1, 1]))
    readout.white_ZD.copy_(torch.tensor([[2.0, 0, 0], [0, 0, 5]]))
    hidden_BTD = torch.tensor([[[2.0, 9, 2], [4, 9, 2]], [[3, 9, 3], [7, 7, 7]]])
    text_BT, slots_BKD = torch.tensor([[1, 1], [1, 0]]), torch.tensor([[[2.0, 0, 1]], [[8, 8, 8]]])
    read_BZ = readout(hidden_BTD, text_BT, slots_BKD, {"vectors": torch.tensor([[True], [False]])})
    assert read_BZ.tolist() == [[2 * (3 - 1) + 2 * (2 - 1), 5 * (2 - 1)], [2 * (3 - 1), 5 * (3 - 1)]]
