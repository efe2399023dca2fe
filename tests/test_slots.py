"""Slots by overwriting hidden states are the paper's equation, on every kind of backbone (docs/method.md, section 2).

In block l the text h attends over the slots d and itself, and slots ask nothing:

    Q = Wq h,   K = Wk Concat(d, h),   V = Wv Concat(d, h)

`equation` below computes just that from the weights of a model, block by block, with no hook and none of the model's
own forward code for attention.

Shape letters: B batch, T text positions, S slots, P = S + T positions, L blocks, D hidden.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from threading import Barrier

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from rarec.models.backbone import FrozenBackbone
from rarec.models.slots import SlotInjector, Slots
from tests.synthetic import tiny_model

KINDS = ("llama", "qwen3", "gpt2", "bert")
BLOCKS, HIDDEN, HEADS, BATCH, TEXT = 3, 32, 4, 2, 7


def make_backbone(kind, **settings):
    return FrozenBackbone(tiny_model(kind, blocks=BLOCKS), "last", **settings)


def make_slots(where, blocks=tuple(range(BLOCKS)), seed=1):
    """Random slots at the same places in both rows; they require gradients."""
    torch.manual_seed(seed)
    slots_LBKD = torch.randn(len(blocks), BATCH, len(where), HIDDEN, requires_grad=True)
    return Slots(slots_LBKD, torch.tensor([where] * BATCH), blocks)


def make_ids(positions, seed=2):
    return torch.randint(0, 200, (BATCH, positions), generator=torch.Generator().manual_seed(seed))


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# ---- the equation, written out


def heads(x_BTD, count):
    return x_BTD.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q_BTD, k_BPD, v_BPD, visible_TP, key_heads=HEADS, queries=lambda q: q, keys=lambda k: k):
    """Softmax attention of text queries over slots and text; `visible_TP` says which keys a text position sees."""
    q, k, v = heads(q_BTD, HEADS), heads(k_BPD, key_heads), heads(v_BPD, key_heads)
    q, k = queries(q), keys(k)
    k, v = (x.repeat_interleave(HEADS // key_heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible_TP, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def rotary(at_P, base=10_000.0):
    """Rotary embedding of positions `at_P`: pairs (x_j, x_{j + n/2}) turn by at * base^(-2j/n)."""

    def rotate(x):
        n = x.shape[-1]
        angles = at_P[:, None] * base ** (-torch.arange(0, n, 2) / n)
        first, second = x.chunk(2, -1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    return rotate


def llama_block(block, d, h, at_S, at_T):
    attention = block.self_attn
    n, both = block.input_layernorm(h), block.input_layernorm(torch.cat([d, h], 1))
    at_P = torch.cat([at_S, at_T])
    q_norm, k_norm = (getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm"))
    seen = attend(
        attention.q_proj(n),
        attention.k_proj(both),
        attention.v_proj(both),
        at_P <= at_T[:, None],
        key_heads=2,
        queries=lambda q: rotary(at_T)(q_norm(q)),
        keys=lambda k: rotary(at_P)(k_norm(k)),
    )
    h = h + attention.o_proj(seen)
    return h + block.mlp(block.post_attention_layernorm(h))


def gpt2_block(block, d, h, at_S, at_T):
    attention = block.attn
    wq, wk, wv = attention.c_attn.weight.chunk(3, 1)
    bq, bk, bv = attention.c_attn.bias.chunk(3)
    n, both = block.ln_1(h), block.ln_1(torch.cat([d, h], 1))
    seen = attend(n @ wq + bq, both @ wk + bk, both @ wv + bv, torch.cat([at_S, at_T]) <= at_T[:, None])
    h = h + attention.c_proj(seen)
    return h + block.mlp(block.ln_2(h))


def bert_block(block, d, h, at_S, at_T):
    attention, both = block.attention.self, torch.cat([d, h], 1)
    everything = torch.ones(len(at_T), len(at_S) + len(at_T), dtype=torch.bool)
    seen = attend(attention.query(h), attention.key(both), attention.value(both), everything)
    out = block.attention.output
    h = out.LayerNorm(h + out.dense(seen))
    return block.output.LayerNorm(h + block.output.dense(F.gelu(block.intermediate.dense(h))))


def embed(kind, trunk, ids_BT, at_T):
    if kind == "gpt2":
        return trunk.wte(ids_BT) + trunk.wpe(at_T)
    if kind == "bert":
        return trunk.embeddings(input_ids=ids_BT, position_ids=at_T[None])
    return trunk.embed_tokens(ids_BT)


BLOCK = {"llama": llama_block, "qwen3": llama_block, "gpt2": gpt2_block, "bert": bert_block}
FINAL_NORM = {"llama": "norm", "qwen3": "norm", "gpt2": "ln_f", "bert": None}


def equation(kind, backbone, ids_BP, slots_LBKD, where):
    """Final hidden states (B, T, D) of the text positions; the tokens at `where` are never looked at."""
    at_S = torch.tensor(where, dtype=torch.long)
    at_T = torch.tensor([p for p in range(ids_BP.shape[1]) if p not in where])
    h = embed(kind, backbone.trunk, ids_BP[:, at_T], at_T)
    for block, d in zip(backbone.blocks, slots_LBKD, strict=True):
        h = BLOCK[kind](block, d, h, at_S, at_T)
    norm = FINAL_NORM[kind]
    return (getattr(backbone.trunk, norm)(h) if norm else h), at_T


# ---- the method


@pytest.mark.parametrize("kind", KINDS)
def test_without_slots_the_equation_is_the_model_itself(kind):
    backbone, ids_BT = make_backbone(kind), make_ids(TEXT)
    expected, _ = equation(kind, backbone, ids_BT, torch.zeros(BLOCKS, BATCH, 0, HIDDEN), [])
    torch.testing.assert_close(backbone(ids_BT, torch.ones_like(ids_BT)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", [[0, 1, 2], [3, 4], [0, 4, 8], [6, 1]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_overwriting_equals_the_key_value_equation(kind, where):
    backbone, slots, ids_BP = make_backbone(kind), make_slots(where), make_ids(TEXT + len(where))
    hidden_BPD = backbone(ids_BP, torch.ones_like(ids_BP), slots)
    expected_BTD, at_T = equation(kind, backbone, ids_BP, slots.slots_LBKD, where)
    torch.testing.assert_close(hidden_BPD[:, at_T], expected_BTD, atol=1e-5, rtol=1e-5)

    weights = torch.randn_like(expected_BTD)
    gradient, expected = (
        torch.autograd.grad((x * weights).sum(), slots.slots_LBKD)[0] for x in (hidden_BPD[:, at_T], expected_BTD)
    )
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_that_stands_at_a_slot_is_never_read(kind):
    backbone, slots, ids_BP = make_backbone(kind), make_slots([2, 5]), make_ids(TEXT)
    other_BP = ids_BP.clone()
    other_BP[:, [2, 5]] = 7
    text = [p for p in range(TEXT) if p not in (2, 5)]
    mask_BP = torch.ones_like(ids_BP)
    with torch.no_grad():
        hidden, other = (backbone(ids, mask_BP, slots)[:, text] for ids in (ids_BP, other_BP))
    torch.testing.assert_close(hidden, other, atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_which_text_sees_a_slot_in_the_middle(kind):
    """In a decoder only later text sees it; in an encoder all text does."""
    backbone, ids_BP, mask_BP = make_backbone(kind), make_ids(TEXT), torch.ones(BATCH, TEXT, dtype=torch.long)
    slots = make_slots([3])
    with torch.no_grad():
        hidden_BPD = backbone(ids_BP, mask_BP, slots)
        negated_BPD = backbone(ids_BP, mask_BP, replace(slots, slots_LBKD=-slots.slots_LBKD))
    changed_P = (hidden_BPD - negated_BPD).abs().amax((0, 2)) > 1e-4
    assert changed_P[4:].all()
    assert bool(changed_P[:3].any()) == (kind == "bert")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_block_0_alone_is_input_injection(kind):
    """Return the prompt embeddings that a serving engine accepts."""
    backbone, ids_BP = make_backbone(kind), make_ids(TEXT)
    slots = make_slots([0, 1], blocks=(0,))
    embedded = torch.cat([slots.slots_LBKD[0], backbone.trunk.embed_tokens(ids_BP[:, 2:])], 1)
    expected = backbone.trunk(inputs_embeds=embedded).last_hidden_state
    torch.testing.assert_close(backbone(ids_BP, torch.ones_like(ids_BP), slots), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_of_blocks_leaves_the_others_alone(kind):
    """Skipping block 0 is the same as supplying there what it would have got: the filler's own embedding."""
    backbone, ids_BP, where = make_backbone(kind), make_ids(TEXT), [0, 4]
    mask_BP, later = torch.ones_like(ids_BP), make_slots(where, blocks=(1, 2))
    fillers = embed(kind, backbone.trunk, ids_BP, torch.arange(TEXT))[:, where]
    everywhere = Slots(torch.cat([fillers[None], later.slots_LBKD]), later.positions_BK, (0, 1, 2))
    with torch.no_grad():
        subset, full = backbone(ids_BP, mask_BP, later), backbone(ids_BP, mask_BP, everywhere)
        none = backbone(ids_BP, mask_BP)
    torch.testing.assert_close(subset, full, atol=1e-6, rtol=1e-6)
    assert (subset - none).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind):
    """A row with its slots elsewhere than its neighbour's, padded to the neighbour's length, is what it is alone."""
    backbone, ids_BP = make_backbone(kind), make_ids(9)
    slots = replace(make_slots([0, 1]), positions_BK=torch.tensor([[0, 1], [3, 4]]))
    mask_BP = torch.tensor([[1] * 6 + [0] * 3, [1] * 9])
    with torch.no_grad():
        together = backbone(ids_BP, mask_BP, slots)
        for row, length in enumerate([6, 9]):
            own = Slots(slots.slots_LBKD[:, [row]], slots.positions_BK[[row]], slots.blocks)
            alone = backbone(ids_BP[[row], :length], mask_BP[[row], :length], own)
            torch.testing.assert_close(together[[row], :length], alone, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_model_takes_float32_slots_and_gives_them_gradients():
    ids_BP, weights, gradients = make_ids(TEXT), torch.randn(BATCH, TEXT - 2, HIDDEN), []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = FrozenBackbone(tiny_model("llama", blocks=BLOCKS).to(dtype), "last")
        slots = make_slots([0, 1])
        hidden = backbone(ids_BP, torch.ones_like(ids_BP), slots)
        assert hidden.dtype == dtype
        (hidden[:, 2:].float() * weights).sum().backward()
        assert slots.slots_LBKD.grad.dtype == torch.float32
        gradients.append(slots.slots_LBKD.grad.flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


# ---- gradient checkpointing


def two_towers(backbone, runs):
    """Gradients of both towers' slots when both are encoded before the one backward, as in a training step."""
    backbone.train()
    first = next(backbone.blocks[0].children())
    handle = first.register_forward_pre_hook(lambda *_: runs.append(1))
    user, item = make_slots([0, 1], seed=3), make_slots([4], blocks=(0, 2), seed=4)
    user_ids, item_ids = make_ids(8, seed=5), make_ids(6, seed=6)
    users = backbone(user_ids, torch.ones_like(user_ids), user)[:, -1]
    items = backbone(item_ids, torch.ones_like(item_ids), item)[:, -1]
    loss = (users @ items.T).sigmoid().sum()
    gradients = torch.autograd.grad(loss, [user.slots_LBKD, item.slots_LBKD], retain_graph=True)
    again = torch.autograd.grad(loss, [user.slots_LBKD, item.slots_LBKD])
    handle.remove()
    assert backbone.injector.current is None
    return loss, [*gradients, *again]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_recomputes_and_changes_nothing(kind):
    """Each tower's blocks are recomputed with its own slots, also when the graph is gone through backwards twice."""
    stored, recomputed = [], []
    loss, gradients = two_towers(make_backbone(kind), stored)
    same_loss, same_gradients = two_towers(make_backbone(kind, gradient_checkpointing=True), recomputed)
    assert len(recomputed) == 3 * len(stored), "each forward once, and once more for each backward"
    torch.testing.assert_close(same_loss, loss, atol=0, rtol=0)
    for gradient, expected in zip(same_gradients, gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-5)


class Toy(nn.Module):
    """A block that depends on all positions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h_BTD):
        return h_BTD + torch.tanh(self.linear(h_BTD)).cumsum(1)


def toy_gradients(recompute):
    """Return the gradients of two towers through toy blocks; `recompute` checkpoints whole calls, hooks included."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([Toy(), Toy()])
    injector = SlotInjector(blocks)

    def encode(slots):
        hidden = torch.ones(1, 3, 4)
        with injector.inject(slots):
            for block in blocks:
                keywords = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), injector.reinject())}
                hidden = checkpoint(block, hidden, **keywords) if recompute else block(hidden)
        return hidden[:, 1:].square().sum()

    towers = [torch.randn(2, 1, 1, 4, requires_grad=True) for _ in range(2)]
    user, item = (encode(Slots(slots_LBKD, torch.zeros(1, 1, dtype=torch.long), (0, 1))) for slots_LBKD in towers)
    first = torch.autograd.grad(user * item, towers, retain_graph=True)
    return *first, *torch.autograd.grad(user * item, towers)


