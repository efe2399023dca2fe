"""The alignment module and its first values (docs/method.md, section 2).

In every block: p = W e + b for each vector of a source, c instructions, slots d = [c || p], one source after the other.
"""

import re

import numpy as np
import pytest
import torch

from rarec.errors import UserError
from rarec.models.alignment import AlignmentModule, SlotShape, SourceAlignment
from rarec.models.backbone import FrozenBackbone
from rarec.models.initialise import initialise, ridge_weights, typical_states
from rarec.prompts import Encoded, lay_out
from tests.synthetic import tiny_model

BLOCKS, HIDDEN = 3, 4
SHAPES = {"id": SlotShape(vectors=2, dim=5), "image": SlotShape(vectors=1, dim=3)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_module(instructions=2, projections=True, shapes=SHAPES, blocks=(0, 2, 5)):
    module = AlignmentModule(shapes, blocks, HIDDEN, instructions, projections)
    for _, source in module.named_sources():
        source.reset(seeded())
    return module


def make_vectors(batch=6):
    return {name: torch.randn(batch, shape.vectors, shape.dim, generator=seeded(1)) for name, shape in SHAPES.items()}


def test_slots_are_instructions_then_projections_source_by_source():
    module, vectors = make_module(), make_vectors()
    slots_LBSD, projected = module(vectors)
    assert module.slots == {"id": 4, "image": 3}  # 2 + K and 2 + 1
    assert slots_LBSD.shape == (BLOCKS, 6, 7, HIDDEN)
    assert {name: tuple(p.shape) for name, p in projected.items()} == {"id": (3, 6, 2, 4), "image": (3, 6, 1, 4)}
    start = 0
    for name, source in module.named_sources():
        for block in range(BLOCKS):
            for row in range(6):
                d_SD = slots_LBSD[block, row, start : start + module.slots[name]]
                torch.testing.assert_close(d_SD[:2], source.instructions_LMD[block])
                for k, e_E in enumerate(vectors[name][row]):
                    p_D = source.weight_LDE[block] @ e_E + source.bias_LD[block]
                    torch.testing.assert_close(d_SD[2 + k], p_D)
                    torch.testing.assert_close(projected[name][block, row, k], p_D)
        start += module.slots[name]


def test_slots_come_in_the_order_in_which_prompts_give_them_places():
    """The module says how many slots each source takes and in which order; `lay_out` gives places in that order."""
    module = make_module()
    prompt = Encoded(np.array([7, 8, 9], np.int32), {"image": 0, "id": 2})  # the template names `image` first
    positions_K = lay_out([prompt], module.slots, filler=0).positions_BK[0]
    assert list(module.slots) == ["id", "image"]
    assert positions_K.tolist() == [5, 6, 7, 8, 0, 1, 2]  # i i i 7 8 d d d d 9


def test_every_block_has_maps_of_its_own():
    module = make_module()
    slots_LBSD, _ = module(make_vectors())
    slots_LBSD[1].sum().backward()
    for _, source in module.named_sources():
        for parameter in (source.weight_LDE, source.bias_LD, source.instructions_LMD):
            per_block = parameter.grad.flatten(1).abs().sum(1)
            assert per_block[1] > 0
            assert per_block[[0, 2]].tolist() == [0, 0]


def test_prefix_only_has_instructions_and_nothing_that_knows_the_vectors():
    module, vectors = make_module(projections=False), make_vectors()
    slots_LBSD, projected = module(vectors)
    assert projected == {}
    assert module.slots == {"id": 2, "image": 2}
    assert {name.rsplit(".", 1)[-1] for name in module.state_dict()} == {"instructions_LMD", "unit_L"}
    others, _ = module({name: -array for name, array in vectors.items()})
    torch.testing.assert_close(others, slots_LBSD, atol=0, rtol=0)
    assert (slots_LBSD == slots_LBSD[:, :1]).all(), "the same for every row"


def test_projections_alone():
    module = make_module(instructions=0)
    slots_LBSD, projected = module(make_vectors())
    torch.testing.assert_close(slots_LBSD, torch.cat([projected["id"], projected["image"]], 2))


def test_a_zero_vector_gives_way_to_the_learned_one():
    source = SourceAlignment(1, 3, SlotShape(1, 3), instructions=0, projections=True)
    source.standardise(torch.tensor([[0.0, -2.0, 9.0], [4.0, 0.0, 9.0]]))
    with torch.no_grad():
        source.weight_LDE.copy_(torch.eye(3)[None])
    vectors_BKE = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, -1.0, 10.0]]])
    assert source.project(vectors_BKE)[0, :, 0].tolist() == [[0, 0, 0], [-1, 0, 1]], "at the start the mean"
    with torch.no_grad():
        source.fallback_E.copy_(torch.tensor([1.0, 2.0, 3.0]))
    projected_BD = source.project(vectors_BKE)[0, :, 0]
    assert projected_BD.tolist() == [[1, 2, 3], [-1, 0, 1]]
    projected_BD.sum().backward()
    assert source.fallback_E.grad.tolist() == [1, 1, 1], "of the first row alone"


