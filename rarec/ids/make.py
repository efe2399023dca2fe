"""Make the files of a source: train an ID model, or import vectors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rarec.config.ids import IMPORTED_FILES, Ids, Import, Recipe
from rarec.data.dataset import PreparedDataset
from rarec.distributed.world import SINGLE, World
from rarec.errors import UserError
from rarec.ids.imports import Vectors, existing, read_vectors
from rarec.ids.source import ITEMS_FILE, USERS_FILE, HistoryRule, UserTable, UserVectors
from rarec.ids.trainer import KEPT, train_ids
from rarec.ids.validation import Validation
from rarec.storage.checkpoint_store import CheckpointStore
from rarec.storage.files import sha256_file

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
    world: World = SINGLE,
) -> dict[str, Any]:
    """Train or import a source and write its files; return the figures for its manifest.

    Args:
        name: of the source, by which templates refer to its slots.
        config: the section `ids`, or one of `sources`.
        dataset: prepared; its rows are the source's rows.
        directory: to write to.
        seed: of the training and of the validation subset.
        progress: directory of a training's checkpoints, for the caller to delete; the same call resumes from it.
        identity: of the training: checkpoints of another one are reported and deleted.
        say: prints one line to the user.
        world: device and ranks. All of them train; rank 0 alone imports, and alone gets the figures of that.

    Raises:
        UserError: a file to import is missing or invalid, or training fails.
    """
    chosen = _chosen(config)
    if isinstance(chosen, Recipe):
        training_set = dataset.holding_out(config.held_out) if isinstance(config, Ids) else dataset
        checkpoints = CheckpointStore(progress, KEPT, identity)
        return train_ids(training_set, chosen, seed, checkpoints, directory, say, world)
    return world.run_on_all(lambda: _import(name, chosen, dataset, directory, seed, say) if world.is_main else {})


def _chosen(config: Ids | Import) -> Recipe | Import:
    return config if isinstance(config, Import) else config.chosen


def _field(name: str, field: str) -> str:
    """Return the configuration's name of a field of an import."""
    return f"ids.imported.{field}" if name == "id" else f"sources.{name}.{field}"


def _import(
    name: str, config: Import, dataset: PreparedDataset, temporary: Path, seed: int, say: Say
) -> dict[str, Any]:
    """Write imported item and user vectors; return figures for the manifest."""
    left_out = {"items": _import_items(name, config, dataset, temporary, say)}
    items_NE = np.load(temporary / ITEMS_FILE, mmap_mode="c", allow_pickle=False)
    users: UserVectors = HistoryRule.of(config.user_rule, config.half_life, config.max_history)
    if config.users is not None:
        left_out["users"] = _import_users(name, config, dataset, temporary, items_NE.shape[1])
        users = UserTable(np.load(temporary / USERS_FILE, mmap_mode="c", allow_pickle=False))
    for of, count in left_out.items():
        if count:
            say(f"{getattr(config, of)}: {count} rows are left out, their ids are no {of} of the dataset")
    files = {field: getattr(config, field) for field in IMPORTED_FILES if getattr(config, field) is not None}
    return {
        "validation": Validation(dataset, seed).of_vectors(items_NE, users),
        "imported": files,
        "left_out": left_out,
    }


def _import_items(name: str, config: Import, dataset: PreparedDataset, temporary: Path, say: Say) -> int:
    """Write the item vectors; return the number of rows left out."""
    items = read_vectors(config.items, config.item_ids, _field(name, "items"), _field(name, "item_ids"))
    if items.rows.ndim != 2:
        raise UserError(
            f"{config.items} has shape {items.rows.shape}", "save item vectors with two axes: items, dimension"
        )
    remedy = "import a vector for every item of the catalogue, remove those items from it, or set "
    remedy += f"`{_field(name, 'missing')}: fallback`"
    gaps = config.missing == "fallback"
    left_out, lacking = items.write_aligned(temporary / ITEMS_FILE, dataset.item_ids.whole(), "item", remedy, gaps=gaps)
    if lacking.size and not gaps:
        first = dataset.item_ids[int(lacking[0])]
        of = f"{lacking.size} of {dataset.n_items} items (first: {first!r})"
        raise UserError(f"{config.items}: the vectors of {of} are zero, which means that they have none", remedy)
    if lacking.size:
        say(f"{config.items}: no vector for {lacking.size} of {dataset.n_items} items; a learned vector replaces it")
    return left_out


def _import_users(name: str, config: Import, dataset: PreparedDataset, temporary: Path, dim: int) -> int:
    """Write the user vectors, (U, K, E), K = 1 where the file has two axes; return the number of rows left out."""
    path = str(config.users)
    table = read_vectors(path, config.user_ids, _field(name, "users"), _field(name, "user_ids"))
    rows = table.rows[:, None] if table.rows.ndim == 2 else table.rows
    if rows.ndim != 3 or rows.shape[2] != dim:
        raise UserError(
            f"{path} has shape {table.rows.shape}, but the vectors of {config.items} have dimension {dim}",
            "import users and items of one vector space: (users, dimension), or (users, K, dimension)",
        )
    remedy = "import a vector for every user, or leave `users` out: a rule makes user vectors from the history"
    table = Vectors(path, rows, table.ids)
    left_out, _ = table.write_aligned(temporary / USERS_FILE, dataset.user_ids.whole(), "user", remedy)
    return left_out
