"""Make a source: train it here, or import it. Both end as the same kind of artefact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rarec.artefacts import sha256_json, write_manifest
from rarec.config.identity import IMPORTED_FILES, source_settings
from rarec.config.ids import Ids, Import, Recipe
from rarec.data.dataset import PreparedDataset
from rarec.errors import UserError
from rarec.files import new_directory, sha256_file
from rarec.ids.imports import Vectors, existing, read_vectors
from rarec.ids.source import ITEMS_FILE, KIND, Source, open_source
from rarec.ids.train import train_ids
from rarec.ids.users import USERS_FILE, HistoryRule, UserTable, UserVectors
from rarec.ids.validation import Validation

Say = Callable[[str], None]


def source_identity(
    name: str, config: Ids | Import, dataset: PreparedDataset, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and hashes of inputs, as the manifest will hold them: whether a source must be made again.

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
    """Train or import a source, tell how well it ranks the validation users, and write its artefact.

    A training's progress lies beside `directory` until the artefact is whole; the same call goes on from it.

    Args:
        name: of the source, as templates name its slots.
        config: the section `ids`, or one of `sources`.
        dataset: prepared; its rows are the source's rows.
        directory: of the artefact; what stands there is replaced once the new one is whole.
        seed: of the training and of the validation subset.
        say: tells the user a line.

    Raises:
        UserError: files to import are not as they should be, or training fails.
    """
    chosen = _chosen(config)
    settings, made_from = source_identity(name, config, dataset, seed)
    progress = progress_file(directory)
    with new_directory(directory) as aside:
        if isinstance(chosen, Recipe):
            held_out = dataset.holding_out(config.held_out) if isinstance(config, Ids) else dataset
            figures = _train(chosen, held_out, aside, seed, progress, sha256_json([settings, made_from]), say)
        else:
            figures = _import(name, chosen, dataset, aside, seed, say)
        write_manifest(aside, KIND, settings=settings, made_from=made_from, name=name, **figures)
    progress.unlink(missing_ok=True)
    validation = figures["validation"]
    say(
        f"{name}: its own full ranking of {validation['n']} validation users: "
        f"hr@10 {validation['hr@10']:.4f}, ndcg@10 {validation['ndcg@10']:.4f}"
    )
    return open_source(directory)


def progress_file(directory: Path) -> Path:
    """Where the training of a source keeps its progress until the artefact is whole."""
    return directory.with_name(f".{directory.name}.progress.safetensors")


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
