"""The losses, by hand, against autograd, and with text-only states stored, not computed (docs/method.md, section 4)."""

from math import exp, log

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from rarec.config.method import Loss, Readout
from rarec.models.alignment import AlignmentModule, SlotShape
from rarec.models.backbone import FrozenBackbone
from rarec.models.encode import text_states
from rarec.models.losses import LossTargets, Objective, align, bpr, false_negatives, sampled_softmax
from rarec.models.towers import Encoding, RaRec, ReadoutModule, Tower, side_batch
from rarec.prompts import Encoded, lay_out
from tests.synthetic import tiny_model

NOTHING = torch.zeros(3, 3, dtype=torch.bool)
OWN = torch.arange(3)
SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 3.0], [-1.0, 0.0, 1.0]])


def mask(*pairs):
    masked_BB = NOTHING.clone()
    for pair in pairs:
        masked_BB[pair] = True
    return masked_BB


def mean(part):
    """Return the mean on one rank that has all rows."""
    return part.summed / part.terms.clamp_min(1)


def softmax(scores_BB, masked_BB, log_q_B):
    return mean(sampled_softmax(scores_BB, masked_BB, torch.arange(len(scores_BB)), log_q_B))


def aligned(ours_LBD, states_LBD, same_BB, temperature):
    return mean(align(ours_LBD, states_LBD, same_BB, torch.arange(ours_LBD.shape[1]), temperature))


def softplus(x):
    return log(1 + exp(x))


# ---- false negatives


def test_false_negatives_by_hand():
    """Users 0 and 2 have the same target 7; user 1 has seen 7; user 2 has seen 5, user 1's target, and its own."""
    targets_B = torch.tensor([7, 5, 7])
    histories_BH = torch.tensor([[1, 2, -1], [7, -1, -1], [5, 7, 3]])
    assert false_negatives(targets_B, histories_BH, targets_B, OWN).tolist() == [
        [False, False, True],  # 5 is a negative of user 0; item 2 is its own target again
        [True, False, True],  # 7 is in the history of user 1
        [True, True, False],  # its own target again, and 5 from the history; the positive itself is never masked
    ]


def test_false_negatives_do_not_depend_on_how_many_items_are_compared_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    targets_B, histories_BH = (torch.from_numpy(rng.integers(0, 9, size)) for size in (6, (6, 7)))
    own_B = torch.arange(6)
    whole = false_negatives(targets_B, histories_BH, targets_B, own_B)
    monkeypatch.setattr("rarec.models.losses.COMPARED", 2 * 36)
    assert torch.equal(false_negatives(targets_B, histories_BH, targets_B, own_B), whole)


# ---- BPR


def test_bpr_by_hand():
    """-ln sigmoid(m) = ln(1 + e^-m). Margins: 2-1 and 2-0; 3-0 and 3-3; 1-(-1) and 1-0."""
    expected = (softplus(-1) + softplus(-2) + softplus(-3) + log(2) + softplus(-2) + softplus(-1)) / 6
    assert mean(bpr(SCORES, NOTHING, OWN)).item() == pytest.approx(expected)


def test_bpr_is_the_mean_over_the_pairs_that_are_left():
    """Without the pair of margin 0 and one of margin 2, four are left."""
    expected = (softplus(-1) + softplus(-3) + softplus(-2) + softplus(-1)) / 4
    assert mean(bpr(SCORES, mask((1, 2), (0, 2)), OWN)).item() == pytest.approx(expected)


# ---- softmax


def test_softmax_by_hand():
    """Rows 2 1 0, 0 3 3, -1 0 1 with positives 2, 3, 1: minus ln of the positive's share."""
    rows = [log(1 + exp(-1) + exp(-2)), log(2 + exp(-3)), log(1 + exp(-1) + exp(-2))]
    assert softmax(SCORES, NOTHING, None).item() == pytest.approx(sum(rows) / 3)


def test_softmax_without_false_negatives():
    rows = [log(1 + exp(-2)), log(2 + exp(-3)), log(1 + exp(-1) + exp(-2))]
    assert softmax(SCORES, mask((0, 1)), None).item() == pytest.approx(sum(rows) / 3)


