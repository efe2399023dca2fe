"""Engines that run the preparation: DuckDB, Spark, or any database that Ibis reaches by URL."""

import uuid
from contextlib import AbstractContextManager, closing
from pathlib import Path

from rarec.config.schema import Prepare
from rarec.data.engines.prepare_engine import PrepareEngine
from rarec.errors import UserError


def open_engine(config: Prepare, spill: Path) -> AbstractContextManager[PrepareEngine]:
    """Open the engine of a configuration for the length of a `with` block.

    Args:
        config: the section `prepare`.
        spill: scratch directory, created on demand and removed at the end; `prepare.scratch` takes precedence.

    Raises:
        UserError: the engine is unknown or does not start.
    """
    from rarec.data.engines.duckdb_engine import DatabaseEngine, DuckDBEngine

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
