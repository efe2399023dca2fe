"""The dense form of a fusion: one inner product, and the neighbours, give the fusion's scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rarec.bundle.parts import DenseForm
from rarec.bundle.row import Part, Row
from rarec.errors import UserError
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import FusedRanker, NeighbourRanker, VectorRanker

ITEMS, USERS = 30, 5


def vectors(rng, size: int, several: int = 1, lacking=None) -> VectorRanker:
    """A model whose user vector is drawn for each history."""
    items = rng.normal(size=(ITEMS, size)).astype(np.float32)
    if lacking is not None:
        items[lacking] = items[~lacking].mean(0)
    table = rng.normal(size=(ITEMS, several, size)).astype(np.float32)
    shaped = (lambda result: result) if several > 1 else (lambda result: result[:, 0])
    return VectorRanker(items, lambda rows, histories: shaped(np.stack([table[h[-1]] for h in histories])), lacking)


def neighbours(rng, lacking=None) -> NeighbourRanker:
    table = sparse.random(ITEMS, ITEMS, 0.1, "csr", np.float32, rng)
    return NeighbourRanker(table, 3, 0.7, lacking)


def form_of(fusion: FusedRanker) -> DenseForm:
    """Return the form of a fusion whose parts are numbered."""
    rankers = {str(number): part for number, part in enumerate(fusion.parts)}
    tables = {name: part.table_NN for name, part in rankers.items() if isinstance(part, NeighbourRanker)}
    parts = {
        name: Part(name, weight, slope, False, None if name in tables else part.items_NZ, part.lacking_N)
        for (name, part), weight, slope in zip(rankers.items(), fusion.weights, fusion.slopes, strict=True)
    }
    triples = {name: (table.indptr, table.indices, table.data) for name, table in tables.items()}
    return DenseForm(Row("row", parts, triples, 3, 0.7, None), rankers)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.booleans(), st.booleans(), st.booleans())
def test_inner_products_and_neighbours_are_the_fusion(seed, several, gaps, listed, listed_first):
    """Whether a model's vectors or a neighbour table predict what other parts lack."""
    rng = np.random.default_rng(seed)
    lacking = (rng.random(ITEMS) < 0.3) if gaps else None
    if gaps:
        lacking[0] = False
    parts = [vectors(rng, 4), vectors(rng, 3, several, lacking), vectors(rng, 1)]
    parts += [neighbours(rng, lacking)] * listed
    slopes = rng.normal(size=len(parts))
    if listed_first:
        parts, slopes = [neighbours(rng), *parts[1:]], np.abs(slopes)
    ranker = FusedRanker(tuple(parts), tuple(rng.random(len(parts))), (1.0, *slopes[1:]))
    histories = [rng.integers(0, ITEMS, 4) for _ in range(USERS)]
    batch = EvalBatch(np.arange(USERS), histories, np.zeros(USERS, np.int64))
    form = form_of(ranker)
    form.row.check_form()
    users = form.users(histories)
    scores = (users @ form.items_NF.T).max(1)
    for name, weight_N in form.row.table_weights.items():
        scores = scores + weight_N * form.rankers[name].scores(batch)
    assert np.allclose(scores, ranker.scores(batch), atol=1e-4)
    assert np.allclose(form.scores(batch), ranker.scores(batch), atol=1e-4)
    sums = [form.row.whole(form.row.shares(*own), own[1]) for own in zip(users, histories, strict=True)]
    assert np.allclose(sums, ranker.scores(batch), atol=1e-4)
    dense = (users @ form.items_NF.T).max(1)
    best = form.best(
        users, histories, [np.argsort(-of)[: 5 + len(set(h))] for of, h in zip(dense, histories, strict=True)], 5
    )
    for (rows, _), expected in zip(best, ranker.top_k(batch, 5), strict=True):
        assert rows.tolist() == expected.tolist()


def test_neighbours_alone_are_ranked_and_have_no_table_of_vectors():
    rng = np.random.default_rng(0)
    model, batch = vectors(rng, 4), EvalBatch(np.arange(1), [np.arange(3)], np.zeros(1, np.int64))
    assert np.array_equal(form_of(FusedRanker((model,), (1.0,), (0.0,))).items_NF, model.items_NZ)
    alone = FusedRanker((neighbours(rng),), (1.0,), (0.0,))
    assert np.allclose(form_of(alone).scores(batch), alone.scores(batch))
    with pytest.raises(UserError, match="no vectors"):
        form_of(alone).row.check_form()


def test_an_item_that_its_neighbours_would_harm_is_in_no_table():
    rng = np.random.default_rng(0)
    lacking = np.arange(ITEMS) < 3
    harmed = FusedRanker((neighbours(rng), vectors(rng, 4, 1, lacking)), (1.0, 1.0), (1.0, -1.5))
    batch = EvalBatch(np.arange(1), [np.arange(3)], np.zeros(1, np.int64))
    assert np.allclose(form_of(harmed).scores(batch), harmed.scores(batch), atol=1e-4)
    with pytest.raises(UserError, match="VARIANT"):
        form_of(harmed).row.check_form()