def test_logq_by_hand():
    """An item drawn often is a negative in many batches; -ln q corrects for that.

    q = 1/2, 1/4, 1/4, so ln 2 and ln 4 are added to the columns: e^score is multiplied by 2, 4, 4.
    """
    log_q_B = torch.tensor([0.5, 0.25, 0.25]).log()
    rows = [
        log((2 * exp(2) + 4 * exp(1) + 4) / (2 * exp(2))),
        log((2 + 4 * exp(3) + 4 * exp(3)) / (4 * exp(3))),
        log((2 * exp(-1) + 4 + 4 * exp(1)) / (4 * exp(1))),
    ]
    assert softmax(SCORES, NOTHING, log_q_B).item() == pytest.approx(sum(rows) / 3)


def test_logq_comes_from_the_counts_of_training_targets():
    """Counts 6, 3, 1, 0 of 10; an item that never was a target counts as 1."""
    objective = Objective(Loss(), torch.tensor([6, 3, 1, 0]), ())
    assert objective.log_q_N.exp().tolist() == pytest.approx([0.6, 0.3, 0.1, 0.1])


def test_a_uniform_logq_changes_nothing():
    uniform = torch.full((3,), 0.01).log()
    torch.testing.assert_close(softmax(SCORES, NOTHING, uniform), softmax(SCORES, NOTHING, None))


# ---- alignment

OURS = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # one block, two rows: directions east and north
STATES = torch.tensor([[[3.0, 0.0], [3.0, 4.0]]])  # east, and cosine 0.6 with east, 0.8 with north


def test_alignment_by_hand():
    """Cosines of row 0 with both states: 1 and 0.6; of row 1: 0 and 0.8. tau = 0.5 doubles them."""
    rows = [log(1 + exp((0.6 - 1) / 0.5)), log(1 + exp((0 - 0.8) / 0.5))]
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert aligned(OURS, STATES, none, 0.5).item() == pytest.approx(sum(rows) / 2)
    both = torch.cat([OURS, STATES]), torch.cat([STATES, STATES])
    second = [log(1 + exp((0.6 - 1) / 0.5)), log(1 + exp((0.6 - 1) / 0.5))]
    assert aligned(*both, none, 0.5).item() == pytest.approx(sum(rows + second) / 4), "the mean over blocks"


def test_alignment_does_not_push_apart_rows_of_the_same_item():
    same = torch.tensor([[False, True], [True, False]])
    assert aligned(OURS, STATES, same, 0.5).item() == 0


def test_alignment_contrasts_k_with_j():
    """Where every row equals its own text and no other, the loss is near 0; where they are swapped, near 2 / tau."""
    pooled = torch.eye(2)[None]
    none = torch.zeros(2, 2, dtype=torch.bool)
    assert aligned(pooled, pooled, none, 0.05).item() < 1e-6
    assert aligned(pooled, pooled.flip(1), none, 0.05).item() == pytest.approx(20, rel=1e-6)


# ---- gradients


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("masked_BB", [NOTHING, mask((0, 1), (2, 0))], ids=["all", "masked"])
def test_gradients_against_finite_differences(masked_BB):
    log_q_B = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    assert gradcheck(lambda scores: mean(bpr(scores, masked_BB, OWN)), doubles(3, 3))
    assert gradcheck(lambda scores: softmax(scores, masked_BB, log_q_B), doubles(3, 3))
    states_LBD = doubles(2, 3, 4).detach() + 1
    assert gradcheck(lambda pooled: aligned(pooled, states_LBD, masked_BB, 0.3), doubles(2, 3, 4))


def test_a_row_without_negatives_gives_no_nan():
    """All users have the same target: nothing to learn, and no number is lost."""
    everything = ~torch.eye(3, dtype=torch.bool)
    scores = SCORES.clone().requires_grad_()
    pooled = torch.randn(2, 3, 4, requires_grad=True)
    losses = [
        mean(bpr(scores, everything, OWN)),
        softmax(scores, everything, torch.tensor([0.5, 0.3, 0.2]).log()),
        aligned(pooled, torch.randn(2, 3, 4), everything, 0.1),
    ]
    assert [loss.item() for loss in losses] == [0, 0, 0]
    sum(losses).backward()
    assert not scores.grad.any()
    assert not pooled.grad.any()


def test_half_masked_rows_have_finite_gradients():
    scores = (SCORES * 1e3).requires_grad_()
    sum([mean(bpr(scores, mask((0, 1), (0, 2)), OWN)), softmax(scores, mask((0, 1), (0, 2)), None)]).backward()
    assert scores.grad.isfinite().all()
    assert not scores.grad[0].any()


