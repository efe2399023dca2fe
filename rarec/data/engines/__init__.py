"""Engines that run the preparation: DuckDB, Spark, or any database that Ibis reaches by URL."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rarec.config.schema import Prepare
from rarec.data.engines.prepare_engine import (
    InputTable,
    NamedTable,
    PrepareEngine,
    TableLocation,
    compute_value,
)
from rarec.errors import UserError

__all__ = ["InputTable", "NamedTable", "PrepareEngine", "TableLocation", "compute_value", "open_engine"]

DUCKDB_FILE = "duckdb://"


@contextmanager
def open_engine(config: Prepare, spill: Path) -> Iterator[PrepareEngine]:
    """Open the engine of a configuration for the length of a `with` block.

    Args:
        config: the section `prepare`.
        spill: scratch directory, created on demand and removed at the end; `prepare.scratch` takes precedence.

    Raises:
        UserError: the engine is unknown or does not start.
    """
    engine = _start(config, spill)
    try:
        yield engine
    finally:
        engine.close()


def _start(config: Prepare, spill: Path) -> PrepareEngine:
    scratch = f"{config.scratch.rstrip('/')}/rarec-{uuid.uuid4().hex}" if config.scratch else str(spill)
    if config.engine == "duckdb" or config.engine.startswith(DUCKDB_FILE):
        from rarec.data.engines.duckdb_engine import DuckDBEngine

        database = config.engine.removeprefix(DUCKDB_FILE) if "://" in config.engine else None
        return DuckDBEngine(Path(scratch), config.memory, database)
    if config.engine == "spark":
        from rarec.data.engines.duckdb_engine import DuckDBEngine
        from rarec.data.engines.spark_engine import SparkEngine

        return SparkEngine(scratch, config.spark, DuckDBEngine(spill.with_name(f"{spill.name}-files"), config.memory))
    if "://" in config.engine:
        from rarec.data.engines.duckdb_engine import DatabaseEngine

        return DatabaseEngine(config.engine, Path(scratch), config.memory)
    raise UserError(
        f"field `prepare.engine`: unknown engine {config.engine!r}",
        "use duckdb, spark, or a URL: duckdb:///path/to/file, postgres://user:password@host/database, ...",
    )
