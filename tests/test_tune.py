"""The tool that compares recipes: what it ranks, and that no trial is repeated."""

import math
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rarec.entry import open_run
from rarec.ids.source import Source
from rarec.ranking.rank import EvalBatch
from tests.datasets import by_hand
from tools import tune


class Thinks:
    """User vectors that predict the item with the next higher row; records the histories."""

    per_user = 1

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def vectors(self, items_NE, user_rows, histories):
        self.asked += [history.tolist() for history in histories]
        return np.stack([items_NE[history[-1] + 1] for history in histories])[:, None]


def test_the_newest_training_interaction_is_ranked_after_what_stands_before_it():
    dataset = by_hand([[0, 1, 2, 8, 9], [5, 4, 3, 8, 9], [7, 8, 9]], pa.array(range(12)), pa.array(["a", "b", "c"]))
    users = Thinks()
    source = Source("id", np.eye(12, dtype=np.float32), users, "", {})
    hr_10, ndcg_10, hr_100, _ = tune.figures(tune.newest(dataset, source))
    assert users.asked == [[0, 1], [5, 4]]  # the third user trains on one interaction, which has no history
    # The first user's target is first; the second user's ties with all ten unseen items, which counts against it.
    assert (hr_10[:6], hr_100[:6]) == ("1.0000", "1.0000")
    assert ndcg_10.startswith(f"{(1 + 1 / math.log2(11)) / 2:.4f} ")


@pytest.mark.slow
def test_every_combination_is_a_trial_and_none_is_made_twice(finished, tmp_path, monkeypatch, capsys):
    choices = ["ids.holdout=.1", "ids.sasrec.epochs=1,2", "ids.sasrec.dropout=.1,.2"]
    monkeypatch.setattr(sys, "argv", ["tune.py", str(finished), str(tmp_path), *choices])
    tune.main()
    first = capsys.readouterr()
    lines = first.out.splitlines()
    assert len(lines) == 1 + 4
    assert "epochs=2 ids.sasrec.dropout=.1" in lines[3]
    assert first.err.count("SASRec epoch") == 4
    tune.main()
    again = capsys.readouterr()
    assert again.out == first.out
    assert "SASRec epoch" not in again.err


@pytest.mark.slow
def test_neighbour_models_are_trials_alone_and_fused(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", str(finished), str(tmp_path), "neighbours.decay=.5,1"])
    tune.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = ["cooccurrence", "transition", "ease", "lexical", "semantic", "cheap"]
    assert [line[:2] for line in lines[1:]] == [
        [f"neighbours.decay={decay}", row] for decay in (".5", "1") for row in rows
    ]
    hits = {(trial, row): float(figure) for trial, row, figure, *_ in lines[1:]}
    run = open_run(finished)
    targets = run.dataset.targets("validation", run.config.train.validation_users, run.config.run.seed)
    users = EvalBatch.of(run.dataset, targets)
    steady = replace(run.neighbours["cooccurrence"], decay=1.0)
    assert hits["neighbours.decay=1", "cooccurrence"] == pytest.approx((steady.ranks(users) <= 10).mean(), abs=1e-4)
    assert hits["neighbours.decay=.5", "cooccurrence"] != hits["neighbours.decay=1", "cooccurrence"]


def test_choices_of_both_kinds_are_refused(finished, tmp_path, monkeypatch, capsys):
    choices = ["neighbours.decay=.5", "ids.sasrec.dropout=.1"]
    monkeypatch.setattr(sys, "argv", ["tune.py", str(finished), str(tmp_path), *choices])
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    assert "two calls" in capsys.readouterr().err