# ---- the loss of a step, in one pass

PLAIN = Readout(whiten=False, head=False)
BATCH, CATALOGUE, BLOCKS = 5, 12, (0, 1, 2)


class Step:
    """A batch of a tiny model: prompts of both sides, their text-only states, and the two towers."""

    def __init__(self, kind, **loss):
        torch.manual_seed(0)
        rng = np.random.default_rng(0)
        backbone = FrozenBackbone(tiny_model(kind, blocks=3), "mean", sink=kind != "bert")
        towers = [Tower(self._alignment(vectors), ReadoutModule(32, PLAIN)) for vectors in (2, 1)]
        self.model = RaRec(backbone, *towers, scale=20.0, learn_scale=True)
        self.prompts = [
            [Encoded(rng.integers(1, 200, length).astype(np.int32), {"id": 0}) for length in rng.integers(4, 9, BATCH)]
            for _ in range(2)
        ]
        vectors = [{"id": rng.normal(size=(BATCH, count, 6)).astype(np.float32)} for count in (2, 1)]
        self.batches = [side_batch(*parts, 0) for parts in zip(self.prompts, vectors, towers, strict=True)]
        self.rows = torch.tensor([3, 4, 3, 5, 6])
        self.objective = Objective(Loss(**loss), torch.arange(CATALOGUE), BLOCKS)

    @staticmethod
    def _alignment(vectors):
        module = AlignmentModule({"id": SlotShape(vectors, 6)}, BLOCKS, 32, 2, True)
        module.sources["id"].reset(torch.Generator().manual_seed(1), spread=0.5)
        return module

    def states(self, prompts, dtype):
        """Return the prompts' text-only states as a training step reads them."""
        stored_BLD = text_states(self.model.backbone, prompts, BLOCKS, 0, dtype=dtype, batch_size=2)
        return torch.from_numpy(stored_BLD.astype(np.float32))

    def loss(self, user_states_BLD, item_states_BLD):
        histories_BH = torch.tensor([[1, 4], [2, -1], [7, 8], [9, 3], [0, -1]])
        targets = LossTargets(torch.arange(BATCH), self.rows, histories_BH, user_states_BLD, item_states_BLD, BATCH)
        encoded = self.encoded()
        return self.objective(self.model, encoded["user"], encoded["item"], targets)

    def encoded(self):
        return self.model(dict(zip(("user", "item"), self.batches, strict=True)))

    def gradients(self, terms):
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(terms.total, parameters)])


def test_distillation_draws_each_user_to_the_own_id_vector_by_hand():
    step = Step("bert", distil_weight=0.5, align_weight=0.0, align_temperature=0.2)
    step.model.user.student = torch.nn.Linear(32, 6, bias=False)
    states = [step.states(prompts, "float32") for prompts in step.prompts]
    terms = step.loss(*states)
    student = torch.nn.functional.normalize(step.model.user.student(step.encoded()["user"].vectors_BZ), dim=1)
    teacher = torch.nn.functional.normalize(step.batches[0].vectors["id"].mean(1), dim=1)
    chances = (student @ teacher.T / 0.2).softmax(1).diagonal()
    assert terms.distil.item() == pytest.approx(-chances.log().mean().item(), rel=1e-5)
    assert terms.total.item() == pytest.approx(terms.recommendation.item() + 0.5 * terms.distil.item(), rel=1e-5)
    assert torch.autograd.grad(terms.distil, step.model.user.student.weight)[0].abs().sum() > 0
    step.model.eval()
    assert step.encoded()["user"].distilled is None


