"""Make the files of a source that no ID model is trained for, from imported vectors."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rarec.config.ids import IMPORTED_FILES, Import
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.ids.imports import existing, read_vectors
from rarec.ids.source import ITEMS_FILE, USERS, HistoryRule, UserTable, UserVectors, load_table
from rarec.ids.validation import Validation
from rarec.storage.files import sha256_file

Say = Callable[[str], None]


def imported_hashes(name: str, section: Import) -> dict[str, str]:
    """Return the sha256 of each file that vectors are imported from: their contents count, not their paths.

    Raises:
        UserError: a file does not exist.
    """
    return {field: sha256_file(existing(path, _field(name, field))) for field, path in _files(section).items()}


def import_vectors(
    name: str, config: Import, dataset: PreparedDataset, directory: Path, seed: int, say: Say
) -> dict[str, Any]:
    """Write imported item and user vectors; return figures for the manifest.

    Args:
        name: of the source, by which templates refer to its slots.
        config: the section `ids.imported`, or one of `sources`.
        dataset: prepared; its rows are the source's rows.
        directory: to write to.
        seed: of the validation subset.
        say: prints one line to the user.

    Raises:
        UserError: a file to import is missing or invalid.
    """
    left_out = {"items": _import_items(name, config, dataset, directory, say)}
    items_NE = load_table(directory / ITEMS_FILE)
    users: UserVectors = HistoryRule.of(config.user_rule, config.half_life, config.max_history)
    if config.users is not None:
        left_out["users"] = _import_users(name, config, dataset, directory, items_NE.shape[1])
        users = UserTable(load_table(directory / f"{USERS}.npy"))
    files = _files(config)
    for kind, count in left_out.items():
        if count:
            say(f"{files[kind]}: {count} rows are left out, their ids are no {kind} of the dataset")
    validation = Validation(dataset, seed).of_vectors(items_NE, users)
    return {"validation": validation, "imported": files, "left_out": left_out}


def _files(section: Import) -> dict[str, str]:
    """Return the files of an import by their fields."""
    named = {field: getattr(section, field) for field in IMPORTED_FILES}
    return {field: path for field, path in named.items() if path is not None}


def _field(name: str, field: str) -> str:
    """Return the configuration's name of a field of an import."""
    return f"ids.imported.{field}" if name == "id" else f"sources.{name}.{field}"


def _import_items(name: str, config: Import, dataset: PreparedDataset, directory: Path, say: Say) -> int:
    """Write the item vectors; return the number of rows left out."""
    items = read_vectors(config.items, config.item_ids, _field(name, "items"), _field(name, "item_ids"))
    if items.rows.ndim != 2:
        remedy = "save item vectors with two axes: items, dimension"
        raise UserError(f"{items.where} has shape {items.rows.shape}", remedy)
    remedy = "import a vector for every item of the catalogue, remove those items from it, or set "
    remedy += f"`{_field(name, 'missing')}: fallback`"
    gaps = config.missing == "fallback"
    left_out, lacking = items.write_aligned(directory / ITEMS_FILE, dataset.item_ids.whole(), "item", remedy, gaps=gaps)
    if lacking.size and not gaps:
        first = dataset.item_ids[int(lacking[0])]
        counted = f"{lacking.size} of {dataset.n_items} items (first: {first!r})"
        raise UserError(f"{items.where}: the vectors of {counted} are zero, which means that they have none", remedy)
    if lacking.size:
        say(f"{config.items}: no vector for {lacking.size} of {dataset.n_items} items; a learned vector replaces it")
    return left_out


def _import_users(name: str, config: Import, dataset: PreparedDataset, directory: Path, dim: int) -> int:
    """Write the user vectors, (U, K, E), K = 1 where the file has two axes; return the number of rows left out."""
    path = str(config.users)
    table = read_vectors(path, config.user_ids, _field(name, "users"), _field(name, "user_ids"))
    rows = table.rows[:, None] if table.rows.ndim == 2 else table.rows
    if rows.shape[2] != dim:
        problem = f"{path} has shape {table.rows.shape}, but the vectors of {config.items} have dimension {dim}"
        remedy = "import users and items of one vector space: (users, dimension), or (users, K, dimension)"
        raise UserError(problem, remedy)
    remedy = "import a vector for every user, or leave `users` out: a rule makes user vectors from the history"
    left_out, _ = replace(table, rows=rows).write_aligned(
        directory / f"{USERS}.npy", dataset.user_ids.whole(), "user", remedy
    )
    return left_out
