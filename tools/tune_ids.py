"""Compare recipes of an ID model on each user's newest training interaction, which no trial was trained on.

    python tools/tune_ids.py CONFIG DIR ids.model=gru4rec ids.gru4rec.dropout=.2,.4

Every combination of the values is a trial. A trial is trained like the ID model in a run's slots: on all but the newest
share of each user's training interactions (`ids.holdout`), with early stopping on the validation users. Then it ranks
the full catalogue for every user, which separates recipes that a few thousand validation users cannot. Test targets are
not read.
Trials are stored in DIR, where runs and sweeps with this `run.shared` find them. A finished trial is not repeated, and
an interrupted one resumes. Intervals are 95% bootstrap intervals over users.
"""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np

from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.entry import guarded, open_run
from rarec.ids.source import Source, open_source
from rarec.ids.trainer import VALIDATION_CHUNK
from rarec.ranking import EvalBatch, mean_intervals, metric_values

METRICS = ("hr@10", "ndcg@10", "hr@100", "ndcg@100")


def main() -> None:
    """Train the missing trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("choices", nargs="*", metavar="SECTION.FIELD=VALUE[,VALUE]")
    arguments = parser.parse_args()
    place = [f"run.{name}={arguments.directory}" for name in ("dir", "shared")]
    lines: list[tuple[str, ...]] = [("trial", "best epoch", "seconds", *METRICS)]
    for trial in trials(arguments.choices):
        run = open_run(arguments.config, [*place, *trial])
        recipe = run.config.ids.recipe
        if not (recipe and run.config.ids.held_out):
            parser.error("set ids.model to an ID model that is trained here, and ids.holdout above 0")
        run.make("prepare")
        stage = run.stage("ids", "id")
        stage.make()
        source = open_source(stage.directory, recipe)
        training = (str(source.manifest[name]) for name in ("best_epoch", "seconds"))
        lines.append((" ".join(trial), *training, *figures(run.dataset, source)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def trials(choices: list[str]) -> Iterator[list[str]]:
    """Yield the configuration overrides of each trial."""
    pairs = [choice.partition("=") for choice in choices]
    named = [[f"{name}={value}" for value in values.split(",")] for name, _, values in pairs]
    yield from map(list, itertools.product(*named))


def figures(dataset: PreparedDataset, source: Source) -> Iterator[str]:
    """Yield the means and intervals of METRICS on each user's newest training interaction."""
    users = np.flatnonzero(dataset.train_length_U > 1).astype(np.int32)
    positions = dataset.train_length_U[users] - 1
    targets = EvalTargets(users, positions, dataset.items_at(users, positions))
    ranks = source.ranker().ranks(EvalBatch.of(dataset, targets), users_at_a_time=VALIDATION_CHUNK)
    values = metric_values(ranks, (10, 100))
    intervals = mean_intervals({name: values[name] for name in METRICS})
    return (f"{one.mean:.4f} ({one.low:.4f} to {one.high:.4f})" for one in intervals.values())


if __name__ == "__main__":
    guarded(main)