@pytest.mark.parametrize("missing", [[], ["id"], ["id", "image"]])
def test_slots_are_told_apart_by_their_roles(missing):
    """Two instructions and two vectors of `id`, two and one of `image`; a vector that is not there has no role."""
    module, vectors = make_module(), make_vectors()
    for name in missing:
        vectors[name][0] = 0
    roles = module.role_masks(vectors)
    id_there, image_there = ("id" not in missing), ("image" not in missing)
    assert roles["instructions"][0].tolist() == [True, True, False, False, True, True, False]
    assert roles["vectors"][0].tolist() == [False, False, id_there, id_there, False, False, image_there]
    assert (roles["vectors"] ^ roles["instructions"])[1:].all()


def test_without_vectors_or_instructions_a_role_is_not_there():
    blind = make_module(projections=False)
    assert list(blind.role_masks(make_vectors())) == ["instructions"]
    assert blind.role_masks(make_vectors())["instructions"].all()
    assert make_module(instructions=0).roles == ("vectors",)


def test_vectors_that_are_not_there_do_not_shape_the_start():
    vectors_NE = 4 + 7 * torch.randn(200, 5, generator=seeded(2))
    states_LND = states_from(vectors_NE)
    some, all_there = (SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=0, projections=True) for _ in range(2))
    vectors_NE[100:] = 0
    initialise(some, vectors_NE, states_LND, penalty=1.0, generator=seeded())
    initialise(all_there, vectors_NE[:100], states_LND[:, :100], penalty=1.0, generator=seeded())
    torch.testing.assert_close(some.center_E, all_there.center_E)
    maps, wanted = (source.weight_LDE * source.unit_L[:, None, None] for source in (some, all_there))
    torch.testing.assert_close(maps, wanted)
    none = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=0, projections=True)
    initialise(none, torch.zeros(200, 5), states_LND, penalty=1.0, generator=seeded())
    assert all(parameter.isfinite().all() for parameter in none.parameters())


def test_vectors_are_standardised_before_they_are_projected():
    """Mean 2 and spread 2, mean -1 and spread 1; the third never varies, so it is centred and not scaled."""
    source = SourceAlignment(1, 3, SlotShape(1, 3), instructions=0, projections=True)
    source.standardise(torch.tensor([[0.0, -2.0, 9.0], [4.0, 0.0, 9.0]]))
    assert source.center_E.tolist() == [2, -1, 9]
    assert source.scale_E.tolist() == [2, 1, 1]
    with torch.no_grad():
        source.weight_LDE.copy_(torch.eye(3)[None])
    assert source.project(torch.tensor([[[6.0, -3.0, 9.5]]]))[0, 0, 0].tolist() == [2, -2, 0.5]


def test_random_maps_repeat_with_their_seed():
    first, second = (make_module(shapes={"id": SHAPES["id"]}).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["items", "type", "my.image"])
def test_names_that_torch_needs_are_refused(name):
    with pytest.raises(UserError, match=f"sources.*{re.escape(name)}"):
        make_module(shapes={name: SlotShape(1, 3)})


# ---- ridge regression: the first W


def test_ridge_by_hand():
    """Vectors -1, 1 and states 2, 6, so -2, 2 around their mean: covariance 2, variance 1, W = 2 / (1 + penalty)."""
    vectors_NE, states_LND = torch.tensor([[-1.0], [1.0]]), torch.tensor([[[2.0], [6.0]]])
    assert ridge_weights(vectors_NE, states_LND, 0.0).flatten().tolist() == pytest.approx([2.0])
    assert ridge_weights(vectors_NE, states_LND, 1.0).flatten().tolist() == pytest.approx([1.0])
    assert ridge_weights(vectors_NE, states_LND, 3.0).flatten().tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("penalty", [0.01, 1.0, 20.0])
