"""Metrics of ranks: by hand, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

from rarec.evaluation.rows import bucket_labels, slots_and_rival, strata_rows
from rarec.ranking.metrics import metric_values
from rarec.ranking.rank import VectorScores, rank_scores


def test_hand_worked_values():
    values = metric_values(np.array([1, 2, 3, 10, 11]), [1, 10])
    assert list(values) == ["hr@1", "hr@10", "ndcg@1", "ndcg@10", "mrr"]
    assert values["hr@1"].tolist() == [1, 0, 0, 0, 0]
    assert values["hr@10"].tolist() == [1, 1, 1, 1, 0]
    assert values["ndcg@10"] == pytest.approx([1, 0.6309297535714575, 0.5, 0.2890648263178879, 0])
    assert values["mrr"] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10, 1 / 11])
    assert all(column.dtype == np.float64 for column in values.values())


def test_ranks_start_at_one():
    with pytest.raises(ValueError, match="start at 1"):
        metric_values(np.array([1, 0]), [10])


def test_equal_to_scikit_learn():
    """From vectors to metrics: our ranks, and scikit-learn on all scores. With one target, precision is MRR."""
    rng = np.random.default_rng(0)
    users, items = (rng.standard_normal((size, 8)).astype(np.float32) for size in (40, 30))
    targets = rng.integers(30, size=40)
    seen = [rng.choice(30, size=5, replace=False) for _ in range(40)]
    scores, wanted = users @ items.T, np.eye(30, dtype=int)[targets]
    for user, known in enumerate(seen):
        scores[user, known[known != targets[user]]] = -1e9
    expected = {f"hr@{k}": top_k_accuracy_score(targets, scores, k=k, labels=range(30)) for k in (5, 10)}
    expected |= {f"ndcg@{k}": ndcg_score(wanted, scores, k=k) for k in (5, 10)}
    expected["mrr"] = label_ranking_average_precision_score(wanted, scores)
    found = metric_values(rank_scores(VectorScores(users, items), targets, seen), [5, 10])
    assert {name: column.mean() for name, column in found.items()} == pytest.approx(expected)


def test_buckets_hold_about_equally_many_and_few_values_have_one_each():
    index, labels = bucket_labels(np.arange(1, 14))
    assert index.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 4
    assert labels == ["1-3", "4-6", "7-9", "10-13"]
    index, labels = bucket_labels(np.array([0] * 90 + [1] * 2))
    assert (index.tolist(), labels) == ([0] * 90 + [1] * 2, ["0", "1"])


def test_a_difference_by_stratum_is_paired():
    ranks = {"one": np.array([1, 200, 1, 200]), "other": np.array([200, 200, 1, 1])}
    lengths = {"history length": np.array([1, 1, 2, 2])}
    rows = strata_rows(ranks, lengths, [("one", "other")], resamples=50, seed=1)
    found = {row["bucket"]: row for row in rows if (row["variant"], row["metric"]) == ("one - other", "hr@100")}
    assert {bucket: (row["value"], row["n"]) for bucket, row in found.items()} == {"1": (0.5, 2), "2": (-0.5, 2)}
    assert (found["1"]["low"], found["1"]["high"]) == (0, 1)


@pytest.mark.parametrize(
    ("rows", "pair"),
    [
        ("per_layer text_only text_only+id per_layer+id", "per_layer+id text_only+id"),
        ("text_only+id per_layer+id text_only+id+cheap per_layer+id+cheap", "per_layer+id+cheap text_only+id+cheap"),
        ("text_only+id text_lora+id per_layer+id", "per_layer+id text_lora+id"),
        ("per_layer+id id_only", ""),
        ("per_layer text_only", ""),
    ],
)
def test_slots_are_compared_with_text_only_fused_alike(rows, pair):
    assert slots_and_rival(rows.split(), "per_layer") == [tuple(pair.split())] * bool(pair)


def test_text_only_has_no_rival():
    assert slots_and_rival(["text_only+id", "id_only"], "text_only") == []