@pytest.mark.parametrize("recommendation", ["bpr", "softmax"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_loss_equals_that_of_two_passes(kind, recommendation):
    """The paper passes a batch through the frozen model twice, text only and hybrid. Here the first pass was stored."""
    step = Step(kind, recommendation=recommendation, align_weight=0.5)
    layouts = [lay_out(prompts, {}, 0) for prompts in step.prompts]
    second_pass = [
        step.model.backbone.text_states(
            torch.from_numpy(laid.ids_BT), torch.from_numpy(laid.mask_BT), BLOCKS
        ).transpose(0, 1)
        for laid in layouts
    ]
    computed = step.loss(*second_pass)
    exact = step.loss(*(step.states(prompts, "float32") for prompts in step.prompts))
    halved = step.loss(*(step.states(prompts, "float16") for prompts in step.prompts))

    assert computed.total.item() == pytest.approx(computed.recommendation.item() + 0.5 * computed.align.item())
    assert computed.align > 0.1
    torch.testing.assert_close(exact.total, computed.total, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(step.gradients(exact), step.gradients(computed), atol=1e-6, rtol=1e-5)
    # float16 keeps 11 bits: cosines move by less than 2^-10, and tau = 0.1 makes ten times that of it
    torch.testing.assert_close(halved.total, computed.total, atol=1e-2, rtol=0)
    torch.testing.assert_close(halved.recommendation, computed.recommendation, atol=0, rtol=0)


def test_the_objective_puts_the_parts_together():
    """Its terms are the functions above, on the scores, the masks and the blocks that have both slots and states."""
    step = Step("bert", temperature=0.05)
    states = [step.states(prompts, "float32") for prompts in step.prompts]
    users, items = step.encoded().values()
    terms = step.loss(*states)
    histories_BH = torch.tensor([[1, 4], [2, -1], [7, 8], [9, 3], [0, -1]])
    masked_BB = false_negatives(step.rows, histories_BH, step.rows, torch.arange(BATCH))
    log_q_B = (torch.arange(CATALOGUE).clamp_min(1) / 66).log()[step.rows]  # 0 + 1 + ... + 11 = 66
    scores_BB = users.vectors_BZ @ items.vectors_BZ.T
    torch.testing.assert_close(terms.recommendation, softmax(scores_BB, masked_BB, log_q_B))

    same_items = torch.zeros(5, 5, dtype=torch.bool)
    same_items[0, 2] = same_items[2, 0] = True  # item 3 twice
    none = torch.zeros(5, 5, dtype=torch.bool)
    expected = aligned(users.projected["id"].mean(2), states[0].transpose(0, 1), none, 0.1)
    expected = expected + aligned(items.projected["id"].mean(2), states[1].transpose(0, 1), same_items, 0.1)
    torch.testing.assert_close(terms.align, expected)


@pytest.mark.parametrize("stored", [(0, 2), (2,), (1, 2)])
def test_only_blocks_with_slots_and_stored_states_are_aligned(stored):
    """Blocks 0 and 1 have slots; the states of `stored` are there, in that order."""
    slots_LBKD = torch.randn(2, 3, 1, 4)
    states = {block: torch.randn(3, 4) for block in range(3)}
    encoding = Encoding(torch.randn(3, 4), slots_LBKD, {"id": slots_LBKD})
    objective = Objective(Loss(), torch.ones(9), stored)
    rows = torch.tensor([1, 2, 3])
    loss = objective.align((0, 1), encoding, torch.stack([states[block] for block in stored], 1), rows, 3)
    shared = [block for block in (0, 1) if block in stored]
    if not shared:
        assert loss == 0
    else:
        expected = aligned(slots_LBKD[shared, :, 0], torch.stack([states[block] for block in shared]), NOTHING, 0.1)
        torch.testing.assert_close(loss, expected)


def test_what_is_compared_with_the_text_is_a_choice():
    """`projected` takes the mean of W e + b over a source's vectors, `all` that of all slots."""
    slots_LBKD = torch.randn(1, 3, 4, 5)
    encoding = Encoding(torch.randn(3, 5), slots_LBKD, {"id": slots_LBKD[:, :, 2:]})
    states_LBD, rows = torch.randn(1, 3, 5), torch.arange(3)
    for pool, pooled in (("projected", slots_LBKD[:, :, 2:]), ("all", slots_LBKD)):
        loss = Objective(Loss(align_pool=pool), torch.ones(9), (0,)).align(
            (0,), encoding, states_LBD.transpose(0, 1), rows, 3
        )
        torch.testing.assert_close(loss, aligned(pooled.mean(2), states_LBD, NOTHING, 0.1))


def test_slots_that_know_no_vectors_are_not_aligned():
    """Text only has no slots, prefix only has none that depend on a user or an item."""
    objective = Objective(Loss(), torch.ones(9), (0,))
    prefix = Encoding(torch.randn(3, 5), torch.randn(1, 3, 2, 5), {})
    text = Encoding(torch.randn(3, 5), None, {})
    for encoding in (prefix, text):
        assert objective.align((0,), encoding, torch.randn(3, 1, 5), torch.arange(3), 3) == 0
