"""Read the ranks, or the scores, that another system gave this run's test users, to compare it in pairs.

A file (Parquet, or CSV with a header) has one of two forms; ids are those of the log, other columns are ignored:

- `user`, `rank`: the rank of the user's test target in the full catalogue, without the user's earlier items; 1 is best.
- `user`, `item`, `score`: items with their scores for the user, higher is better; the whole catalogue, or the best few
  hundred.

From scores, ranks follow this project's rule: earlier items are excluded, ties count against the system, and a target
that is not listed has the worst rank, the number of items in the catalogue.

Shape letters: U test users, N catalogue, R rows of the file about known users and items, S pairs of user and seen item.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rarec.data.tables import Column, read_columns
from rarec.errors import UserError
from rarec.evaluation.labels import EXTERNAL

Rows = npt.NDArray[np.integer]
Int64 = npt.NDArray[np.int64]
FORMS = "`user, rank` or `user, item, score`"
FIELDS = ("user", "item", "score", "rank")


@dataclass(frozen=True)
class ExternalRanks:
    """Another system's ranks of this run's test targets.

    Attributes:
        ranks_U: ranks, 1 is best.
        notes: how many targets the file does not list, and how many of its users and items are not of this run.
    """

    ranks_U: Int64
    notes: list[str]


@dataclass(frozen=True)
class TargetUsers:
    """The test users to rank for.

    Attributes:
        user_ids: their ids (U,).
        item_ids: the catalogue's ids (N,).
        targets_U: item row of each user's target.
        seen: item rows of each user's earlier interactions, in any order, repeated or not.
    """

    user_ids: pa.Array
    item_ids: Column[int | str]
    targets_U: Rows
    seen: Sequence[Rows]


def external_ranks(
    files: Mapping[str, str], users: TargetUsers, *, say: Callable[[str], None]
) -> dict[str, npt.NDArray[np.int64]]:
    """Read the ranks of every other system, by row name.

    Args:
        files: paths by name, as in `evaluate.external`.
        users: the test users, their targets and what they have seen.
        say: prints one line to the user.

    Raises:
        UserError: see `read_external`.
    """
    ranks: dict[str, Int64] = {}
    for name, path in files.items():
        external = read_external(Path(path), users)
        for note in external.notes:
            say(f"{path}: {note}")
        ranks[EXTERNAL + name] = external.ranks_U
    return ranks


def read_external(path: Path, users: TargetUsers) -> ExternalRanks:
    """Read another system's ranks of the test targets, in the order of the users.

    Args:
        path: a Parquet file, or a CSV file (by its name's end, `.csv`).
        users: the test users, their targets and what they have seen.

    Raises:
        UserError: the file cannot be read, lacks a column, has a value that is missing or not allowed, names a user (or
            a user's item) twice, or lacks a test user.
    """
    table = _read(path)
    return _from_ranks(path, table, users) if "rank" in table.column_names else _from_scores(path, table, users)


def _read(path: Path) -> pa.Table:
    """Read the columns of one of the two forms, ids as text."""
    try:
        if path.suffix.lower() == ".csv":
            as_text = {"user": pa.string(), "item": pa.string()}  # else 007 would be read as 7
            table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=as_text))
        else:
            table = read_columns(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", f"write Parquet, or CSV, with columns {FORMS}") from None
    names = [name for name in table.column_names if name in FIELDS]
    if len(set(names)) < len(names):
        twice = next(name for name in FIELDS if names.count(name) > 1)
        raise UserError(f"{path} has the column `{twice}` twice", "drop or rename one")
    if set(names) not in ({"user", "rank"}, {"user", "item", "score"}):
        problem = f"{path} has the columns {', '.join(table.column_names)}"
        raise UserError(problem, f"give it {FORMS}, and not both forms")
    return table.select(names)


def _from_ranks(path: Path, table: pa.Table, users: TargetUsers) -> ExternalRanks:
    ranks_R, n_items = _numbers(path, table, "rank"), len(users.item_ids)
    wrong = np.flatnonzero((ranks_R < 1) | (ranks_R > n_items) | (ranks_R != np.floor(ranks_R)))
    if len(wrong):
        problem = f"{path}, row {wrong[0] + 1}, column `rank`: {ranks_R[wrong[0]]:g} is not a rank"
        raise UserError(problem, f"give a whole number from 1 (best) to {n_items}, the size of the catalogue")
    user_R, unknown = _places(path, table, "user", users.user_ids)
    known = np.flatnonzero(user_R >= 0)
    _raise_if_repeated(path, known, user_R[known], table, "user")
    _raise_if_missing(path, user_R, users)
    ranks_U = np.empty(len(users.user_ids), np.int64)
    ranks_U[user_R[known]] = ranks_R[known]
    return ExternalRanks(ranks_U, _notes(0, unknown, 0))


def _from_scores(path: Path, table: pa.Table, users: TargetUsers) -> ExternalRanks:
    scores_R, n_items = _numbers(path, table, "score"), len(users.item_ids)
    user_R, unknown_users = _places(path, table, "user", users.user_ids)
    item_R, unknown_items = _places(path, table, "item", users.item_ids.whole())
    _raise_if_missing(path, user_R, users)
    known = np.flatnonzero((user_R >= 0) & (item_R >= 0))
    user_R, item_R, scores_R = user_R[known], item_R[known], scores_R[known]
    pair_R = user_R * n_items + item_R
    _raise_if_repeated(path, known, pair_R, table, "user", "item")
    targets_U = np.asarray(users.targets_U, np.int64)
    is_target_R = item_R == targets_U[user_R]
    target_scores_U = np.full(len(targets_U), np.nan)
    target_scores_U[user_R[is_target_R]] = scores_R[is_target_R]
    before_R = ~is_target_R & (scores_R >= target_scores_U[user_R])  # never true where the target is not listed
    before_R[before_R] = ~np.isin(pair_R[before_R], _seen_pairs(users))
    ranks_U = 1 + np.bincount(user_R[before_R], minlength=len(targets_U))
    unlisted_U = np.isnan(target_scores_U)
    ranks_U[unlisted_U] = n_items
    return ExternalRanks(ranks_U, _notes(int(unlisted_U.sum()), unknown_users, unknown_items))


def _notes(unlisted: int, unknown_users: int, unknown_items: int) -> list[str]:
    counts = {
        "test targets are not listed: they get the worst rank": unlisted,
        "users are no test users: ignored": unknown_users,
        "items are not in the catalogue: ignored": unknown_items,
    }
    return [f"{count:,} {what}" for what, count in counts.items() if count]


def _seen_pairs(users: TargetUsers) -> Int64:
    """Return every pair of user and seen item as one number (S,)."""
    n_items = len(users.item_ids)
    return np.concatenate([np.asarray(rows, np.int64) + user * n_items for user, rows in enumerate(users.seen)])


def _numbers(path: Path, table: pa.Table, name: str) -> npt.NDArray[np.float64]:
    """Return a column as numbers, none of them missing."""
    column = table[name]
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UserError(f"{path}, column `{name}` holds {column.type}", "give numbers")
    numbers: npt.NDArray[np.float64] = column.cast(pa.float64(), safe=False).to_numpy()  # null becomes NaN
    _raise_if_null(path, np.isnan(numbers), name, "a number")
    return numbers


def _places(path: Path, table: pa.Table, name: str, ids: pa.Array) -> tuple[Int64, int]:
    """Return the index of each value of a column in the ids, -1 if unknown, and the number of unknown ids."""
    column = table[name].combine_chunks()
    _raise_if_null(path, column.is_null().to_numpy(zero_copy_only=False), name, "the id as in the log")
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(check(column.type) for check in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)):
        problem = f"{path}, column `{name}` holds {column.type}"
        raise UserError(problem, "write ids as whole numbers or text, as they are in the log")
    text = column.cast(pa.string())
    places = pc.fill_null(pc.index_in(text, value_set=ids.cast(pa.string())), -1).to_numpy().astype(np.int64)
    return places, len(pc.unique(text.filter(pa.array(places < 0))))


def _raise_if_null(path: Path, null_R: npt.NDArray[np.bool_], name: str, wanted: str) -> None:
    if null_R.any():
        problem = f"{path}, row {null_R.argmax() + 1}, column `{name}` has no value"
        raise UserError(problem, f"give {wanted}, or drop the row")


def _raise_if_repeated(path: Path, rows: Int64, keys: Int64, table: pa.Table, *names: str) -> None:
    """Refuse the first row whose key has occurred before."""
    _, first = np.unique(keys, return_index=True)
    repeated = np.setdiff1d(np.arange(len(keys)), first)
    if len(repeated):
        row = int(rows[repeated[0]])
        what = ", ".join(f"{name} {table[name][row].as_py()!r}" for name in names)
        raise UserError(f"{path}, row {row + 1}: {what} occurs again", "keep one row of each")


def _raise_if_missing(path: Path, user_R: Int64, users: TargetUsers) -> None:
    total = len(users.user_ids)
    missing = np.setdiff1d(np.arange(total), user_R)
    if len(missing):
        such_as = f"{len(missing):,} of {total:,} test users, such as {users.user_ids[int(missing[0])].as_py()!r}"
        remedy = "rank every test user; `rarec evaluate` lists them in evaluation/ranks.parquet"
        raise UserError(f"{path}, column `user` lacks {such_as}", remedy)