def test_ridge_equals_least_squares_on_augmented_rows(penalty):
    """|S - V W'|^2 + penalty N |W|^2 is plain least squares with sqrt(penalty N) I below V and zeros below S."""
    rng = np.random.default_rng(0)
    vectors_NE, states_LND = rng.normal(size=(50, 6)), rng.normal(size=(2, 50, 3)) * 5 + 10
    weights_LDE = ridge_weights(torch.from_numpy(vectors_NE), torch.from_numpy(states_LND), penalty)
    assert weights_LDE.shape == (2, 3, 6)
    rows = np.vstack([vectors_NE, np.sqrt(penalty * 50) * np.eye(6)])
    for ours_DE, states_ND in zip(weights_LDE.numpy(), states_LND, strict=True):
        targets = np.vstack([states_ND - states_ND.mean(0), np.zeros((6, 3))])
        np.testing.assert_allclose(ours_DE, np.linalg.lstsq(rows, targets, rcond=None)[0].T, atol=1e-10)


def states_from(vectors_NE, noise=0.0):
    """States that depend linearly on the vectors, differently in each block, around means of 3 and 5."""
    maps_LED = torch.randn(2, vectors_NE.shape[1], HIDDEN, generator=seeded(3))
    states_LND = vectors_NE @ maps_LED + torch.tensor([3.0, 5.0])[:, None, None]
    return states_LND + noise * torch.randn(states_LND.shape, generator=seeded(4))


def test_slots_are_in_the_units_of_each_block():
    """States a hundred times as long, in one block alone: the same parameters, a hundred times the slots."""
    vectors_NE = torch.randn(200, 5, generator=seeded(2))
    states_LND = states_from(vectors_NE, noise=0.1)
    made = []
    for factor in (1.0, 100.0):
        source = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=1, projections=True)
        scaled_LND = states_LND * torch.tensor([1.0, factor])[:, None, None]
        initialise(source, vectors_NE, scaled_LND, penalty=1.0, generator=seeded())
        made.append(source)
    for name, parameter in made[0].named_parameters():
        torch.testing.assert_close(made[1].get_parameter(name), parameter)
    slots, longer = (source(vectors_NE[:3, None])[0] for source in made)
    torch.testing.assert_close(longer[0], slots[0])
    torch.testing.assert_close(longer[1], 100 * slots[1])
    typical_D = states_LND[0].std(0, unbiased=False)
    assert (typical_D <= made[0].unit_L[0]).sum() == HIDDEN // 2


def test_another_unit_in_the_last_block_changes_no_slot():
    source, vectors_NE = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=1, projections=True), torch.eye(5)
    initialise(source, vectors_NE, states_from(vectors_NE), penalty=1.0, generator=seeded())
    slots_LBKD, weight_LDE = source(vectors_NE[:, None])[0].detach(), source.weight_LDE.detach().clone()
    first, last = source.unit_L.tolist()
    with torch.no_grad():
        source.rescale_last(torch.tensor(last / 8))
    assert source.unit_L.tolist() == [first, pytest.approx(last / 8)]
    torch.testing.assert_close(source.weight_LDE, weight_LDE * torch.tensor([1.0, 8])[:, None, None])
    torch.testing.assert_close(source(vectors_NE[:, None])[0], slots_LBKD)


def test_items_whose_texts_are_all_the_same_start_apart_around_their_text():
    """As with a template of an item's vector alone: texts tell nothing about W, but slots must tell items apart."""
    source = SourceAlignment(3, HIDDEN, SlotShape(1, 5), instructions=1, projections=True)
    vectors_NE = torch.randn(9, 5, generator=seeded(2))
    states_LND = torch.stack([torch.full((9, HIDDEN), 3.0), torch.zeros(9, HIDDEN), states_from(vectors_NE)[0]])
    states_LND[0] += 1e-4 * torch.randn(9, HIDDEN, generator=seeded(3))  # rounding errors are no differences
    initialise(source, vectors_NE, states_LND, penalty=1.0, generator=seeded())
    assert source.unit_L[:2].tolist() == [pytest.approx(3.0), 1.0]
    slots_LND = source.project(vectors_NE[:, None])[:, :, 0]
    assert 0.01 < source.weight_LDE[:2].std() < 0.03
    torch.testing.assert_close(slots_LND[:2].mean(1), states_LND[:2].mean(1), atol=1e-3, rtol=1e-3)
    standard_NE = (vectors_NE - vectors_NE.mean(0)) / vectors_NE.std(0, unbiased=False)
    ridge_DE = ridge_weights(standard_NE, states_LND[2:], 1.0)[0]
    torch.testing.assert_close(source.weight_LDE[2] * source.unit_L[2], ridge_DE.float())


