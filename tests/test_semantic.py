"""The neighbour model `semantic`: by hand, its cosines against the language model, and new items in a bundle."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse

import rarec
from rarec.bundle.bundle import TEXTS
from rarec.config.method import Lora
from rarec.config.neighbours import Neighbours
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.evaluation.results import part_title
from rarec.models.encode import text_vectors
from rarec.models.language_model import with_adapter, without_adapter
from rarec.neighbours.base import plain_texts
from rarec.neighbours.semantic import Meanings, Semantic, directions
from tests.test_items import add

VECTORS_ND = np.array([[3, 0], [1, 0], [2, 3], [2, -3], [0, 0]], np.float32)
"""Four texts, whose mean is (2, 0), and an item without text."""


def fitted(vectors_ND, top=9):
    section = Neighbours(top=top)
    model = Semantic(section.config_of("semantic"), None)
    model.vectors_ND = vectors_ND
    return model.fit(SimpleNamespace(n_items=5))


def test_vectors_lose_their_mean_and_their_length_and_no_text_stays_nothing():
    expected = [[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]]
    assert directions(VECTORS_ND) == pytest.approx(np.array(expected))


def test_neighbours_are_the_items_at_an_acute_angle_best_first():
    turned_ND = np.array([[1, 0], [4, 3], [0, 1], [-5, -4], [0, 0]], np.float32)  # the mean is zero
    table = fitted(turned_ND).toarray()
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 0] = 0.8
    expected[1, 2] = expected[2, 1] = 0.6
    assert table == pytest.approx(expected)
    best = fitted(turned_ND, top=1)
    assert best.getrow(1).indices.tolist() == [0]


def test_a_table_without_a_language_model_is_refused():
    with pytest.raises(UserError, match="language model"):
        fitted(None)


def test_a_new_item_is_compared_by_the_catalogues_mean():
    table = sparse.csr_matrix((5, 5), dtype=np.float32)
    vectors = SimpleNamespace(known_ND=VECTORS_ND, encode=lambda texts: np.array([[5, 3]] * len(texts), np.float32))
    known = Meanings(vectors, "untitled", table, top=2)
    near, scores = known.neighbours_of("new", "")
    assert dict(zip(near.tolist(), scores, strict=True)) == pytest.approx({0: 0.5**0.5, 2: 0.5**0.5})
    rows = [tuple(row.values()) for batch in known.added(["new"], [""]) for row in batch.to_pylist()]
    assert {row[:2] for row in rows} == {(5, 0), (5, 2), (0, 5), (2, 5)}


def test_an_item_with_all_its_neighbours_takes_a_new_one_only_if_it_is_nearer_than_the_last():
    table = sparse.csr_matrix(([0.9, 0.8, 0.3, 0.2], ([0, 0, 2, 2], [1, 2, 0, 1])), (5, 5), dtype=np.float32)
    vectors = SimpleNamespace(known_ND=VECTORS_ND, encode=lambda texts: np.array([[5, 3]] * len(texts), np.float32))
    assert Meanings(vectors, "untitled", table, top=2).neighbours_of("new", "")[0].tolist() == [2]


@pytest.mark.slow
def test_vectors_are_the_models_pooled_states_and_lora_does_not_change_them(finished):
    run = open_run(finished)
    texts = [*plain_texts(run.dataset.titles[:5], run.dataset.texts[:5], run.dataset.untitled), ""]
    vectors_ND = text_vectors(run.llm, texts)
    assert not vectors_ND[-1].any()
    words, backbone = run.llm.tokenizer, run.llm.backbone
    for text, vector_D in zip(texts[:-1], vectors_ND, strict=False):
        ids = torch.tensor([[*words.prefix, *words(text), *words.suffix]])
        with torch.no_grad():
            states_BTD = backbone(ids, torch.ones_like(ids))
        assert states_BTD[0, int(backbone.sink) :].mean(0).numpy() == pytest.approx(vector_D, abs=1e-4)
    adapted = with_adapter(run.llm, Lora(), 0)
    for name, parameter in adapted.backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    assert not np.allclose(text_vectors(adapted, texts), vectors_ND, atol=1e-2)
    apart = without_adapter(adapted)
    assert np.allclose(text_vectors(apart, texts), vectors_ND, atol=1e-5)
    own = {id(part) for part in adapted.backbone.parameters()}
    assert all(id(part) in own for part in apart.backbone.parameters())  # no weight is in memory twice


@pytest.mark.slow
def test_an_added_item_has_the_neighbours_of_the_item_that_has_its_words(finished, tmp_path):
    bundle = shutil.copytree(open_run(finished).directory("export"), tmp_path / "bundle")
    known = rarec.load(bundle)
    title, text = known.bundle.catalogue.titles[1], known.bundle.catalogue.texts[1]
    served = rarec.load(add(bundle, f'item,title,brand\nnew,"{title}","{text}"\n'))
    near = served.bundle.near["semantic"]
    assert np.allclose(served.bundle.vectors[TEXTS][-1], known.bundle.vectors[TEXTS][1], atol=1e-5)
    assert near[len(known.items), 1] == pytest.approx(1.0, abs=1e-5)
    assert near[1, len(known.items)] == pytest.approx(1.0, abs=1e-5)
    place = known.place(known.items[:4], title, text)
    listed = served.recommend([known.items[:4]], k=10**6)[0]
    assert next(entry.score for entry in listed if entry.item == "new") == pytest.approx(place.score, abs=1e-4)


def test_a_source_makes_neighbours_by_its_vectors_and_items_without_one_have_none():
    section = Neighbours(models=["lexical", "source:sound"], top=9)
    assert (section.by_name["sound"], section.sources) == ("source:sound", ["sound"])
    model = section.class_of("sound")(section.config_of("sound"), None)
    model.vectors_ND = VECTORS_ND
    assert model.fit(SimpleNamespace(n_items=5)).nnz == 0  # the four are at right angles or opposite
    model.vectors_ND = np.array([[1, 0], [4, 3], [0, 1], [-5, -4], [0, 0]], np.float32)
    assert model.fit(SimpleNamespace(n_items=5)).toarray()[[0, 1], [1, 2]] == pytest.approx([0.8, 0.6])
    assert not model.reads_llm
    assert part_title("sound") == "alike by sound"


@pytest.mark.slow
def test_a_source_is_an_untrained_baseline_and_needs_no_slots(finished, tmp_path):
    known = open_run(finished)
    items = known.dataset.item_ids.whole().to_pylist()
    np.save(tmp_path / "sound.npy", np.random.default_rng(0).normal(size=(len(items) - 3, 4)).astype(np.float32))
    (tmp_path / "ids.txt").write_text("".join(f"{item}\n" for item in items[3:]))
    shutil.copytree(known.root, tmp_path / "run")
    source = f"{{sound: {{items: {tmp_path}/sound.npy, item_ids: {tmp_path}/ids.txt, missing: fallback}}}}"
    models = "[cooccurrence, semantic, source:sound]"
    run = open_run(finished, [f"run.dir={tmp_path}/run", f"sources={source}", f"neighbours.models={models}"])
    run.run(["ids", "neighbours"])
    table_NN = run.neighbours["sound"].table_NN
    assert table_NN[3:, 3:].nnz == table_NN.nnz > 0
    assert list(run.sources) == ["id"]
    assert not (run.directory("neighbours", "sound") / "vectors.npy").exists()
    run.stage("shards").require()  # stays as it was: the prompts have no such slots
    run.run(["evaluate"], fresh=True)
    assert {"sound", "per_layer+id+cheap/without_sound"} <= set(run.ranks()["variant"])
