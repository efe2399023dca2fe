"""The Spark engine: the same steps on a cluster, or on all cores of this machine.

Intermediate and streamed results are written as Parquet to a scratch directory that the driver and all executors can
reach: nothing is computed twice, query plans stay short, and the loss of an executor loses no result.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from rarec.data.engines.duckdb_engine import DuckDBEngine
from rarec.data.engines.prepare_engine import (
    InputTable,
    NamedTable,
    TableLocation,
    check_columns,
    check_types,
)
from rarec.data.engines.table_files import TableFiles, check_parquet
from rarec.data.tables import write_rows
from rarec.errors import UserError

try:
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.errors import PySparkException
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql import functions as F
except ImportError as missing:
    raise UserError(f"prepare.engine: spark needs PySpark ({missing})", "pip install 'rarec[spark]'") from None

REQUIRED_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.parquet.binaryAsString": "true",
}
LOCAL_SETTINGS = {
    "spark.master": "local[*]",
    "spark.driver.memory": "4g",
    "spark.driver.bindAddress": "127.0.0.1",  # the host name may not resolve
    "spark.driver.host": "127.0.0.1",
    "spark.sql.shuffle.partitions": str(4 * (os.cpu_count() or 2)),  # Spark's default of 200 is for clusters
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
"""Settings of a new session, unless the configuration names a cluster."""
SCHEMES = {"s3": "s3a", "gcs": "gs", "az": "abfs"}
"""URL schemes that Hadoop spells differently from fsspec."""
COMPUTING = ("Spark", "raise memory in prepare.spark, or repair the table named above")
"""Problem and remedy of an error during computation."""


class SparkEngine:
    """Run the preparation on Spark, in the active session if there is one, else in a new session.

    A new session is stopped with the engine; an existing one gets its settings back.

    Args:
        scratch: scratch directory or URL that all executors can reach; removed at the end.
        settings: settings of the session, applied after the defaults.
        files: engine that reads text files and numbers rows, on the driver; closed with this one.

    Raises:
        UserError: Spark does not start.
    """

    def __init__(self, scratch: str, settings: Mapping[str, str], files: DuckDBEngine) -> None:
        self._scratch = scratch if "://" in scratch else str(Path(scratch).absolute())
        self._system = _file_system(self._scratch)
        self._files = files
        self._own_session = SparkContext._active_spark_context is None
        self._session = _start_session(settings, self._own_session)
        self._former_settings = {name: self._session.conf.get(name, None) for name in REQUIRED_SETTINGS}
        for name, setting in REQUIRED_SETTINGS.items():
            self._session.conf.set(name, setting)
        self._ibis = ibis.pyspark.connect(self._session)
        self._kept: dict[str, int] = {}
        self._views: set[str] = set()

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Parquet and catalog tables are read in place; text files are copied by the driver."""
        name = section.rpartition(".")[2]
        if isinstance(location, TableFiles) and (lines or location.format != "parquet"):
            return self._copy(name, self._files.read(location, roles, section, lines=lines))
        with _explained(f"{location.name} cannot be read", "repair or convert the file"):
            frame = self._scan(location)
            check_columns(frame.columns, roles, location, section)
            if isinstance(location, TableFiles):
                check_parquet(location, roles.values(), pages=False)
            columns = [F.col(_identifier(column)).alias(role) for role, column in roles.items()]
            table = self._view(name, frame.select(*columns))
        check_types(table, roles, location, section, {})
        if lines:
            table = table.mutate(line=ibis.row_number().over(order_by=list(table.columns)) + 1)
        return InputTable(table)

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING), self._replaced(name) as path:
            frame = self._sql(expression)
            frame.write.parquet(hadoop_path(path))
            # with the schema, or a job would read it from the files
            return self._view(name, self._session.read.schema(frame.schema).parquet(hadoop_path(path)))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            table = self._sql(expression).toArrow()
        rows: list[dict[str, Any]] = table.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `PrepareEngine`. Spark numbers the part files of a sorted result in its order."""
        self.keep("result", expression)
        folder = self._path("result")
        for part in sorted(name for name in self._system.find(folder) if name.endswith(".parquet")):
            with self._system.open(part) as file:
                yield from pq.ParquetFile(file).iter_batches()

    def close(self) -> None:
        """See `PrepareEngine`."""
        self._files.close()
        for view in self._views:
            self._session.catalog.dropTempView(view)
        if self._system.exists(self._scratch):
            self._system.rm(self._scratch, recursive=True)
        if self._own_session:
            _stop_session(self._session)
            return
        for name, setting in self._former_settings.items():
            self._session.conf.unset(name) if setting is None else self._session.conf.set(name, setting)

    def _scan(self, location: TableLocation) -> DataFrame:
        if isinstance(location, NamedTable):
            return self._session.table(location.table)
        reader = self._session.read.option("parquet.page.verify-checksum.enabled", "true")  # Spark leaves it off
        return reader.parquet(*map(_pattern, location.paths))

    def _copy(self, name: str, read: InputTable) -> InputTable:
        """Copy a table from the engine of the files to the scratch directory."""
        with self._replaced(name) as path:
            self._system.makedirs(path)
            with self._system.open(f"{path}/part.parquet", "wb") as file:
                write_rows(self._files.batches(read.table), file, read.table.schema().to_pyarrow())
            return InputTable(self._view(name, self._session.read.parquet(hadoop_path(path))), read.untyped)

    @contextmanager
    def _replaced(self, name: str) -> Iterator[str]:
        """Yield the folder for what a name will hold, and remove at the end what it held before."""
        number = self._kept.get(name, 0)
        self._kept[name] = number + 1
        yield self._path(name)
        if number:
            self._system.rm(self._path(name, number), recursive=True)

    def _path(self, name: str, number: int | None = None) -> str:
        return f"{self._scratch}/{name}_{self._kept[name] if number is None else number}"

    def _view(self, name: str, frame: DataFrame) -> ir.Table:
        view = f"rarec_{name}_{self._kept.get(name, 0)}"
        frame.createOrReplaceTempView(view)
        self._views.add(view)
        table: ir.Table = self._ibis.table(view)
        return table

    def _sql(self, expression: ir.Table) -> DataFrame:
        return self._session.sql(str(ibis.to_sql(expression, dialect="pyspark")))


def hadoop_path(path: str) -> str:
    """Return a path or URL in Hadoop's spelling."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return f"file://{Path(path).absolute()}"
    if scheme == "memory":
        problem = f"{path} is in the memory of this process, where Spark cannot read it"
        raise UserError(problem, "store the file elsewhere, or use duckdb")
    return f"{SCHEMES.get(scheme, scheme)}://{rest}"


