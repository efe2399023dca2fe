"""Make a neighbour table from a prepared dataset, and write it as Parquet."""

from pathlib import Path

import ibis.expr.types as ir

from rarec.config.logs import Prepare
from rarec.config.neighbours import Neighbours
from rarec.data import tables
from rarec.data.dataset import PreparedDataset
from rarec.data.engines import PrepareEngine, open_engine
from rarec.data.engines.table_files import find_files
from rarec.neighbours import counting
from rarec.neighbours.ease import ease, training_matrices
from rarec.neighbours.lexical import lexical, plain_texts
from rarec.neighbours.table import write_table

SECTION = "neighbours"


def write_neighbours(
    model: str, config: Neighbours, prepare: Prepare, dataset: PreparedDataset, directory: Path
) -> dict[str, int]:
    """Write the table of one model; return the figures for its manifest.

    Args:
        model: one of `Neighbours.models`.
        config: the section `neighbours`.
        prepare: the section `prepare`: its engine counts.
        dataset: prepared.
        directory: to write to.
    """
    if dataset.n_items > config.largest(model):
        pairs = write_table((), directory)
    elif model == "lexical":
        texts = plain_texts(dataset.titles, dataset.texts, dataset.untitled)
        pairs = write_table(lexical(texts, config.top), directory)
    elif model == "ease":
        rows = ease(training_matrices(dataset), dataset.n_items, config.ease_penalty, config.top)
        pairs = write_table(rows, directory)
    else:
        pairs = write_counts(model, config, prepare, dataset, directory)
    return {"pairs": pairs}


def write_counts(
    model: str,
    config: Neighbours,
    prepare: Prepare,
    dataset: PreparedDataset,
    directory: Path,
    holdout: float = 0.0,
) -> int:
    """Write the table of `cooccurrence` or `transition`; return the number of its rows.

    Args:
        model: see `write_neighbours`, as for all but the last.
        config: the section `neighbours`.
        prepare: the section `prepare`.
        dataset: prepared.
        directory: to write to.
        holdout: the newest share of each user's training interactions, which is not counted.
    """
    with open_engine(prepare, directory / "spill") as engine:
        log = read_training_log(engine, dataset.directory, config.longest, holdout)
        return write_table(engine.batches(_expression(model, config, engine.keep("training_log", log))), directory)


def read_training_log(engine: PrepareEngine, directory: Path, longest: int, holdout: float = 0.0) -> ir.Table:
    """Return each user's newest training interactions (see `counting`) from the files of a prepared dataset."""
    roles = {tables.INTERACTIONS: ("user_row", "item_row"), tables.USERS: ("row", "start", "train_length")}
    interactions, users = (
        engine.read(
            find_files(str(directory / file), SECTION), {name: name for name in names}, Path(file).stem, lines=True
        ).table
        for file, names in roles.items()
    )
    return counting.training_log(interactions, users.drop("line"), longest, holdout)


def _expression(model: str, config: Neighbours, log: ir.Table) -> ir.Table:
    if model == "cooccurrence":
        return counting.cooccurrence(log, config.top, config.shrinkage)
    return counting.transition(log, config.top, config.steps, config.step_decay, config.shrinkage)
