"""Read the ranks, or the scores, that another system gave this run's test users, to compare it in pairs.

A file (Parquet, or CSV with a header) has one of two forms; ids are those of the log, other columns are ignored:

- `user`, `rank`: the rank of the user's test target in the full catalogue, without the items that do not compete; 1 is
  best.
- `user`, `item`, `score`: items with their scores for the user, higher is better; the whole catalogue, or the best few
  hundred.

Where a user has several questions (`evaluate.targets: all`), `place` says which one: 1 is the user's first.

From scores, ranks follow this project's rule: ties count against the system, and a target that is not listed has the
worst rank, the number of items in the catalogue.

Shape letters: U questions, N catalogue, R rows of the file, S pairs of question and seen item.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rarec.data.dataset import PreparedDataset
from rarec.data.tables import read_columns
from rarec.errors import UserError
from rarec.evaluation.results import EXTERNAL
from rarec.ranking.rank import EvalBatch

Int64 = npt.NDArray[np.int64]
FORMS = "`user, rank` or `user, item, score`"
_PLAIN = (["rank", "user"], ["item", "score", "user"])
_COLUMNS = (*_PLAIN, *(sorted([*columns, "place"]) for columns in _PLAIN))
TYPES = {"user": pa.string(), "place": pa.float64(), "item": pa.string(), "score": pa.float64(), "rank": pa.float64()}
IDS = {"user": pa.string(), "item": pa.string()}
"""Ids of CSV files are text, else 007 would be read as 7."""


def external_ranks(
    files: Mapping[str, str], dataset: PreparedDataset, batch: EvalBatch, say: Callable[[str], None]
) -> dict[str, Int64]:
    """Read other systems' ranks of the test targets (U,), by row name; 1 is best.

    Args:
        files: paths by name, as in `evaluate.external`: each a Parquet file, or a CSV file (by its name's end, `.csv`).
        dataset: for the ids of users and items.
        batch: the questions.
        say: prints a line on how many targets a file does not list, and what is not of this run.

    Raises:
        UserError: a file cannot be read, lacks a column, has a value that is missing or not allowed, names a question
            (or an item of one) twice, or lacks a question.
    """
    ranks: dict[str, Int64] = {}
    for name, path in files.items():
        external = _File(Path(path), dataset, batch, say)
        ranks[EXTERNAL + name] = external.given_ranks() if "rank" in external.names else external.ranks_by_score()
    return ranks


class _File:
    """One file, with the question of each row, -1 for those of users that are no test users."""

    def __init__(self, path: Path, dataset: PreparedDataset, batch: EvalBatch, say: Callable[[str], None]) -> None:
        self.path = path
        self.batch = batch
        self.item_ids = dataset.item_ids
        self.say = say
        self.n_users, self.n_items = len(batch.user_rows), len(dataset.item_ids)
        self.table = _read(path)
        self.names = self.table.column_names
        user_ids = dataset.user_ids.take(batch.user_rows)
        for name in self.names:
            null_R = self.table[name].is_null(nan_is_null=True).to_numpy()
            self.refuse(null_R, name, "has no value", "give one (ids as in the log), or drop the row")
        self.user_R = self.rows("user", user_ids, "users are no test users: ignored")
        if "place" in self.names:
            self.user_R = self.questions(self.table["place"].to_numpy())
        missing = np.setdiff1d(np.arange(self.n_users), self.user_R)
        if len(missing):
            such_as = f"{user_ids[int(missing[0])].as_py()!r}, place {batch.places[missing[0]]}"
            problem = f"{path} lacks {len(missing):,} of {self.n_users:,} questions, such as that of user {such_as}"
            remedy = "rank them all (columns `user` and `place`); evaluation/ranks.parquet of `rarec evaluate` has them"
            raise UserError(problem, remedy)

    def questions(self, place_R: npt.NDArray[np.float64]) -> Int64:
        """Return the question of each row, given that of its user's first and its place among the user's."""
        first_R, users = self.user_R, self.batch.user_rows
        asked_R = np.searchsorted(users, users[first_R], side="right") - first_R
        wrong_R = (first_R >= 0) & ((place_R < 1) | (place_R > asked_R) | (place_R != np.floor(place_R)))
        self.refuse(wrong_R, "place", "is no question of the user", "number each user's questions from 1")
        return np.where(first_R < 0, -1, first_R + place_R.astype(np.int64) - 1)

    def given_ranks(self) -> Int64:
        """Return the ranks of a file of the first form."""
        ranks_R = self.table["rank"].to_numpy()
        wrong_R = (ranks_R < 1) | (ranks_R > self.n_items) | (ranks_R != np.floor(ranks_R))
        self.refuse(
            wrong_R, "rank", "is no rank", f"give a whole number from 1 (best) to {self.n_items}, the catalogue"
        )
        self.refuse_repeated("user", self.user_R)
        known_R = self.user_R >= 0
        ranks_U = np.empty(self.n_users, np.int64)
        ranks_U[self.user_R[known_R]] = ranks_R[known_R]
        return ranks_U

    def ranks_by_score(self) -> Int64:
        """Return the ranks that follow from a file of the second form."""
        item_R = self.rows("item", self.item_ids.whole(), "items are not in the catalogue: ignored")
        pair_R = np.where(item_R < 0, -1, self.user_R * self.n_items + item_R)
        self.refuse_repeated("item", pair_R)
        scores_R = self.table["score"].to_numpy()
        targets_U = np.asarray(self.batch.targets, np.int64)
        target_R = (self.user_R >= 0) & (item_R == targets_U[self.user_R])
        target_scores_U = np.full(len(targets_U), np.nan)
        target_scores_U[self.user_R[target_R]] = scores_R[target_R]
        before_R = (pair_R >= 0) & ~target_R & (scores_R >= target_scores_U[self.user_R])  # never of a missing target
        before_R[before_R] = ~np.isin(pair_R[before_R], self.seen_pairs())
        ranks_U = 1 + np.bincount(self.user_R[before_R], minlength=len(targets_U))
        unlisted_U = np.isnan(target_scores_U)
        self.note(int(unlisted_U.sum()), "test targets are not listed: they get the worst rank")
        ranks_U[unlisted_U] = self.n_items
        return ranks_U

    def seen_pairs(self) -> Int64:
        """Return every pair of user and seen item as one number (S,)."""
        seen = enumerate(self.batch.seen)
        return np.concatenate([np.asarray(rows, np.int64) + user * self.n_items for user, rows in seen])

    def rows(self, name: str, ids: pa.Array, unknown: str) -> Int64:
        """Return the index of each value of a column in the ids, -1 for unknown ones, and count these."""
        rows = pc.fill_null(pc.index_in(self.table[name], value_set=ids.cast(pa.string())), -1)
        self.note(len(pc.unique(self.table[name].filter(pc.less(rows, 0)))), unknown)
        return np.asarray(rows.to_numpy(), np.int64)

    def note(self, count: int, what: str) -> None:
        """Print a count, if there is something to count."""
        if count:
            self.say(f"{self.path}: {count:,} {what}")

    def refuse_repeated(self, name: str, keys_R: Int64) -> None:
        """Refuse the first row whose key has occurred before; keys below 0 are ignored."""
        repeated_R = pd.Series(keys_R).duplicated().to_numpy() & (keys_R >= 0)
        self.refuse(repeated_R, name, "occurs again" + (" for the same user" if name == "item" else ""), "keep one row")

    def refuse(self, wrong_R: npt.NDArray[np.bool_], name: str, what: str, remedy: str) -> None:
        """Refuse the first row that is marked as wrong, with its value."""
        if wrong_R.any():
            row = int(wrong_R.argmax())
            value = self.table[name][row].as_py()
            raise UserError(f"{self.path}, row {row + 1}, column `{name}`: {value!r} {what}", remedy)


def _read(path: Path) -> pa.Table:
    """Read the columns of one of the two forms."""
    try:
        if path.suffix.lower() == ".csv":
            table = pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=IDS))
        else:
            table = read_columns(path)
        names = [name for name in table.column_names if name in TYPES]
        if sorted(names) not in _COLUMNS:
            problem = f"{path} has the columns {', '.join(table.column_names)}"
            raise UserError(problem, f"give it {FORMS}, each column once, and not both forms")
        for name in names:
            _check_type(path, name, table.schema.field(name).type)
        return table.select(names).cast(pa.schema([(name, TYPES[name]) for name in names]), safe=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", f"write Parquet, or CSV, with columns {FORMS}") from None


def _check_type(path: Path, name: str, kind: pa.DataType) -> None:
    """Refuse ids that are no whole numbers or text, and scores and ranks that are no numbers."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    fits = is_text if name in IDS else pa.types.is_floating(kind)
    if not fits and not pa.types.is_integer(kind):
        remedy = "write ids as whole numbers or text, as they are in the log" if name in IDS else "give numbers"
        raise UserError(f"{path}, column `{name}` holds {kind}", remedy)
