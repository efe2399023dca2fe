"""Packed prompts and compiled blocks: the same states and gradients as padded ones and plain blocks."""

import pytest
import torch

from rarec.config.method import Llm
from rarec.errors import UserError
from rarec.models.backbone import FrozenBackbone, Packing
from rarec.models.language_model import PACKABLE, load_model
from rarec.models.llm_attention import eager_attention
from rarec.models.slots import Slots
from tests.synthetic import tiny_model, write_llm

LENGTHS = (7, 3, 6)
WIDTH = 9
"""Longer than every prompt: slots that a prompt lacks lie on its last position, which is padding."""


def batch():
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, 40, (3, WIDTH), generator=generator)
    return ids_BT, (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).long()


def slots_of(blocks=(0, 1)):
    generator = torch.Generator().manual_seed(1)
    slots_LBKD = torch.randn(len(blocks), 3, 3, 32, generator=generator, requires_grad=True)
    return Slots(slots_LBKD, torch.tensor([[1, 2, 5], [1, 2, WIDTH - 1], [1, WIDTH - 1, WIDTH - 1]]), blocks)


def states_and_gradients(backbone, slots):
    """Return the states of real positions, and the gradients of the slots."""
    ids_BT, mask_BT = batch()
    real_ND = backbone(ids_BT, mask_BT, slots)[mask_BT.bool()]
    weights_ND = torch.linspace(-1, 1, real_ND.numel()).view_as(real_ND)
    (gradient,) = torch.autograd.grad((real_ND * weights_ND).sum(), slots.slots_LBKD)
    return real_ND.detach(), gradient


def agree(tensors, expected, tolerance=1e-5):
    for a, b in zip(tensors, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_by_hand():
    mask_BT = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    packing = Packing.of(mask_BT)
    assert packing.position_ids_1S.tolist() == [[0, 1, 0, 0, 1, 2, 0]]
    assert packing.packed(torch.tensor([[4, 5, 9], [6, 9, 9], [1, 2, 3]])).tolist() == [[4, 5, 6, 1, 2, 3, 4]]
    assert packing.places_BT.tolist() == [[0, 1, 6], [2, 6, 6], [3, 4, 5]]
    hidden = packing.unpacked(torch.arange(7.0)[None, :, None])[:, :, 0]
    assert (hidden * mask_BT).tolist() == [[0, 1, 0], [2, 0, 0], [3, 4, 5]]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_prompts_do_not_see_each_other(kind, attention, checkpointing):
    results = []
    for packs in (False, True):
        model = tiny_model(kind)
        model.set_attn_implementation(attention)
        backbone = FrozenBackbone(model, "mean", checkpointing, sink=True, packs=packs).train()
        results.append(states_and_gradients(backbone, slots_of()))
    agree(*results)


@pytest.mark.parametrize("kind", PACKABLE)
def test_text_states_are_those_of_padded_prompts(kind):
    ids_BT, mask_BT = batch()
    padded, packed = (FrozenBackbone(tiny_model(kind), "mean", sink=True, packs=packs) for packs in (False, True))
    torch.testing.assert_close(padded.text_states(ids_BT, mask_BT, [1, 0]), packed.text_states(ids_BT, mask_BT, [1, 0]))
    with eager_attention(packed):
        torch.testing.assert_close(packed(ids_BT, mask_BT), padded(ids_BT, mask_BT), rtol=1e-4, atol=1e-4)
    assert packed.packs


@pytest.mark.slow
def test_flex_attention_passes_over_other_prompts(tmp_path):
    ids_BT, mask_BT = batch()
    path = str(write_llm(tmp_path / "llama", "llama"))
    padded = load_model(Llm(path=path), tmp_path).backbone
    packed = load_model(Llm(path=path, attention="flex_attention", packing=True), tmp_path).backbone
    with torch.no_grad():  # on a CPU it has no backward pass
        states = [backbone(ids_BT, mask_BT, slots_of())[mask_BT.bool()] for backbone in (padded, packed)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_encoders_are_refused_with_those_that_pack(tmp_path):
    path = str(write_llm(tmp_path / "bert", "bert"))
    with pytest.raises(UserError, match=r"llm\.packing") as error:
        load_model(Llm(path=path, packing=True), tmp_path)
    assert all(kind in error.value.remedy for kind in PACKABLE)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("bert", {}), ("llama", {"packing": True})])
def test_compiled_blocks_compute_the_same(tmp_path, kind, settings):
    path = str(write_llm(tmp_path / kind, kind))
    results = []
    for compiled in (False, True):
        backbone = load_model(Llm(path=path, compile=compiled, **settings), tmp_path).backbone
        results.append(states_and_gradients(backbone, slots_of()))
    agree(*results, tolerance=1e-4)
