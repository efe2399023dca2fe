"""Alignment diagnostics: each figure against a small example worked by hand, then a whole run's JSON and report."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rarec.config.method import Readout
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.evaluation.collapse import (
    ALIGNMENT_FIELDS,
    NORM_FACTOR,
    effective_rank,
    linear_cka,
    mean_cosine,
    warnings,
)
from rarec.evaluation.diagnostics import SideSample, diagnose, nearest_rows, variant_diagnostics
from rarec.models.alignment import AlignmentModule, SlotShape
from rarec.models.backbone import FrozenBackbone
from rarec.models.llm_attention import slot_attention, slot_shares
from rarec.models.slots import Slots
from rarec.models.towers import RaRec, ReadoutModule, SideBatch, Tower
from rarec.prompts import Encoded, TextTokenizer
from rarec.report.html import REPORT, write_report
from rarec.report.plots import alignment
from rarec.stages.results import directories
from rarec.stages.run import Run
from rarec.storage.artefacts import read_manifest
from rarec.storage.files import read_json, write_json
from tests.synthetic import tiny_model, tiny_tokenizer

HIDDEN, BLOCKS = 32, 2


# ---- geometry


def points(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_is_one_for_a_rotation_with_any_scale_and_shift():
    x = points(20, 5, 0)
    rotation, _ = torch.linalg.qr(points(5, 5, 1))
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)


def test_cka_by_hand():
    """Kernels off the diagonal hold six pairs. x: 2 pairs of +1, 4 of -1; so row sums -1 and a sum of -4; y alike.

    HSIC(x, x) = (12 + 16/6 - 4) / 4 = 8/3. Of the products of x and y four pairs are -1 and two +1: HSIC(x, y) =
    (-4 + 16/6 - 4) / 4 = -4/3. The ratio is -1/2: no more than chance, of four things.
    """
    x, y = torch.tensor([[1.0], [1], [-1], [-1]]), torch.tensor([[1.0], [-1], [1], [-1]])
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, y) == pytest.approx(-0.5)


def test_cka_is_its_definition_over_all_quadruples():
    """Unbiased HSIC is the mean of K_ij (L_ij + L_kl - 2 L_ik) over different i, j, k and l."""
    x, y = points(7, 5, 0), points(7, 3, 1)

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        quads = itertools.permutations(range(7), 4)
        return float(np.mean([k[a, b] * (m[a, b] + m[c, d] - 2 * m[a, c]) for a, b, c, d in quads]))

    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))
    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-9)


def test_cka_of_unrelated_vectors_is_about_zero_however_many_directions_they_have():
    assert abs(linear_cka(points(64, 500, 0), points(64, 500, 1))) < 0.05
    assert abs(linear_cka(points(64, 2, 0), points(64, 500, 1))) < 0.05


def test_what_cannot_be_said_of_vectors_is_none():
    same, one, broken = torch.ones(5, 3) * 0.1, torch.ones(1, 3), torch.full((4, 3), math.nan)
    assert linear_cka(same, points(5, 3, 0)) is None
    assert linear_cka(points(3, 3, 1), points(3, 3, 0)) is None
    assert linear_cka(broken, points(4, 3, 0)) is None
    assert [mean_cosine(one), mean_cosine(broken), effective_rank(broken)] == [None, None, None]
    assert [effective_rank(same), effective_rank(one)] == [0, 0]


def test_effective_rank_by_hand():
    """Four corners of a square vary in two directions alike; singular values 3 to 1 give exp(H(3/4, 1/4))."""
    square = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert effective_rank(square + 5) == pytest.approx(2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(square * torch.tensor([3.0, 1])) == pytest.approx(math.exp(entropy))
    assert effective_rank(torch.arange(5.0)[:, None] * torch.tensor([1.0, 2, 3])) == pytest.approx(1)


def test_mean_cosine_by_hand():
    """Of three pairs two are at right angles and one points the same way."""
    assert mean_cosine(torch.tensor([[1.0, 0], [5, 0], [0, 2]])) == pytest.approx(1 / 3)
    assert mean_cosine(torch.tensor([[1.0, 0], [-2, 0]])) == pytest.approx(-1)


def test_nearest_rows_over_chunks_are_those_of_the_whole_table(monkeypatch):
    monkeypatch.setattr("rarec.evaluation.diagnostics.TABLE_ROWS", 7)
    table, queries = points(40, 6, 0).to(torch.bfloat16), points(3, 6, 1).float()
    table[11] = 0
    cosines, rows = nearest_rows(table, queries, 5)
    whole = torch.nn.functional.cosine_similarity(queries[:, None], table.float()[None], dim=-1)
    expected = whole.topk(5)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(cosines, expected.values)
    assert nearest_rows(table[:2], queries, 5)[1].shape == (3, 2)


# ---- attention


@pytest.mark.parametrize("causal", [False, True])
def test_even_attention_gives_slots_their_share_of_the_positions(causal):
    """Two slots, then three text positions, then padding. Seeing all, each gives 2/5; causally 2/3, 2/4 and 2/5."""
    slots, text = torch.tensor([[1, 1, 0, 0, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1, 0]])
    seen = (slots + text).bool().expand(6, 6)
    seen = seen.tril() if causal else seen
    weights = (seen / seen.sum(-1, keepdim=True)).expand(1, 4, 6, 6)
    expected = 2 / 3 + 2 / 4 + 2 / 5 if causal else 3 * 2 / 5
    assert slot_attention(weights, slots, text).tolist() == pytest.approx([expected, expected, 3])


def test_attention_on_slots_by_hand():
    """One text position, two heads: (.7, .3) and (.2, .8) over a slot and itself; slots ask nothing."""
    weights = torch.tensor([[[[0.9, 0.1], [0.7, 0.3]], [[0.5, 0.5], [0.2, 0.8]]]])
    sums = slot_attention(weights, torch.tensor([[1, 0]]), torch.tensor([[0, 1]]))
    assert sums.tolist() == pytest.approx([0.45, 0.5, 1])


def make_model(
    kind: str = "llama", blocks: tuple[int, ...] = (0, 1), projections: bool = True, vectors: int = 1
) -> RaRec:
    """Two towers over a tiny model, with one source of four dimensions."""
    backbone = FrozenBackbone(tiny_model(kind, blocks=BLOCKS, hidden=HIDDEN), "last")

    def tower() -> Tower:
        alignment = AlignmentModule({"id": SlotShape(vectors, 4)}, blocks, HIDDEN, 2, projections)
        for _, source in alignment.named_sources():
            source.reset(torch.Generator().manual_seed(0), spread=1.0)
        return Tower(alignment, ReadoutModule(HIDDEN, Readout(pool="last", whiten=False, head=False)))

    return RaRec(backbone, tower(), tower(), scale=1.0, learn_scale=False).eval()


def make_batch(seed: int = 0) -> SideBatch:
    """Two prompts of different length with slots at different places."""
    ids = torch.randint(0, 90, (2, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    positions = torch.tensor([[1, 2, 3], [0, 1, 4]])
    return SideBatch(ids, mask, positions, {"id": torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1))})


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert"])
def test_shares_are_those_of_the_weights_that_transformers_returns(kind):
    model, batch = make_model(kind), make_batch()
    trunk = model.backbone.trunk
    before = trunk.config._attn_implementation
    shares = slot_shares(model, "user", [batch, batch])
    assert before == "sdpa"
    assert trunk.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.backbone.blocks.modules())
    trunk.set_attn_implementation("eager")
    slots_LBKD, _ = model.user.alignment(batch.vectors)
    with torch.no_grad(), model.backbone.injector.inject(Slots(slots_LBKD, batch.positions_BK, (0, 1))):
        output = trunk(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, output_attentions=True, use_cache=False)
    text = [(0, at) for at in (0, 4, 5, 6, 7, 8)] + [(1, at) for at in (2, 3, 5)]
    for share, weights in zip(shares, output.attentions, strict=True):
        mass = [weights[b, :, q, batch.positions_BK[b]].sum(-1).mean().item() for b, q in text]
        assert share.share == pytest.approx(np.mean(mass), abs=1e-6)
        visible = [int(batch.mask_BT[b].sum()) if kind == "bert" else q + 1 for b, q in text]
        slots = [3 if kind == "bert" else sum(at <= q for at in batch.positions_BK[b].tolist()) for b, q in text]
        assert share.even == pytest.approx(np.mean(np.divide(slots, visible)), abs=1e-6)


def test_where_no_attention_weights_can_be_had_there_are_no_rows(monkeypatch):
    model, batch = make_model(), make_batch()

    def refuse(implementation: str) -> None:
        raise ValueError(f"{implementation} is not supported")

    monkeypatch.setattr(model.backbone.trunk, "set_attn_implementation", refuse)
    assert slot_shares(model, "user", [batch]) == []
    monkeypatch.setattr(model.backbone.trunk, "set_attn_implementation", lambda implementation: None)
    assert slot_shares(model, "user", [batch]) == []  # it says nothing, and goes on without weights


# ---- a variant's figures


def make_sample(side: str = "item", count: int = 6, vectors: int = 1) -> SideSample:
    rng = np.random.default_rng(0)
    prompts = [Encoded(rng.integers(8, 60, 4 + at).astype(np.int32), {"id": 1}) for at in range(count)]
    return SideSample(
        side, [f"{side} {at}" for at in range(count)], prompts, {"id": rng.normal(size=(count, vectors, 4))}
    )


def test_norms_and_words_by_hand():
    """W = 0 makes every p the bias; bias and instructions are chosen: twice a word's embedding, norm 6."""
    model, tokenizer = make_model(), TextTokenizer(tiny_tokenizer(encoder=False))
    table = model.backbone.model.get_input_embeddings().weight
    word = tokenizer("lamp")[0]
    _, source = model.item.alignment.named_sources()[0]
    with torch.no_grad():
        source.weight_LDE.zero_()
        source.bias_LD[0], source.bias_LD[1] = 2 * table[word], 0
        source.bias_LD[1, 0] = -5
        source.instructions_LMD.zero_()
        source.instructions_LMD[..., 3] = 6
    sample = make_sample()
    found = diagnose(model, [sample], tokenizer, batch_size=4)
    norms = [(row["block"], row["projection_norm"], row["instruction_norm"]) for row in found["blocks"]]
    assert norms == [(0, pytest.approx(2 * float(table[word].norm())), 6), (1, 5, 6)]
    tokens = np.concatenate([prompt.tokens_T for prompt in sample.prompts])
    assert found["blocks"][0]["text_norm"] == pytest.approx(float(table[tokens].norm(dim=-1).median()))
    assert (found["n"], found["blocks"][0]["projection_rank"], found["blocks"][0]["cka_after"]) == (
        {"item": 6},
        0,
        None,
    )
    own = next(row for row in found["words"] if row["slot"] == "item 0")
    assert (own["words"][0], own["cosines"][0]) == ("lamp", pytest.approx(1))
    assert [row["slot"] for row in found["words"]][:3] == ["instruction 1", "instruction 2", "item 0"]