def _pattern(path: str) -> str:
    """Return the Hadoop pattern that matches one file exactly.

    Hadoop reads names as patterns, and skips hidden files silently.
    """
    if path.rpartition("/")[2].startswith(("_", ".")):
        raise UserError(f"{path} is skipped by Spark because of its first character", "rename it, or use duckdb")
    return re.sub(r"([][{}*?\\])", r"\\\1", hadoop_path(path))


def _identifier(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _file_system(location: str) -> fsspec.AbstractFileSystem:
    try:
        return url_to_fs(location)[0]
    except (ImportError, ValueError, OSError) as error:
        problem = f"prepare.scratch: {location} cannot be opened: {error}"
        raise UserError(problem, "install its fsspec driver, or use a directory that all executors can reach") from None


def _reason(error: Exception) -> str:
    """Return the message of the deepest cause of a Java exception."""
    causes = re.findall(r"^(?:Caused by)?: ?[\w.$]+: (.+)", str(error), re.MULTILINE)
    return (causes[-1] if causes else str(error).strip().splitlines()[0]).strip()


@contextmanager
def _explained(task: str, remedy: str) -> Iterator[None]:
    """Turn an error of Spark into a `UserError`."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise UserError(f"{task}: {_reason(error)[:200]}", remedy) from None


def _start_session(settings: Mapping[str, str], own: bool) -> SparkSession:
    """Return the active session, or start a new one.

    Args:
        settings: settings of the session; they override the defaults.
        own: True if the session is new.

    Raises:
        UserError: Spark does not start.
    """
    builder = SparkSession.builder.appName("rarec prepare")
    local = LOCAL_SETTINGS if own and settings.get("spark.master", "local").startswith("local") else {}
    for name, setting in {**local, **settings}.items():
        builder = builder.config(name, setting)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # no Java, or an unknown master: PySpark raises various types
        problem = f"prepare.engine: Spark does not start: {error}"
        raise UserError(problem, "install Java 17 or 21; see prepare.spark") from None
    if own:  # failures are raised, so Spark need not log them
        session.sparkContext.setLogLevel("FATAL")
        logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    return session


def _stop_session(session: SparkSession) -> None:
    """Stop a session and its JVM, which would otherwise keep gigabytes of memory during training."""
    session.stop()
    gateway, SparkContext._gateway, SparkContext._jvm = SparkContext._gateway, None, None
    if gateway is not None:
        gateway.shutdown()
        gateway.proc.stdin.close()  # the JVM runs until this is closed
        gateway.proc.wait()
