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
from rarec.data.dataset import PreparedDataset, Targets
from rarec.entry import guarded, open_context
from rarec.ids.source import Source, open_source
from rarec.ids.trainer import VALIDATION_CHUNK
from rarec.ranking import EvalBatch, mean_intervals, metric_values
from rarec.stages.ids import make
from rarec.stages.prepare import prepare

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
        context = open_context(arguments.config, [*place, *trial])
        if not (isinstance(context.config.ids.chosen, Recipe) and context.config.ids.held_out):
            parser.error("a trial is an ID model that is trained here (ids.model), and ids.holdout above 0")
        prepare(context)
        make(context, "id", context.config.ids)
        source = open_source(context.paths.source("id"))
        training = (str(source.manifest[name]) for name in ("best_epoch", "seconds"))
        lines.append((" ".join(trial), *training, *figures(context.dataset, source)))
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
    targets = Targets(users, positions, dataset.items_at(users, positions))
    ranks = source.ranker().ranks(EvalBatch.of(dataset, targets), users_at_a_time=VALIDATION_CHUNK)
    values = metric_values(ranks, (10, 100))
    intervals = mean_intervals({name: values[name] for name in METRICS})
    return (f"{one.mean:.4f} ({one.low:.4f} to {one.high:.4f})" for one in intervals.values())


if __name__ == "__main__":
    guarded(main)