def test_a_block_that_is_recomputed_with_its_hooks_gets_its_own_slots():
    """Releases of transformers differ in whether a checkpoint holds a block's hooks. Here it does."""
    torch.testing.assert_close(toy_gradients(recompute=True), toy_gradients(recompute=False))


# ---- slots come and go


def test_slots_are_gone_after_a_pass_and_after_an_error():
    backbone, ids_BP = make_backbone("llama"), make_ids(TEXT)
    assert hooks(backbone) == BLOCKS
    mask_BP, slots = torch.ones_like(ids_BP), make_slots([0, 1])
    plain = backbone(ids_BP, mask_BP)
    backbone(ids_BP, mask_BP, slots)
    assert hooks(backbone) == BLOCKS

    faults = [
        (IndexError, ids_BP + 10_000, slots),  # inside the model, before its blocks
        (RuntimeError, ids_BP, replace(slots, positions_BK=slots.positions_BK + 100)),  # in the first hook
        (IndexError, ids_BP, replace(slots, blocks=(0, 1, BLOCKS))),  # no such block
        (ValueError, ids_BP, replace(slots, blocks=(0, 1))),  # slots for three blocks, two named
    ]
    for error, ids, wrong in faults:
        with pytest.raises(error):
            backbone(ids, mask_BP, wrong)
        assert hooks(backbone) == BLOCKS
        assert backbone.injector.current is None
    torch.testing.assert_close(backbone(ids_BP, mask_BP), plain, atol=0, rtol=0)


def test_slots_of_one_thread_reach_no_other():
    """Two passes that overlap in every block: each waits there for the other."""
    backbone, ids_BP = make_backbone("bert"), make_ids(TEXT)
    mask_BP, given = torch.ones_like(ids_BP), [make_slots([0, 1]), make_slots([2, 3], blocks=(1,), seed=9), None]
    expected = [backbone(ids_BP, mask_BP, slots) for slots in given]
    barrier = Barrier(len(given), timeout=60)

    def meet(*_):
        barrier.wait()

    for block in backbone.blocks:
        block.register_forward_pre_hook(meet)
    with ThreadPoolExecutor(len(given)) as threads:
        together = list(threads.map(lambda slots: backbone(ids_BP, mask_BP, slots), given))
    for alone_BTD, hidden_BTD in zip(expected, together, strict=True):
        torch.testing.assert_close(hidden_BTD, alone_BTD)
    assert not torch.allclose(expected[0], expected[1])
