"""Engines that run the preparation: DuckDB, Spark, or any database that Ibis reaches by URL.

The steps of the preparation are Ibis expressions, and use nothing of an engine but `PrepareEngine`.
"""

import uuid
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, Protocol

import ibis.expr.types as ir
import pyarrow as pa

from rarec.config.schema import Prepare
from rarec.data.engines.table_files import TableLocation
from rarec.errors import UserError


class PrepareEngine(Protocol):
    """Read tables, keep intermediate results, and stream expressions out."""

    def read(self, location: TableLocation, roles: Mapping[str, str], *, lines: bool = False) -> ir.Table:
        """Read columns of a table.

        Args:
            location: files or a named table.
            roles: column name in the table, by role.
            lines: number the rows from 1, in the column `line`: in file order, or, for a named table, sorted by these
                columns.

        Returns:
            One column for each role.

        Raises:
            UserError: a column is missing or the table cannot be read (raised now, or when rows are fetched).
        """

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """Compute an expression and store its rows under a name, replacing what the name held before."""

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """Compute a small table and return its rows."""

    def batches(self, expression: ir.Table) -> Iterable[pa.RecordBatch]:
        """Stream the rows of an expression in its order.

        Read the stream to its end before using the engine again.
        """

    def close(self) -> None:
        """Release everything that was kept."""


def compute_value(engine: PrepareEngine, scalar: ir.Scalar) -> Any:
    """Compute a scalar expression."""
    return engine.rows(scalar.name("value").as_table())[0]["value"]


def open_engine(config: Prepare, spill: Path) -> AbstractContextManager[PrepareEngine]:
    """Open the engine of a configuration for the length of a `with` block.

    Args:
        config: the section `prepare`.
        spill: scratch directory, created on demand and removed at the end; `prepare.scratch` takes precedence.

    Raises:
        UserError: the engine is unknown or does not start.
    """
    from rarec.data.engines.duckdb_engine import DatabaseEngine, DuckDBEngine

    if config.engine != "spark" and "://" in (config.scratch or ""):
        raise UserError("field `prepare.scratch`: a URL, which the engine spark alone writes to", "name a local folder")
    scratch = f"{config.scratch.rstrip('/')}/rarec-{uuid.uuid4().hex}" if config.scratch else str(spill)
    if config.engine == "duckdb":
        return closing(DuckDBEngine(Path(scratch), config.memory))
    if config.engine == "spark":
        from rarec.data.engines.spark_engine import SparkEngine

        files = DuckDBEngine(spill.with_name(f"{spill.name}-files"), config.memory)
        return closing(SparkEngine(scratch, config.spark, files))
    if "://" in config.engine:
        return closing(DatabaseEngine(config.engine, Path(scratch), config.memory))
    raise UserError(
        f"field `prepare.engine`: unknown engine {config.engine!r}",
        "use duckdb, spark, or a URL: duckdb:///path/to/file, postgres://user:password@host/database, ...",
    )
