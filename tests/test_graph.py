"""The source `graph`: vectors of the truncated SVD of the transitions, and users who read them."""

from functools import partial

import numpy as np
import pytest
from scipy import sparse

from rarec.config import RunConfig
from rarec.data.engines import open_engine
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.ids.make import factors
from rarec.ids.source import GraphUsers, HistoryRule
from rarec.neighbours.counting import Transition
from tests.conftest import CONFIG

OVERRIDES = ["graph.dim=5", 'prompt.user="{soft:id} {soft:graph} {history}"', "train.variants=[per_layer]"]


def test_products_of_the_vectors_are_the_transitions_up_to_the_smallest_singular_values():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((12, 3)), rng.standard_normal((12, 3))
    graph_NN = left @ right.T
    graph_NN[4], graph_NN[:, 7] = 0, 0
    left_NE, right_NE = factors(sparse.csr_matrix(graph_NN), 3)
    assert np.allclose(left_NE @ right_NE.T, graph_NN, atol=1e-5)
    assert not left_NE[4].any()
    assert not right_NE[7].any()
    again = factors(sparse.csr_matrix(graph_NN), 3)
    assert (again[0] == left_NE).all()
    assert (again[1] == right_NE).all()


def test_a_graph_without_edges_gives_no_vectors_and_one_of_few_items_is_refused():
    left_NE, right_NE = factors(sparse.csr_matrix((9, 9)), 2)
    assert not left_NE.any()
    assert not right_NE.any()
    with pytest.raises(UserError, match=r"graph\.dim.*9 items"):
        factors(sparse.csr_matrix((9, 9)), 9)


def test_a_users_score_is_the_decayed_mean_of_the_transitions_of_the_newest_items():
    graph_NN = np.array([[0, 3, 0, 0], [0, 0, 1, 2], [4, 0, 0, 0], [0, 0, 0, 0]], float)
    left_NE, right_NE = factors(sparse.csr_matrix(graph_NN), 3)
    users = GraphUsers(left_NE, HistoryRule(0.5 ** np.arange(2)))
    histories = [np.array([2, 0, 1]), np.array([3]), np.array([], int)]
    scores = users.vectors(right_NE, np.arange(3), histories)[:, 0] @ right_NE.T
    assert np.allclose(scores, [(graph_NN[1] + 0.5 * graph_NN[0]) / 1.5, [0] * 4, [0] * 4], atol=1e-5)


def test_what_is_held_out_is_not_counted(finished, tmp_path):
    """Neither from the table of the graph, nor in another way than the ID model leaves it out."""
    run = open_run(finished)
    dataset, config = run.dataset, run.config
    engine = partial(open_engine, config.prepare, tmp_path / "spill")
    counted_NN = Transition(config.neighbours.config_of("transition"), engine).fit(dataset, 0.3).toarray()
    expected = np.zeros_like(counted_NN)
    size = dataset.holding_out(0.3).train_counts_N.astype(float)
    for user, length in enumerate(dataset.holding_out(0.3).train_length_U):
        sequence = dataset.sequence(user)[:length]
        for gap, weight in ((1, 1.0), (2, 0.5), (3, 0.25)):
            for item, later in zip(sequence[:-gap], sequence[gap:], strict=False):
                expected[item, later] += weight * (item != later)
    expected /= np.sqrt(np.outer(size, size)).clip(1)
    assert np.allclose(counted_NN, expected, atol=1e-6)


@pytest.mark.slow
def test_a_run_with_the_graph_as_a_second_source_goes_the_whole_way(finished, tmp_path):
    run = open_run(finished, [f"run.dir={tmp_path}", *OVERRIDES])
    run.run()
    graph = run.sources["graph"]
    assert (graph.dim, graph.vectors_per_user) == (5, 1)
    assert "graph" in run.stage("train", "per_layer").best_model().user.slots
    assert {"id", "graph"} == set(run.build_model(run.config.main_variant).user.slots)
    assert not open_run(finished, [f"run.dir={tmp_path}", *OVERRIDES]).make("ids")
    with pytest.raises(UserError, match=r"graph|dim"):
        open_run(finished, [f"run.dir={tmp_path}", *OVERRIDES, "graph.dim=6"]).make("shards")


def test_a_source_of_that_name_beside_it_is_refused():
    import yaml

    tree = yaml.safe_load(CONFIG.format(root="x"))
    with pytest.raises(ValueError, match="graph"):
        RunConfig.model_validate({**tree, "graph": {}, "sources": {"graph": {"items": "x.npy"}}})
