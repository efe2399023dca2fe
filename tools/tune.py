"""Compare recipes of an ID model, or of the neighbour models. Test targets are not read.

    python -m tools.tune CONFIG DIR ids.model=gru4rec ids.gru4rec.dropout=.2,.4
    python -m tools.tune CONFIG DIR neighbours.decay=.5,.7,.9

Every combination of the values is a trial. An ID model is trained as a run's first: on all but the newest share of
each user's training interactions (`ids.holdout`), with early stopping on the validation users. Then it ranks the newest
training interaction of every user, which separates recipes that a few thousand validation users cannot. Neighbour
models rank the validation users, alone and fused with popularity. All rank the full catalogue.

Trials are stored in DIR, where runs and sweeps with this `run.shared` find them. A finished trial is not repeated, and
an interrupted one resumes. Intervals are 95% bootstrap intervals over users.
"""

import argparse
import itertools
from collections.abc import Iterator

import numpy as np

from rarec.config.ids import OLDER
from rarec.console.last_resort import guarded
from rarec.data.dataset import EvalTargets, PreparedDataset
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.evaluation.fusion import fuse
from rarec.evaluation.results import ALL_CHEAP
from rarec.ids.source import Source, open_source
from rarec.ids.validation import CHUNK
from rarec.ranking.metrics import mean_intervals, metric_values
from rarec.ranking.rank import EvalBatch
from rarec.ranking.rankers import Ranker, Ranks, VectorRanker, rank_users
from rarec.stages.run import Run

METRICS = ("hr@10", "ndcg@10", "hr@100", "ndcg@100")
NEIGHBOURS = "neighbours."


def main() -> None:
    """Train the missing trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("choices", nargs="*", metavar="SECTION.FIELD=VALUE[,VALUE]")
    arguments = parser.parse_args()
    place = [f"run.{name}={arguments.directory}" for name in ("dir", "shared")]
    of_neighbours = [choice.startswith(NEIGHBOURS) for choice in arguments.choices]
    ids = not any(of_neighbours)
    if not (ids or all(of_neighbours)):
        parser.error("compare neighbour models and ID models in two calls")
    lines: list[tuple[str, ...]] = [("trial", *(("best epoch", "seconds") if ids else ("model",)), *METRICS)]
    for trial in trials(arguments.choices):
        run = open_run(arguments.config, [*place, *trial])
        run.make("prepare")
        lines += [(" ".join(trial), *cells) for cells in (id_model if ids else neighbour_models)(run)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def trials(choices: list[str]) -> Iterator[list[str]]:
    """Yield the configuration overrides of each trial."""
    pairs = [choice.partition("=") for choice in choices]
    named = [[f"{name}={value}" for value in values.split(",")] for name, _, values in pairs]
    yield from map(list, itertools.product(*named))


def id_model(run: Run) -> Iterator[tuple[str, ...]]:
    """Train the ID model of one trial; yield its line: best epoch, seconds, figures."""
    recipe = run.config.ids.recipe
    if not (recipe and run.config.ids.held_out):
        problem = f"ids.model is {run.config.ids.model}, and ids.holdout {run.config.ids.held_out}"
        raise UserError(problem, "set ids.model to a model that is trained here, and ids.holdout above 0")
    stage = run.stage("ids", OLDER)
    stage.make()
    source = open_source(stage.directory, recipe)
    yield *(str(source.manifest[name]) for name in ("best_epoch", "seconds")), *figures(newest(run.dataset, source))


def neighbour_models(run: Run) -> Iterator[tuple[str, ...]]:
    """Count the tables of one trial; yield a line for each model, and for their fusion: name, figures."""
    run.make("neighbours")
    config, dataset = run.config, run.dataset
    targets = dataset.targets("validation", config.train.validation_users, config.run.seed)
    users = EvalBatch.of(dataset, targets).keeping_chunks()
    models: dict[str, Ranker] = dict(run.neighbours)
    counts_N = dataset.train_counts_N
    fusion = fuse({**models, "popularity": VectorRanker.of_counts(counts_N)}, users, counts_N)
    ranks = rank_users(users, {**models, ALL_CHEAP: fusion.ranker})
    yield from ((name, *figures(ranks_U)) for name, ranks_U in ranks.items())


def newest(dataset: PreparedDataset, source: Source) -> Ranks:
    """Return the rank of each user's newest training interaction."""
    users = np.flatnonzero(dataset.train_length_U > 1).astype(np.int32)
    positions = dataset.train_length_U[users] - 1
    targets = EvalTargets(users, positions, dataset.items_at(users, positions))
    return source.ranker().ranks(EvalBatch.of(dataset, targets), users_at_a_time=CHUNK)


def figures(ranks_U: Ranks) -> Iterator[str]:
    """Yield the means and intervals of METRICS."""
    values = metric_values(ranks_U, (10, 100))
    intervals = mean_intervals({name: values[name] for name in METRICS})
    return (f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, low, high in intervals.values())


if __name__ == "__main__":
    guarded(main)
