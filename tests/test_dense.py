"""The dense form of a fusion: one inner product, and the neighbours, give the fusion's scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from rarec.bundle.parts import DenseForm
from rarec.bundle.row import Part, Row
from rarec.errors import UserError
from rarec.neighbours.scores import NEW
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import FusedRanker, NeighbourRanker, VectorRanker

ITEMS, USERS = 30, 5


def vectors(rng, size: int, several: int = 1) -> VectorRanker:
    """A model whose user vector is drawn for each history."""
    items = rng.normal(size=(ITEMS, size)).astype(np.float32)
    table = rng.normal(size=(ITEMS, several, size)).astype(np.float32)
    shaped = (lambda result: result) if several > 1 else (lambda result: result[:, 0])
    return VectorRanker(items, lambda rows, histories: shaped(np.stack([table[h[-1]] for h in histories])))


def neighbours(rng) -> NeighbourRanker:
    table = sparse.random(ITEMS, ITEMS, 0.1, "csr", np.float32, rng)
    return NeighbourRanker(table, 3, 0.7)


def form_of(fusion: FusedRanker) -> DenseForm:
    """Return the form of a fusion whose parts are numbered, but for the last, if there are several."""
    rankers = {str(number): part for number, part in enumerate(fusion.parts)}
    if len(rankers) > 1:
        rankers[NEW] = rankers.popitem()[1]
    tables = {name: part.table_NN for name, part in rankers.items() if isinstance(part, NeighbourRanker)}
    parts = {
        name: Part(name, weight, new_weight, None if name in tables else part.items_NZ, None)
        for (name, part), weight, new_weight in zip(rankers.items(), fusion.weights, fusion.new_weights, strict=True)
    }
    triples = {name: (table.indptr, table.indices, table.data) for name, table in tables.items()}
    return DenseForm(Row("row", parts, triples, 3, 0.7, None), rankers)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([1, 3]), st.sampled_from([0, 0.3, 1]), st.booleans())
def test_inner_products_and_neighbours_are_the_fusion(seed, several, share, listed):
    """New items have weights of their own, and a constant of either sign."""
    rng = np.random.default_rng(seed)
    new_N = rng.random(ITEMS) < share
    parts = [*[neighbours(rng)] * listed, vectors(rng, 4), vectors(rng, 3, several), VectorRanker.of_new(new_N)]
    weights = rng.random((2, len(parts))) * [*[1.0] * (len(parts) - 1), rng.normal()]
    ranker = FusedRanker(tuple(parts), *map(tuple, weights), new_N)
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
    known = np.zeros(ITEMS, bool)
    assert np.array_equal(form_of(FusedRanker((model,), (1.0,), (1.0,), known)).items_NF, model.items_NZ)
    alone = FusedRanker((neighbours(rng),), (1.0,), (1.0,), known)
    assert np.allclose(form_of(alone).scores(batch), alone.scores(batch))
    with pytest.raises(UserError, match="no vectors"):
        form_of(alone).row.check_form()