def test_figures_do_not_depend_on_the_size_of_a_pass():
    model, tokenizer = make_model(), TextTokenizer(tiny_tokenizer(encoder=False))
    whole, parts = (diagnose(model, [make_sample("user", 7)], tokenizer, batch_size=size) for size in (7, 3))
    for one, other in zip(whole["blocks"], parts["blocks"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"side", "source"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


def test_attention_begins_with_the_first_block_that_has_slots_and_words_are_of_block_0():
    found = diagnose(make_model(blocks=(1,)), [make_sample()], TextTokenizer(tiny_tokenizer(encoder=False)), 4)
    assert [row["block"] for row in found["attention"]] == [1]
    assert found["words"] == []


def test_word_embeddings_narrower_than_the_blocks_are_compared_with_no_slot():
    model = make_model("electra")
    assert model.backbone.model.get_input_embeddings().embedding_dim == HIDDEN // 2
    found = diagnose(model, [make_sample()], TextTokenizer(tiny_tokenizer(encoder=True)), 4)
    assert found["words"] == []
    assert [row["block"] for row in found["attention"]] == [0, 1]
    assert all(row["text_norm"] > 0 and row["cka_after"] is not None for row in found["blocks"])


def test_instructions_alone_have_norms_and_words_and_no_geometry():
    model = make_model(projections=False)
    found = diagnose(model, [make_sample()], TextTokenizer(tiny_tokenizer(encoder=False)), 4)
    assert all(row[figure] is None for row in found["blocks"] for figure in ("projection_norm", *ALIGNMENT_FIELDS))
    assert all(row["instruction_norm"] > 0 for row in found["blocks"])
    assert [row["slot"] for row in found["words"]] == ["instruction 1", "instruction 2"]
    plots = list(alignment(found))
    assert ["alignment-norms" in plots[0], "alignment-attention" in plots[1], len(plots)] == [True, True, 2]


def test_each_of_several_vectors_of_a_user_has_its_words():
    model = make_model(vectors=3)
    found = diagnose(model, [make_sample("user", vectors=3)], TextTokenizer(tiny_tokenizer(encoder=False)), 4)
    assert [row["slot"] for row in found["words"]][2:6] == [
        "user 0 (vector 1)", "user 0 (vector 2)", "user 0 (vector 3)", "user 1 (vector 1)",
    ]  # fmt: skip
    assert found["blocks"][0]["cka_after"] is not None


def test_a_token_reads_as_its_word():
    tokenizer = TextTokenizer(tiny_tokenizer(encoder=False))
    assert tokenizer.word(int(tokenizer("shirt")[0])) == "shirt"
    assert tokenizer.word(0) == "[PAD]"
    assert len(tokenizer) < 200


# ---- warnings


def diagnostics(run: Run, model: RaRec, say: Any = print) -> dict[str, Any] | None:
    return variant_diagnostics(run.encoder(model), "per_layer", run.config, run.dataset, say)


def block(**figures: Any) -> dict[str, Any]:
    """A healthy block."""
    healthy = {
        "side": "item", "source": "id", "block": 0, "text_norm": 2.0, "projection_norm": 2.5, "instruction_norm": 1.0,
        "projection_cosine": 0.9, "text_cosine": 0.5, "projection_rank": 12.0, "id_rank": 30.0,
        "cka_before": 0.3, "cka_after": 0.4,
    }  # fmt: skip
    return {**healthy, **figures}


def warned(run: Run, blocks: list[dict[str, Any]], share: float = 0.1) -> list[dict[str, str]]:
    attention = [{"side": "item", "block": 0, "share": share, "even": 0.2}]
    return warnings({"blocks": blocks, "attention": attention}, run.config)


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished, [])


def test_a_healthy_alignment_is_not_warned_about(run):
    assert warned(run, [block(), block(block=1)]) == []
    prefix = dict.fromkeys(("projection_norm", *ALIGNMENT_FIELDS))
    assert warned(run, [block(**prefix)]) == []


@pytest.mark.parametrize(
    ("what", "figures", "said", "field"),
    [
        ("norm", {"projection_norm": 2 * NORM_FACTOR + 1}, "5.5 times", "train.lr_slots"),
        ("norm", {"instruction_norm": 0.2}, "0.1 times", "train.lr_slots"),
        (
            "alike",
            {"projection_cosine": 0.9999},
            "mean cosine 0.999900, that of their texts 0.5000",
            "loss.align_weight",
        ),
        (
            "flat",
            {"projection_rank": 1.5},
            "effective rank 1.5, that of the ID vectors 30 (block 0)",
            "loss.align_temperature",
        ),
        ("cka", {"cka_after": 0.3}, "0.300", "loss.align_weight"),
    ],
)
def test_each_warning_names_its_figure_and_a_field(run, what, figures, said, field):
    found = warned(run, [block(**figures)])
    assert [warning["what"] for warning in found] == [what]
    assert said in found[0]["text"]
    assert field in found[0]["advice"]
    assert "item side, source id" in found[0]["text"]


@pytest.mark.parametrize(("share", "what"), [(0.003, ["unseen"]), (0.005, []), (0.95, ["blinding"])])
def test_attention_on_slots_is_nearly_nil_or_nearly_all(run, share, what):
    assert [warning["what"] for warning in warned(run, [block()], share)] == what


def test_a_random_start_is_advised_against(run, finished):
    random = open_run(finished, ["alignment.init=random"])
    assert "alignment.init: ridge (now random)" in warned(random, [block(instruction_norm=0.2)])[0]["advice"]


def test_a_warning_counts_the_blocks_together(run):
    rows = [block(block=at, projection_norm=100.0 if at in (0, 2, 3, 4, 7, 8) else 2.0) for at in range(10)]
    assert "blocks 0, 2 to 4 and 7, 8: projections" in warned(run, rows)[0]["text"]


def test_a_collapsed_alignment_is_warned_about(run):
    """W all but nothing: every item has nearly the same slot."""
    model = run.stage("train", "per_layer").best_model()
    with torch.no_grad():
        for tower in (model.user, model.item):
            for _, source in tower.alignment.named_sources():
                source.weight_LDE.mul_(1e-3)
                source.instructions_LMD.mul_(100)
    said: list[str] = []
    found = diagnostics(run, model, said.append)
    assert found is not None
    alike = [warning for warning in found["warnings"] if warning["what"] == "alike"]
    assert len(alike) == 2
    assert "user side" in alike[0]["text"]
    assert any(warning["what"] == "norm" and "instructions" in warning["text"] for warning in found["warnings"])
    assert all(any(warning["text"] in line for line in said) for warning in found["warnings"])


# ---- a run


def test_a_run_leaves_diagnostics_of_validation_users_and_items(run):
    found = read_json(run.directory("evaluate") / "diagnostics.json")
    assert (found["variant"], found["n"]) == ("per_layer", {"user": 60, "item": 40})
    assert [(row["side"], row["source"], row["block"]) for row in found["blocks"]] == [
        ("user", "id", 0), ("user", "id", 1), ("item", "id", 0), ("item", "id", 1),
    ]  # fmt: skip
    for row in found["blocks"]:
        assert -0.1 < row["cka_before"] < 1.1
        assert 1 <= row["projection_rank"] <= 16
    assert all(0 < row["share"] < 1 for row in found["attention"])
    assert len(found["words"]) == 2 * (run.config.alignment.instructions + 5)
    assert "diagnostics.json" in read_manifest(run.directory("evaluate"), "evaluate")["files"]


def test_users_are_read_up_to_their_validation_target_only(run):
    sample = SideSample.of_users(run.dataset, run.encoder(make_model()), 17)
    user = int(run.dataset.targets("validation").user_rows[0])
    known = run.dataset.sequence(user)[: int(run.dataset.validation_U[user])]
    assert np.array_equal(sample.prompts[0].tokens_T, run.prompts.user(known).tokens_T)


def test_the_report_shows_the_alignment(run):
    page = (run.directory("report") / "report.html").read_text()
    section = page[page.index('<section id="alignment">') :]
    section = section[: section.index("</section>")]
    assert section.count("<svg") == 3
    assert "60 users and 40 items" in section
    warned = read_json(run.directory("evaluate") / "diagnostics.json")["warnings"]
    assert section.count('class="sanity_check worse"') == len(warned)
    assert section.count('class="sanity_check better"') == (not warned)


def page_of(run: Run) -> str:
    """Write the report of a run whose manifests may be out of date, and return it."""
    write_report(run.directory("report"), directories(run), run.config, say=lambda line: None)
    return (run.directory("report") / REPORT).read_text()


def evaluation_with(run: Run, tmp_path: Path, change: Any) -> Run:
    """Copy a run with another diagnostics.json, or without it."""
    copy = shutil.copytree(run.root, tmp_path / "run")
    path = copy / "evaluation" / "diagnostics.json"
    found = change(read_json(path))
    path.unlink()
    if found is not None:
        write_json(path, found)
    return open_run(run.root.parent / "config.yaml", [f"run.dir={copy}"])


def test_an_older_evaluation_is_reported_without(run, tmp_path):
    copy = evaluation_with(run, tmp_path, lambda found: None)
    page = page_of(copy)
    assert 'id="alignment"' not in page


def test_a_healthy_run_says_so_and_a_missing_figure_is_left_out(run, tmp_path):
    copy = evaluation_with(run, tmp_path, lambda found: {**found, "warnings": [], "attention": [], "words": []})
    page = page_of(copy)
    section = page[page.index('<section id="alignment">') :]
    assert section[: section.index("</section>")].count('class="sanity_check better"') == 1
    assert "no attention weights" in section
    assert page.count("<svg") == (run.directory("report") / "report.html").read_text().count("<svg") - 1


def test_a_side_without_a_figure_leaves_its_panel_empty(run, tmp_path):
    def change(found: dict[str, Any]) -> dict[str, Any]:
        rows = [
            row | {"cka_before": None, "cka_after": None} if row["side"] == "user" else row for row in found["blocks"]
        ]
        return {**found, "blocks": rows}

    copy = evaluation_with(run, tmp_path, change)
    page = page_of(copy)
    assert "CKA with the text by block. user id: none; item id: ID vectors (before)" in page


def test_a_row_that_lacks_a_figure_is_named(run, tmp_path):
    def harm(found: dict[str, Any]) -> dict[str, Any]:
        del found["blocks"][1]["cka_after"]
        return found

    copy = evaluation_with(run, tmp_path, harm)
    with pytest.raises(UserError, match=r"diagnostics\.json lacks `cka_after`"):
        page_of(copy)


def test_a_variant_without_slots_has_no_diagnostics(run):
    assert diagnostics(run, run.stage("train", "text_only").best_model()) is None