def test_the_initialised_module_predicts_the_states():
    """With hardly a penalty and no noise, p = W e + b is the text-only state itself; c starts at the mean state."""
    vectors_NE = 4 + 7 * torch.randn(200, 5, generator=seeded(2))
    states_LND = states_from(vectors_NE)
    source = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=2, projections=True)
    initialise(source, vectors_NE, states_LND, penalty=1e-9, generator=seeded())
    torch.testing.assert_close(source.project(vectors_NE[:, None])[:, :, 0], states_LND, atol=1e-3, rtol=1e-4)
    means_LMD = states_LND.mean(1)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(source.instructions_LMD, means_LMD / source.unit_L[:, None, None], atol=0.2, rtol=0)
    assert not torch.equal(source.instructions_LMD[:, 0], source.instructions_LMD[:, 1]), "instructions start apart"


def test_a_heavy_penalty_falls_back_to_the_mean_and_none_is_random():
    vectors_NE = torch.randn(200, 5, generator=seeded(2))
    states_LND = states_from(vectors_NE, noise=1.0)
    source = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=0, projections=True)
    initialise(source, vectors_NE, states_LND, penalty=1e9, generator=seeded())
    projected_LND = source.project(vectors_NE[:, None])[:, :, 0]
    torch.testing.assert_close(projected_LND, states_LND.mean(1, keepdim=True).expand_as(projected_LND))
    initialise(source, vectors_NE, states_LND, penalty=None, generator=seeded())
    torch.testing.assert_close(source.bias_LD * source.unit_L[:, None], states_LND.mean(1))
    assert 0.01 < source.weight_LDE.std() < 0.03


def test_stored_half_precision_states_initialise_as_well():
    vectors_NE = torch.randn(200, 5, generator=seeded(2))
    states_LND = states_from(vectors_NE)
    weights = []
    for dtype in (torch.float32, torch.float16):
        source = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=1, projections=True)
        initialise(source, vectors_NE, states_LND.to(dtype), penalty=1.0, generator=seeded())
        assert source.weight_LDE.dtype == torch.float32
        weights.append(source.weight_LDE)
    torch.testing.assert_close(*weights, atol=1e-3, rtol=0)


def test_prefix_only_is_initialised_without_vectors():
    vectors_NE = torch.randn(9, 5, generator=seeded(2))
    source = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=2, projections=False)
    states_LND = states_from(vectors_NE)
    initialise(source, vectors_NE, states_LND, penalty=1.0, generator=seeded())
    means_LMD = states_LND.mean(1)[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(source.instructions_LMD, means_LMD / source.unit_L[:, None, None], atol=0.2, rtol=0)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_typical_position_is_the_one_most_like_all_others(kind):
    """By brute force, over every position of text in every block; a decoder's first token is none."""
    backbone = FrozenBackbone(tiny_model(kind, blocks=2), "mean", sink=kind == "llama")
    ids_BT = torch.randint(5, 90, (3, 6), generator=seeded(5))
    mask_BT = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    output = backbone.trunk(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True)
    places = [(b, t) for b, t in mask_BT.nonzero().tolist() if t >= backbone.sink]

    def likeness(place):
        return sum(
            torch.cosine_similarity(states[place], states[other], dim=0)
            for states in output.hidden_states[:2]
            for other in places
        )

    b, t = max(places, key=likeness)
    expected_LD = torch.stack([states[b, t] for states in output.hidden_states[:2]])
    torch.testing.assert_close(typical_states(backbone, ids_BT, mask_BT, (0, 1)), expected_LD)


def test_slots_may_start_elsewhere_than_at_the_mean():
    vectors_NE, begin_LD = torch.randn(9, 5, generator=seeded(2)), torch.arange(2.0 * HIDDEN).reshape(2, HIDDEN)
    source = SourceAlignment(2, HIDDEN, SlotShape(1, 5), instructions=1, projections=True)
    initialise(source, vectors_NE, states_from(vectors_NE), penalty=1e9, generator=seeded(), start_LD=begin_LD)
    slots_LBSD = source(vectors_NE[:, None])[0]
    expected_LSD = begin_LD[:, None].expand(-1, 2, -1)
    torch.testing.assert_close(slots_LBSD[:, 4], expected_LSD, atol=0.1 * source.unit_L.max().item(), rtol=0)
