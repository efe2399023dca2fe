"""The section `prepare`: where logs and catalogue are, which columns they have, what is kept and how it is split."""

from typing import Literal

from pydantic import Field, model_validator

from rarec.config.section import Count, Location, NonNegative, Part, Section, Share


class Table(Section):
    """Location of a table: files, or a name that the engine knows."""

    path: Location | None = None
    """A file, a directory or a glob, local or an fsspec URL (`s3://bucket/log/*.parquet`); `package:NAME/FILE` is a
    file inside an installed Python package. Formats: CSV, TSV, Parquet, JSONL, RecBole's `.inter` and `.item`."""
    table: str | None = None
    """Instead of `path`: a table that the engine knows, as `NAME` or `SCHEMA.NAME`."""

    @model_validator(mode="after")
    def _one_place(self) -> "Table":
        if (self.path is None) == (self.table is None):
            raise ValueError("name exactly one of `path` and `table`")
        return self


class Interactions(Table):
    """The log: one row an interaction."""

    user: str
    """Column of the user's id, integers or text."""
    item: str
    """Column of the item's id, integers or text."""
    time: str | None = None
    """Column of the time: epoch seconds or milliseconds, ISO 8601, or a timestamp of the file's own."""
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    """Unit of times that are numbers. `auto` finds it by their size, and refuses a column that mixes sizes of several
    units."""
    position: str | None = None
    """Column of the rank in the user's own order, where there is no time."""

    @model_validator(mode="after")
    def _one_order(self) -> "Interactions":
        if (self.time is None) == (self.position is None):
            raise ValueError("name exactly one of `time` and `position`: the order of a user's interactions")
        return self


class Items(Table):
    """The catalogue: one row an item."""

    item: str
    """Column of the item's id."""
    title: str
    """Column of the title."""
    text: list[str] = Field(default=[])
    """Further text columns, appended to the title in the item prompt."""
    untitled: str = "untitled item"
    """Text used in place of a missing title."""


class Split(Section):
    """Which interactions train, validate and test."""

    kind: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """Each user's last item tests and the one before it validates; or two global cuts in time."""
    validation_users: Count | None = None
    """Leave-one-out only: number of users who validate, a fixed random subset; the item before the last of all others
    trains. By default all validate, as in most published tables."""
    new_items: Part = 0.0
    """Leave-one-out only, to measure new items: share of the items, chosen by a hash of their ids, that are removed
    from training. Only interactions that are a user's last are kept of them, so they occur in the test alone."""
    validation_share: Share = 0.1
    """Temporal only: share of the interactions, in time order, in the validation window."""
    test_share: Share = 0.1
    """Temporal only: share of the interactions, in time order, in the test window."""


class Prepare(Section):
    """Logs to a prepared dataset."""

    engine: str = "duckdb"
    """What computes: `duckdb` in this process, `spark` (extra `spark`, Java 17 or 21), or an Ibis URL such as
    `postgres://user:password@host/database`, for tables there."""
    spark: dict[str, str] = Field(default={})
    """Settings of the Spark session, such as `spark.master: yarn`; local on all cores by default."""
    memory: str | None = None
    """Largest memory of DuckDB before it spills to disk, such as `8GB`; 80% of the machine's by default."""
    scratch: Location | None = None
    """Folder of an engine's temporary files; for Spark one that every executor sees. Inside `run.dir` by default."""
    interactions: Interactions
    items: Items
    min_user_interactions: Count = 5
    """Users with fewer interactions are dropped and counted."""
    min_item_interactions: NonNegative = 0
    """Items with fewer interactions are dropped together with these; 0 keeps the whole catalogue."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Rows of the same user, item and time, such as a row written twice: drop all but one, or keep them. `keep` has an
    effect only with `repeats: keep`; the other choices of `repeats` leave one of them anyway."""
    repeats: Literal["first", "last", "runs", "keep"] = "first"
    """When a user meets an item again at another time: keep the first or the last, keep the first of each uninterrupted
    run, or keep all."""
    split: Split = Split()
