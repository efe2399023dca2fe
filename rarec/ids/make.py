"""Make a source: train it here, or import it. Both end as the same kind of artefact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rarec.config.ids import IMPORTED_FILES, Ids, Import, Recipe
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.files import sha256_file
from rarec.ids.imports import Vectors, existing, read_vectors
from rarec.ids.source import ITEMS_FILE
from rarec.ids.train import train_ids
from rarec.ids.users import USERS_FILE, HistoryRule, UserTable, UserVectors
from rarec.ids.validation import Validation

Say = Callable[[str], None]


def imported_hashes(name: str, section: Import) -> dict[str, str]:
    """Return the sha256 of each file that vectors are imported from: their contents count, not their paths.

    Raises:
        UserError: a file does not exist.
    """
    named = {field: getattr(section, field) for field in IMPORTED_FILES}
    return {
        field: sha256_file(existing(path, _field(name, field))) for field, path in named.items() if path is not None
    }


def write_source(
    name: str,
    config: Ids | Import,
    dataset: PreparedDataset,
    directory: Path,
    seed: int,
    progress: Path,
    identity: str,
    say: Say,
) -> dict[str, Any]:
    """Train or import a source and write its files; return the figures for its manifest.

    Args:
        name: of the source, as templates name its slots.
        config: the section `ids`, or one of `sources`.
        dataset: prepared; its rows are the source's rows.
        directory: to write to.
        seed: of the training and of the validation subset.
        progress: where a training keeps its state until it ends; the same call resumes from it.
        identity: of the training: state of another one is not resumed.
        say: prints a line.

    Raises:
        UserError: files to import are not as they should be, or training fails.
    """
    chosen = _chosen(config)
    if isinstance(chosen, Recipe):
        held_out = dataset.holding_out(config.held_out) if isinstance(config, Ids) else dataset
        figures = _train(chosen, held_out, directory, seed, progress, identity, say)
    else:
        figures = _import(name, chosen, dataset, directory, seed, say)
    progress.unlink(missing_ok=True)
    validation = figures["validation"]
    say(
        f"{name}: its own full ranking of {validation['n']} validation users: "
        f"hr@10 {validation['hr@10']:.4f}, ndcg@10 {validation['ndcg@10']:.4f}"
    )
    return figures


def _chosen(config: Ids | Import) -> Recipe | Import:
    return config if isinstance(config, Import) else config.chosen


def _field(name: str, field: str) -> str:
    """What a field of an import is called in the configuration."""
    return f"ids.imported.{field}" if name == "id" else f"sources.{name}.{field}"


def _train(
    config: Recipe, dataset: PreparedDataset, aside: Path, seed: int, progress: Path, identity: str, say: Say
) -> dict[str, Any]:
    trained = train_ids(dataset, config, seed, progress, identity, say)
    np.save(aside / ITEMS_FILE, trained.items_NE)
    trained.users.save(aside)
    return trained.figures


def _import(name: str, config: Import, dataset: PreparedDataset, aside: Path, seed: int, say: Say) -> dict[str, Any]:
    items = read_vectors(config.items, config.item_ids, _field(name, "items"), _field(name, "item_ids"))
    if items.rows.ndim != 2:
        raise UserError(f"{config.items} has shape {items.rows.shape}", "item vectors have two axes: items, dimension")
    remedy = "import a vector for every item of the catalogue, drop those items from it, or set "
    remedy += f"`{_field(name, 'missing')}: fallback`"
    gaps = config.missing == "fallback"
    unwanted, lacking = items.write_aligned(aside / ITEMS_FILE, dataset.item_ids, "item", remedy, gaps=gaps)
    if lacking.size and not gaps:
        first = dataset.item_ids[int(lacking[0])].as_py()
        of = f"{lacking.size} of {dataset.n_items} items (first: {first!r})"
        raise UserError(f"{config.items}: the vectors of {of} are zero, which says that there are none", remedy)
    if lacking.size:
        say(f"{config.items}: no vector for {lacking.size} of {dataset.n_items} items; a learned one takes its place")
    extra = {"items": unwanted}
    items_NE = np.load(aside / ITEMS_FILE, mmap_mode="c", allow_pickle=False)
    users: UserVectors = HistoryRule.of(config.user_rule, config.half_life, config.max_history)
    if config.users is not None:
        table = read_vectors(config.users, config.user_ids, _field(name, "users"), _field(name, "user_ids"))
        remedy = "import a vector for every user, or leave `users` out: a rule makes them from the history"
        table = _per_user(table, items_NE.shape[1], config.items)
        extra["users"], _ = table.write_aligned(aside / USERS_FILE, dataset.user_ids, "user", remedy)
        users = UserTable.open(aside)
    for of, count in extra.items():
        if count:
            say(f"{getattr(config, of)}: {count} rows belong to no {of[:-1]} of the dataset and were left out")
    files = {field: getattr(config, field) for field in IMPORTED_FILES if getattr(config, field) is not None}
    return {"validation": Validation(dataset, seed)(items_NE, users), "imported": files, "left_out": extra}


def _per_user(table: Vectors, dim: int, items_path: str) -> Vectors:
    """User vectors as (U, K, E), K = 1 where the file has two axes."""
    rows = table.rows[:, None] if table.rows.ndim == 2 else table.rows
    if rows.ndim != 3 or rows.shape[2] != dim:
        raise UserError(
            f"{table.path} has shape {table.rows.shape}, but the vectors of {items_path} have dimension {dim}",
            "users and items need vectors of one space: (users, dimension), or (users, K, dimension)",
        )
    return Vectors(table.path, rows, table.ids)
