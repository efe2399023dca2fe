"""Make a source: train an ID model, or import vectors. Both give the same kind of artefact."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rarec.artefacts import sha256_json, write_manifest
from rarec.checkpoint_store import CheckpointStore
from rarec.config.identity import IMPORTED_FILES, source_settings
from rarec.config.ids import Ids, Import, Recipe
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.files import new_directory, sha256_file
from rarec.ids.imports import Vectors, existing, read_vectors
from rarec.ids.source import ITEMS_FILE, KIND, USERS_FILE, HistoryRule, Source, UserTable, UserVectors, open_source
from rarec.ids.trainer import KEPT, Validation, train_ids

Say = Callable[[str], None]


def source_identity(
    name: str, config: Ids | Import, dataset: PreparedDataset, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings and the hashes of inputs that the source's manifest holds; if they change, it is rebuilt.

    A trained source depends on its recipe and the seed, an imported one on the contents of its files, not their paths.

    Raises:
        UserError: a file to import does not exist.
    """
    chosen = _chosen(config)
    made_from = {"prepare": dataset.hash}
    for field in IMPORTED_FILES if isinstance(chosen, Import) else ():
        path = getattr(chosen, field)
        if path is not None:
            made_from[field] = sha256_file(existing(path, _field(name, field)))
    return source_settings(config, seed), made_from


def make_source(
    name: str, config: Ids | Import, dataset: PreparedDataset, directory: Path, seed: int, say: Say
) -> Source:
    """Train or import a source, print how well it ranks the validation users, and write its artefact.

    Checkpoints of a training are in a hidden directory beside `directory` until the artefact is whole; calling this
    again with the same arguments resumes it.

    Args:
        name: of the source, by which templates refer to its slots.
        config: the section `ids`, or one of `sources`.
        dataset: prepared; its rows are the source's rows.
        directory: of the artefact; an existing one is replaced once the new one is whole.
        seed: of the training and of the validation subset.
        say: prints one line to the user.

    Raises:
        UserError: a file to import is missing or invalid, or training fails.
    """
    chosen = _chosen(config)
    settings, made_from = source_identity(name, config, dataset, seed)
    with new_directory(directory) as aside:
        if isinstance(chosen, Recipe):
            training_set = dataset.holding_out(config.held_out) if isinstance(config, Ids) else dataset
            checkpoints = _checkpoints(directory, sha256_json([settings, made_from]))
            figures = train_ids(training_set, chosen, seed, checkpoints, aside, say)
        else:
            figures = _import(name, chosen, dataset, aside, seed, say)
        write_manifest(aside, KIND, settings=settings, made_from=made_from, name=name, **figures)
    drop_progress(directory)
    validation = figures["validation"]
    say(
        f"{name}: full ranking of {validation['n']} validation users: "
        f"hr@10 {validation['hr@10']:.4f}, ndcg@10 {validation['ndcg@10']:.4f}"
    )
    return open_source(directory)


def drop_progress(directory: Path) -> None:
    """Delete the checkpoints of an unfinished training of the source in `directory`, if there are any."""
    shutil.rmtree(_checkpoints(directory, "").directory, ignore_errors=True)


def _checkpoints(directory: Path, identity: str) -> CheckpointStore:
    return CheckpointStore(directory.with_name(f".{directory.name}.progress"), KEPT, identity, KIND)


def _chosen(config: Ids | Import) -> Recipe | Import:
    return config if isinstance(config, Import) else config.chosen


def _field(name: str, field: str) -> str:
    """Return the configuration's name of a field of an import."""
    return f"ids.imported.{field}" if name == "id" else f"sources.{name}.{field}"


def _import(name: str, config: Import, dataset: PreparedDataset, aside: Path, seed: int, say: Say) -> dict[str, Any]:
    """Write imported item and user vectors; return figures for the manifest."""
    left_out = {"items": _import_items(name, config, dataset, aside, say)}
    items_NE = np.load(aside / ITEMS_FILE, mmap_mode="c", allow_pickle=False)
    users: UserVectors = HistoryRule.of(config.user_rule, config.half_life, config.max_history)
    if config.users is not None:
        left_out["users"] = _import_users(name, config, dataset, aside, items_NE.shape[1])
        users = UserTable.open(aside)
    for of, count in left_out.items():
        if count:
            say(f"{getattr(config, of)}: {count} rows are left out, their ids are no {of} of the dataset")
    files = {field: getattr(config, field) for field in IMPORTED_FILES if getattr(config, field) is not None}
    return {"validation": Validation(dataset, seed)(items_NE, users), "imported": files, "left_out": left_out}


def _import_items(name: str, config: Import, dataset: PreparedDataset, aside: Path, say: Say) -> int:
    """Write the item vectors; return the number of rows left out."""
    items = read_vectors(config.items, config.item_ids, _field(name, "items"), _field(name, "item_ids"))
    if items.rows.ndim != 2:
        raise UserError(
            f"{config.items} has shape {items.rows.shape}", "save item vectors with two axes: items, dimension"
        )
    remedy = "import a vector for every item of the catalogue, remove those items from it, or set "
    remedy += f"`{_field(name, 'missing')}: fallback`"
    gaps = config.missing == "fallback"
    left_out, lacking = items.write_aligned(aside / ITEMS_FILE, dataset.item_ids, "item", remedy, gaps=gaps)
    if lacking.size and not gaps:
        first = dataset.item_ids[int(lacking[0])].as_py()
        of = f"{lacking.size} of {dataset.n_items} items (first: {first!r})"
        raise UserError(f"{config.items}: the vectors of {of} are zero, which means that they have none", remedy)
    if lacking.size:
        say(f"{config.items}: no vector for {lacking.size} of {dataset.n_items} items; a learned vector replaces it")
    return left_out


def _import_users(name: str, config: Import, dataset: PreparedDataset, aside: Path, dim: int) -> int:
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
    left_out, _ = table.write_aligned(aside / USERS_FILE, dataset.user_ids, "user", remedy)
    return left_out
