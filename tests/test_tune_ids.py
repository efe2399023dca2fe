"""The tool that compares recipes of ID models: what it ranks, and that no trial is repeated."""

import math
import sys

import numpy as np
import pyarrow as pa

from rarec.ids.source import Source
from tests.datasets import by_hand
from tools import tune_ids


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
    hr_10, ndcg_10, hr_100, _ = tune_ids.figures(dataset, source)
    assert users.asked == [[0, 1], [5, 4]]  # the third user trains on one interaction, which has no history
    # The first user's target is first; the second user's ties with all ten unseen items, which counts against it.
    assert (hr_10[:6], hr_100[:6]) == ("1.0000", "1.0000")
    assert ndcg_10.startswith(f"{(1 + 1 / math.log2(11)) / 2:.4f} ")


def test_every_combination_is_a_trial_and_none_is_made_twice(finished, tmp_path, monkeypatch, capsys):
    choices = ["ids.holdout=.1", "ids.sasrec.epochs=1,2", "ids.sasrec.dropout=.1,.2"]
    monkeypatch.setattr(sys, "argv", ["tune_ids.py", str(finished), str(tmp_path), *choices])
    tune_ids.main()
    first = capsys.readouterr()
    lines = first.out.splitlines()
    assert len(lines) == 1 + 4
    assert "epochs=2 ids.sasrec.dropout=.1" in lines[3]
    assert first.err.count("SASRec epoch") == 4
    tune_ids.main()
    again = capsys.readouterr()
    assert again.out == first.out
    assert "SASRec epoch" not in again.err
