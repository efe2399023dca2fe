"""Recipes of an ID model, compared on each user's newest training interaction, which no trial saw. Test targets rest.

    python tools/tune_ids.py CONFIG DIR ids.model=gru4rec ids.gru4rec.dropout=.2,.4

Every combination of the values is a trial. Each is trained as a run trains the vectors in its slots: on all but the
newest share of each user's training interactions (`ids.holdout`), until the validation users say stop. Then it ranks
the full catalogue for every user: so many tell recipes apart that a few thousand validation users do not.
What is made lies in DIR, where runs and sweeps with this `run.shared` find it; a trial is not made twice, and one that
was cut short goes on. Figures carry bootstrap 95% intervals.
"""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np

from rarec.config.ids import Recipe
from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.entry import guarded, open_run
from rarec.ids.source import Source, open_source
from rarec.ids.validation import ranks_of
from rarec.ranking.intervals import mean_intervals
from rarec.ranking.metrics import metric_values

METRICS = ("hr@10", "ndcg@10", "hr@100", "ndcg@100")


def main() -> None:
    """Train what is not there, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("choices", nargs="*", metavar="SECTION.FIELD=VALUE[,VALUE]")
    arguments = parser.parse_args()
    place = [f"run.{name}={arguments.directory}" for name in ("dir", "shared")]
    lines: list[tuple[str, ...]] = [("trial", "best epoch", "seconds", *METRICS)]
    for trial in trials(arguments.choices):
        run = open_run(arguments.config, [*place, *trial])
        if not (isinstance(run.config.ids.chosen, Recipe) and run.config.ids.held_out):
            parser.error("a trial is an ID model that is trained here (ids.model), and ids.holdout above 0")
        run.make("prepare")
        stage = run.stage("ids", "id")
        stage.make()
        source = open_source(stage.directory)
        training = (str(source.manifest[name]) for name in ("best_epoch", "seconds"))
        lines.append((" ".join(trial), *training, *figures(run.dataset, source)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def trials(choices: list[str]) -> Iterator[list[str]]:
    """The overrides of each."""
    pairs = [choice.partition("=") for choice in choices]
    named = [[f"{name}={value}" for value in values.split(",")] for name, _, values in pairs]
    yield from map(list, itertools.product(*named))


def figures(dataset: PreparedDataset, source: Source) -> Iterator[str]:
    """Means and intervals of how it ranks each user's newest training interaction."""
    users = np.flatnonzero(dataset.train_length_U > 1).astype(np.int32)
    positions = dataset.train_length_U[users] - 1
    targets = EvalTargets(users, positions, dataset.items_at(users, positions))
    values = metric_values(ranks_of(targets, dataset, source.items_NE, source.users), (10, 100))
    intervals = mean_intervals({name: values[name] for name in METRICS})
    return (f"{one.mean:.4f} ({one.low:.4f} to {one.high:.4f})" for one in intervals.values())


if __name__ == "__main__":
    guarded(main)
