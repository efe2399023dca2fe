"""A retrained ID model in a bundle: mapped into the space of the old one, measured, or refused."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rarec
from rarec import cli_bundle
from rarec.bundle.realign import fit_map, realign
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.export import write_targets
from rarec.export.rarec_client import Client
from rarec.ids.source import MappedUsers, Source
from tests.recommending import histories, with_items


@pytest.fixture
def recommender(run, tmp_path):
    return rarec.load(shutil.copytree(run.directory("export"), tmp_path / "bundle"))


def rotated(source: Source, seed: int, stretch: float, noise: float = 0.0) -> Source:
    """Return an ID model whose space is rotated and stretched."""
    rng = np.random.default_rng(seed)
    rotation = stretch * np.linalg.qr(rng.normal(size=(source.dim, source.dim)))[0].astype(np.float32)
    items = source.items_NE @ rotation + noise * rng.normal(size=source.items_NE.shape)
    users = MappedUsers(source.users, source.items_NE, rotation, np.zeros(source.dim, np.float32))
    return replace(source, items_NE=items.astype(np.float32), users=users)


@given(seed=st.integers(0, 10**6), stretch=st.floats(0.1, 10), size=st.integers(2, 6))
def test_a_rotation_is_found_exactly(seed, stretch, size):
    rng = np.random.default_rng(seed)
    new = rng.normal(size=(60, size))
    old = new @ np.linalg.qr(rng.normal(size=(size, size)))[0] * stretch
    result = fit_map(new, old)
    assert result.explained == pytest.approx(1, abs=1e-4)
    assert np.allclose(result(new), old, atol=1e-2 * stretch)


def test_another_number_of_dimensions_takes_a_regression():
    rng = np.random.default_rng(0)
    new = rng.normal(size=(200, 6))
    assert fit_map(new, new @ rng.normal(size=(6, 4))).kind == "ridge"
    assert fit_map(new, rng.normal(size=(200, 4))).explained < 0.1


def test_the_same_model_in_another_space_recommends_the_same(run, recommender, tmp_path):
    """Rows are another dataset's: in another order, without one item."""
    ids, order = list(run.dataset.item_ids), np.random.default_rng(1).permutation(run.dataset.n_items)[1:]
    facts, models = recommender.bundle.facts["sources"], {}
    for name, source in recommender.bundle.sources.items():
        turned = rotated(source, 3, 2.5)
        settings = {"users": {"kind": "mapped", "inner": facts[name]["users"]}}
        moved = replace(turned, items_NE=turned.items_NE[order], manifest={"settings": settings})
        models[name] = moved
    _, figures = realign(recommender.parts, models, [ids[row] for row in order], tmp_path / "bundle-2")
    assert figures["id"]["items_explained"] > 0.99
    users = histories(run, ["u001", "u002"])
    assert figures["overlap@10"] > 0.9
    before, after = recommender.recommend(users, 10), rarec.load(tmp_path / "bundle-2").recommend(users, 10)
    shared = [len({item.item for item in a} & {item.item for item in b}) for a, b in zip(before, after, strict=True)]
    assert min(shared) >= 8


@pytest.mark.slow
def test_a_retrained_model_is_taken_over(run, recommender, tmp_path):
    """Another seed trains another space; a version of the bundle holds the new model and its encoder."""
    overrides, directory = [f"run.dir={tmp_path / 'run'}", "run.seed=5"], tmp_path / "bundle-2"
    open_run(run.file, overrides).run(["prepare", "ids"])
    cli_bundle.realign(recommender.bundle.directory, run.file, overrides, least=-10, out=directory)
    served = rarec.load(directory)
    assert -10 < served.bundle.manifest["versions"][0]["realigned"]["id"]["items_explained"] <= 1
    users = [*histories(run, ["u001", "u002"]), []]
    assert len(served.recommend(users, 10)[0]) == 10
    assert not np.allclose(served.user_vectors(users[:2]), recommender.user_vectors(users[:2]))
    folder = tmp_path / "served"
    write_targets(rarec.load(directory), ["faiss", "onnx"], folder, say=lambda line: None)
    result = Client(folder).recommend(users, 10)
    for entry, other in zip(result, served.recommend(users, 10, fallback="none"), strict=True):
        assert [score for *_, score in entry] == pytest.approx([score for *_, score in other], rel=1e-3)
    (tmp_path / "new.csv").write_text("item,title,brand\nn1,lamp,\n")
    added = with_items(directory, tmp_path / "new.csv")
    assert rarec.load(added).recommend([["n1", users[0][0]]], 3).unknown == [0]


def test_a_model_that_does_not_fit_is_refused_and_nothing_is_left(run, recommender, tmp_path):
    ids = list(run.dataset.item_ids)
    sources = recommender.bundle.sources
    noisy = {name: rotated(source, 3, 1.0, noise=50.0) for name, source in sources.items()}
    with pytest.raises(UserError, match="explains") as error:
        realign(recommender.parts, noisy, ids, tmp_path / "out")
    assert "--least" in error.value.remedy
    few = {name: replace(source, items_NE=source.items_NE[:5]) for name, source in sources.items()}
    with pytest.raises(UserError, match="5 items"):
        realign(recommender.parts, few, ids[:5], tmp_path / "out")
    with pytest.raises(UserError, match="no ID model"):
        realign(recommender.parts, {}, ids, tmp_path / "out")
    assert not (tmp_path / "out").exists()
