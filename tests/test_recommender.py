"""A bundle is a whole recommender: what it serves is what was evaluated, for every row, without the run."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import rarec
from rarec import cli
from rarec.bundle.bundle import FACTS, Bundle
from rarec.bundle.parts import unknown_users
from rarec.bundle.recommended import Request
from rarec.bundle.rules import diversified
from rarec.bundle.write import describe_slots
from rarec.config import VARIANTS
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.models.build import save_weights
from rarec.ranking.rank import EvalBatch
from rarec.stages.run import Run
from rarec.storage.artefacts import read_manifest
from rarec.storage.directories import MARKER
from rarec.storage.files import read_json
from tests.recommending import exported, histories, recommend, sealed

ROWS = ["id_only", "cheap", "lexical", "text_only", "per_layer", "per_layer+id", "id_only+cheap", "per_layer+id+cheap"]
"""One of each kind: a part alone, with and without vectors, slots or a language model, and fusions of these."""


@pytest.fixture(scope="module")
def run(finished: Path) -> Run:
    return open_run(finished)


@pytest.fixture(scope="module")
def bundle(run) -> Path:
    return run.directory("export")


@pytest.fixture(scope="module")
def recommender(bundle):
    return rarec.load(bundle)


@pytest.fixture
def copied(bundle, tmp_path) -> Path:
    """The bundle alone, elsewhere."""
    return shutil.copytree(bundle, tmp_path / "bundle")


# ---- what is served is what was evaluated


@pytest.mark.parametrize("row", ROWS)
def test_every_row_ranks_as_in_the_evaluation(run, tmp_path, row):
    other = exported(run, tmp_path, f"export.variant={row}")
    moved = shutil.move(other.directory("export"), tmp_path / "elsewhere")
    shutil.rmtree(other.root)
    served = rarec.load(moved)
    assert served.bundle.facts["row"] == row
    test = EvalBatch.of(run.dataset, run.dataset.targets("test"))
    ranks = run.ranks()
    assert served.parts.ranker.ranks(test).tolist() == ranks[ranks.variant == row]["rank"].tolist()


def test_by_default_the_best_row_on_validation_users_is_exported_and_said(run, tmp_path):
    lines = []
    root = shutil.copytree(run.root, tmp_path / "run")
    other = Run(run.file, [f"run.dir={root}", "export.variant=null"], say=lines.append)
    other.make("export", fresh=True)
    rows = read_json(run.directory("evaluate") / "validation.json")
    values = {row["variant"]: row["value"] for row in rows if row["metric"] == "ndcg@10"}
    best = read_json(other.directory("export") / FACTS)["row"]
    assert values[best] == max(values.values())
    assert "best on validation users" in lines[-1]


def test_a_further_bundle_of_a_run_is_one_command_and_the_first_stays(run, tmp_path):
    root = shutil.copytree(run.root, tmp_path / "run")
    first = (root / "bundle" / "manifest.json").read_bytes()
    export = ["export", str(run.file), f"run.dir={root}", "export.variant=id_only", "--out", str(tmp_path / "other")]
    for _ in range(2):  # the second time, it is up to date
        assert CliRunner().invoke(cli.app, export).exception is None
    assert rarec.load(tmp_path / "other").bundle.facts["row"] == "id_only"
    assert (root / "bundle" / "manifest.json").read_bytes() == first
    for words, named in ((["export.variant=text_only"], "--out DIR"), (["--out", str(tmp_path)], str(tmp_path))):
        refused = CliRunner().invoke(cli.app, [*export, *words]).exception
        assert isinstance(refused, UserError)
        assert named in f"{refused.problem} {refused.remedy}"


def test_a_row_that_is_not_in_the_results_is_refused_with_those_that_are(run, tmp_path):
    with pytest.raises(UserError, match=r"`export\.variant`: ease\+id .*\n.*per_layer\+id\+cheap"):
        exported(run, tmp_path, "export.variant=ease+id")


def test_the_slots_reach_the_model(recommender, copied):
    """A slot that is dropped on the way raises no error: the vectors of the user must depend on those of the items."""
    from safetensors.torch import load_file, save_file

    vectors = load_file(copied / "vectors.safetensors")
    vectors["ids/id"] = torch.zeros_like(vectors["ids/id"])
    save_file(vectors, copied / "vectors.safetensors")
    sealed(copied)
    history, blank = [recommender.items[:4]], rarec.load(copied)
    assert not np.allclose(blank.user_vectors(history), recommender.user_vectors(history), atol=1e-3)
    assert not np.allclose(blank.query_vectors(history), recommender.query_vectors(history), atol=1e-3)
    sizes = {name: source["dim"] for name, source in recommender.bundle.facts["sources"].items()}
    of_new = [
        recommender.parts.model.encode_new(
            ["lamp"], [""], {name: np.full((1, dim), value) for name, dim in sizes.items()}
        )
        for value in (np.float32(0), np.float32(1))
    ]
    assert not np.allclose(*of_new, atol=1e-3)


# ---- what a caller may ask


def test_recommendations_are_new_best_first_and_have_ids_titles_and_scores(run, recommender):
    history = histories(run, ["u001"])
    (best,) = recommender.recommend(history, k=5)
    assert len(best) == 5
    assert not {entry.item for entry in best} & set(history[0])
    assert [entry.score for entry in best] == sorted((entry.score for entry in best), reverse=True)
    titles = dict(zip(run.dataset.item_ids, run.dataset.titles, strict=True))
    assert all(entry.title == titles[entry.item] for entry in best)


def test_as_a_table(recommender):
    result = recommender.recommend([recommender.items[:3], recommender.items[5:6]], k=2)
    assert result.to_arrow().column_names == ["user", "rank", "item", "title", "score"]
    table = result.to_pandas()
    assert table.user.tolist() == [0, 0, 1, 1]
    assert table["rank"].tolist() == [1, 2, 1, 2]
    assert table["item"].tolist() == [entry.item for items in result for entry in items]


def test_unknown_items_are_skipped_and_counted(recommender):
    known = recommender.items[:3]
    result = recommender.recommend([["no", *known, "such"], known, []])
    assert result.unknown == [2, 0, 0]
    assert [entry.item for entry in result[0]] == [entry.item for entry in result[1]]
    assert [entry.score for entry in result[0]] == pytest.approx([entry.score for entry in result[1]], rel=1e-5)
    assert len(result[2]) == 10


def test_an_empty_history_gets_popular_items_unless_it_is_said_otherwise(run, recommender):
    best, modelled = (recommender.recommend([["no such item"]], k=3, **own)[0] for own in ({}, {"fallback": "none"}))
    counts = dict(zip(run.dataset.item_ids, run.dataset.train_counts_N.tolist(), strict=True))
    assert [counts[entry.item] for entry in best] == sorted(counts.values(), reverse=True)[:3]
    assert [entry.score for entry in best] == [0, 0, 0]
    assert [entry.score for entry in modelled] == sorted((entry.score for entry in modelled), reverse=True)
    assert modelled[0].score > 0


def test_in_a_row_of_neighbours_alone_no_place_is_arbitrary(run, tmp_path):
    """Those that are listed come first; popular items follow, and none with `none`."""
    served = rarec.load(exported(run, tmp_path, "export.variant=cooccurrence").directory("export"))
    scores_N = served.parts.ranker.scores(unknown_users([np.array([3])]))[0]
    said = [row for row in np.argsort(-scores_N, kind="stable") if scores_N[row] > 0 and row != 3]
    popular = np.argsort(-served.bundle.catalogue.counts_N, kind="stable")
    rest = [row for row in popular if row not in said and row != 3]
    history = [served.items[3]]
    assert 0 < len(said) < len(served.items) - 2
    best, short = (served.recommend([history], k=10**6, **own)[0] for own in ({}, {"fallback": "none"}))
    assert sorted(entry.item for entry in short) == sorted(served.items[row] for row in said)
    assert best[: len(short)] == short
    assert [entry.item for entry in best[len(short) :]] == [served.items[row] for row in rest]
    assert served.recommend([[]], fallback="none")[0] == []


def ids(lists):
    return [[entry.item for entry in items] for items in lists]


def test_rules_are_those_of_a_full_list_that_is_filtered_by_hand(recommender):
    history = recommender.items[:3]
    everything = recommender.recommend([history], k=10**6)[0]
    allowed, denied = recommender.items[5:30:2], recommender.items[10:20]
    result = recommender.recommend([history, history], k=4, allow=[*allowed, "new"], deny=[*denied, 12])
    expected = [entry for entry in everything if entry.item in allowed and entry.item not in denied][:4]
    assert ids(result) == ids([expected, expected])
    assert result.unknown_in_rules == [["new", 12]] * 2
    vectors = recommender.item_vectors([entry.item for entry in everything[:100]])
    order = diversified(np.array([entry.score for entry in everything[:100]], np.float32), vectors, 6, 0.6)
    mixed = recommender.recommend([history], k=6, diversify=0.6)[0]
    assert mixed == [everything[place] for place in order]
    assert mixed != everything[:6]


def test_requests_of_different_rules_share_a_pass(recommender):
    history = recommender.items[:3]
    asked = [
        Request(history, 3),
        Request([], 2),
        Request(history, 5, deny=recommender.items[5:9]),
        Request(history, 4, exclude_seen=False, diversify=0.5),
        Request(history, 6, allow=recommender.items[8:20], fallback="none"),
    ]
    together = recommender.answer(asked)
    assert ids(together) == ids(recommender.answer([own])[0] for own in asked)
    assert list(map(len, together)) == [3, 2, 5, 4, 6]


def test_what_may_be_recommended(recommender):
    history, all_items = recommender.items[:3], len(recommender.items)
    assert len(recommender.recommend([history], k=1000)[0]) == all_items - 3
    assert len(recommender.recommend([history], k=1000, exclude_seen=False)[0]) == all_items
    allowed = recommender.recommend([history], k=1000, allow=recommender.items[2:6], deny=[recommender.items[4]])[0]
    assert {entry.item for entry in allowed} == {recommender.items[3], recommender.items[5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"diversify": 2}, "diversify is 2"),
        ({"fallback": "recent"}, "has no dates"),
        ({"where": "in_stock = true"}, "has no column 'in_stock'"),
    ],
)
def test_what_cannot_be_asked_is_named(recommender, options, message):
    with pytest.raises(UserError, match=message):
        recommender.recommend([recommender.items[:3]], **options)


def test_what_can_be_read_only_once_is_read_once(recommender):
    history = recommender.items[:3]
    expected = recommender.recommend([history], k=3, allow=recommender.items[3:9])
    once = recommender.recommend((map(str, own) for own in [history]), k=3, allow=iter(recommender.items[3:9]))
    assert once == expected
    assert recommender.rerank(iter([iter(history)]), [iter(recommender.items)], 3)[0]
    assert np.array_equal(recommender.user_vectors([iter(history)]), recommender.user_vectors([history]))


@pytest.mark.parametrize(
    ("question", "named"),
    [
        (lambda entry: entry.similar(entry.items[0], 0), "k is 0"),
        (lambda entry: entry.explain(entry.items[:2], entry.items[5], k=0), "k is 0"),
        (lambda entry: entry.compare(entry.items[:2], -1), "k is -1"),
        (lambda entry: entry.rerank([entry.items[:2]], [entry.items], -1), "k is -1"),
        (lambda entry: entry.rerank([entry.items[:2]], [], 3), "1 histories, but 0"),
        (lambda entry: entry.user_vectors([]), "no history"),
        (lambda entry: entry.query_vectors([]), "no history"),
    ],
)
def test_questions_without_an_answer_are_refused(recommender, question, named):
    with pytest.raises(UserError, match=named) as refused:
        question(recommender)
    assert refused.value.remedy


def test_any_number_of_users_together_are_served_as_each_alone(run, recommender):
    everyone = histories(run, list(map(str, run.dataset.user_ids)))[:20]
    together = recommender.recommend(everyone, k=5)
    for history, items in zip(everyone, together, strict=True):
        alone = recommender.recommend([history], k=5)[0]
        assert [entry.item for entry in alone] == [entry.item for entry in items]


def test_similar_items_are_those_of_the_largest_cosine(recommender):
    vectors = recommender.item_vectors()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    item = recommender.items[4]
    result = recommender.similar(item, k=3)
    cosines = unit @ unit[4]
    cosines[4] = -1
    assert [entry.item for entry in result] == [recommender.items[row] for row in np.argsort(-cosines)[:3]]
    assert [entry.score for entry in result] == pytest.approx(np.sort(cosines)[::-1][:3], abs=1e-5)


def test_an_explanation_adds_up_and_names_the_nearest_of_the_history(run, recommender):
    (history,) = histories(run, ["u001"])
    best, other = recommender.recommend([history], k=2)[0]
    explained, less = (recommender.explain(history, entry.item) for entry in (best, other))
    assert explained.title == best.title
    assert {"RA-Rec (per layer)", "ID", "popularity"} <= set(explained.parts)
    difference = sum(explained.parts.values()) - sum(less.parts.values())
    assert difference == pytest.approx(best.score - other.score, abs=1e-4)
    assert {entry.item for entry in explained.nearest} <= set(history)
    assert explained.nearest[0].score == max(entry.score for entry in explained.nearest)


@pytest.mark.parametrize("row", ["per_layer+id+cheap", "id_only+cheap"])
def test_without_any_id_vector_or_training_interaction_every_figure_is_a_number(run, tmp_path, row):
    """No item is known to the ID model; then no item is known to the neighbours either."""
    copied = exported(run, tmp_path, f"export.variant={row}").directory("export")
    for change in (_without_id_vectors, _without_counts):
        change(copied)
        served = rarec.load(copied)
        history, item = served.items[:3], served.items[7]
        explained = served.explain(history, item)
        assert np.isfinite(list(explained.parts.values())).all()
        assert np.isfinite([entry.score for entry in served.recommend([history])[0]]).all()
        if served.bundle.facts["model"]:
            place = served.place(history, "river lamp")
            assert np.isfinite([place.score, *(entry.score for entry in (*place.above, *place.below))]).all()
            assert place.of == len(served.items) - 3 + 1


def _without_id_vectors(bundle: Path) -> None:
    from safetensors.torch import load_file, save_file

    vectors = load_file(bundle / "vectors.safetensors")
    save_file({name: t * (not name.startswith("ids/")) for name, t in vectors.items()}, bundle / "vectors.safetensors")
    sealed(bundle)


def _without_counts(bundle: Path) -> None:
    table = pq.read_table(bundle / "items.parquet")
    zeros = pa.array(np.zeros(len(table), np.int64))
    pq.write_table(table.set_column(3, "train_count", zeros), bundle / "items.parquet")
    sealed(bundle)


# ---- the folder


def test_the_bundle_holds_what_was_trained_and_no_pickle(bundle):
    names = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    models = ("cooccurrence", "transition", "ease", "lexical", "semantic")
    tables = {f"neighbours/{name}.parquet" for name in models}
    tensors = {f"{name}.safetensors" for name in ("alignment", "vectors", "encoders")}
    assert names - {MARKER} == {"manifest.json", FACTS, "items.parquet", "README.md", *tables, *tensors}
    manifest = read_manifest(bundle, "bundle")
    assert {"prepare", "ids/id", "llm", "prompt", "evaluate", "per_layer"} <= set(manifest["made_from"])
    llm = read_json(bundle / FACTS)["model"]["llm"]
    assert {"name", "revision", "config_sha256", "fingerprint"} <= set(llm)


def test_the_card_has_the_figures_of_the_row_and_of_its_rivals(bundle):
    text = (bundle / "README.md").read_text()
    manifest = read_manifest(bundle, "bundle")
    assert f"{manifest['trained_parameters']:,}" in text
    assert "| **RA-Rec (per layer) + ID + cheap** |" in text
    assert "| ID model |" in text
    assert ModelCard(text).data.base_model is None  # it is a folder of this machine, which a hub would refuse


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("text_only", ["no slots"]),
        ("prefix_only", ["2 contextual instructions", "blocks 0, 1"]),
        ("input", ["2 contextual instructions", "vectors of id", "block 0"]),
        ("readout", ["vectors of id", "readout"]),
    ],
)
def test_a_card_says_what_the_variant_has(run, variant, said):
    config = open_run(run.config_file, ["train.blocks=[0,1]"]).config
    text = describe_slots(VARIANTS[variant], config)
    assert [part for part in said if part not in text] == []


def test_half_precision_is_smaller_and_recommends_nearly_the_same(run, recommender, tmp_path):
    half = exported(run, tmp_path, "export.dtype=float16")
    sizes = [(of.directory("export") / "alignment.safetensors").stat().st_size for of in (run, half)]
    trained = read_manifest(half.directory("export"), "bundle")["trained_parameters"]
    assert sizes[0] - sizes[1] == pytest.approx(2 * trained, abs=500)  # of names and shapes
    history = histories(run, ["u001", "u002"])
    whole, again = recommender.user_vectors(history), rarec.load(half.directory("export")).user_vectors(history)
    assert again.dtype == np.float32
    assert not np.array_equal(whole, again)
    assert np.linalg.norm(whole - again) < 0.01 * np.linalg.norm(whole)


def test_what_half_precision_cannot_hold_is_refused(run, tmp_path):
    model = run.stage("train", "per_layer").best_model()
    model.item.readout.heads["text"].bias.data[0] = 1e5
    with pytest.raises(UserError, match=r"item\.readout\.heads\.text\.bias.*float16"):
        save_weights(model, tmp_path, dtype=torch.float16)
    assert not any(tmp_path.iterdir())


# ---- what is refused


def test_the_same_language_model_elsewhere_is_taken(run, copied, tmp_path):
    llm = shutil.copytree(run.config.llm.path, tmp_path / "llm")
    assert recommend(run, "u001", 5, copied, llm=str(llm)) == recommend(run, "u001", 5)


def test_code_of_the_users_own_is_not_imported_unasked(copied):
    facts = read_json(copied / FACTS)
    facts["model"]["settings"]["alignment"]["map"] = "no_such_package:Map"
    sealed(copied, model=facts["model"])
    with pytest.raises(UserError, match=r"no_such_package:Map.*\n.*--trust no_such_package:Map.*trusted"):
        rarec.load(copied)
    with pytest.raises(UserError, match="cannot import no_such_package"):
        rarec.load(copied, trusted=["no_such_package:Map"])


def test_who_opens_a_bundle_runs_no_compiler(copied):
    facts = read_json(copied / FACTS)
    facts["model"]["settings"]["llm"]["compile"] = True
    sealed(copied, model=facts["model"])
    assert not rarec.load(copied).bundle.config.llm.compile


def test_settings_that_say_nothing_of_the_model_are_not_read(copied, tmp_path, monkeypatch):
    """They might name code, which would be imported from the folder that a user stands in."""
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('run').touch()\n")
    monkeypatch.chdir(tmp_path)
    model = read_json(copied / FACTS)["model"]
    for more in ({"ids": {"model": "evil:Model"}}, {"train": {"blocks": None, "variants": ["evil:VARIANT"]}}):
        sealed(copied, model={**model, "settings": {**model["settings"], **more}})
        assert rarec.load(copied).recommend([["i001"]])[0]
        assert not (tmp_path / "run").exists()


def test_a_pickle_is_read_only_if_it_is_trusted_by_name(copied):
    facts = read_json(copied / FACTS)
    facts["model"]["settings"]["llm"]["allow_pickle_weights"] = True
    sealed(copied, model=facts["model"])
    with pytest.raises(UserError, match=r"llm\.allow_pickle_weights.*\n.*trusted"):
        rarec.load(copied)
    assert Bundle.open(copied, ["llm.allow_pickle_weights"])


def test_a_folder_called_llm_is_the_language_model_only_if_it_was_exported(copied):
    (copied / "llm").mkdir()
    assert rarec.load(copied).recommend([["i001"]])[0]


def test_a_table_of_users_cannot_be_served(run):
    from rarec.stages.export import _check_servable

    source = replace(run.sources["id"], manifest={"settings": {"users": {"kind": "table"}}})
    with pytest.raises(UserError, match="any history"):
        _check_servable("id", source)


def test_facts_are_plain(bundle):
    facts = json.loads((bundle / FACTS).read_text())
    assert facts["parts"].keys() >= {"per_layer", "id", "lexical", "popularity"}
    assert all(part.keys() == {"weight", "new_weight"} for part in facts["parts"].values())


def test_a_recommender_that_nobody_holds_is_gone_at_once(run):
    """Nothing in it refers back to it: a service that swaps bundles would keep a language model for each swap."""
    loaded = rarec.load(run.directory("export"), device="cpu")
    loaded.recommend([loaded.items[:2]])
    encoder = loaded.parts.encoder
    held = [*map(weakref.ref, (loaded.parts, loaded.bundle, encoder.prompts, encoder.model))]
    gc.collect()
    gc.disable()
    try:
        del loaded, encoder
        assert [kept() for kept in held] == [None] * len(held)
    finally:
        gc.enable()
