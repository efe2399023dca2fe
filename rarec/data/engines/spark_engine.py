"""The Spark engine: the same steps on a cluster, or on all cores of this machine.

Intermediate and streamed results are written as Parquet to a scratch directory that the driver and all executors can
reach: nothing is computed twice, query plans stay short, and the loss of an executor loses no result.
"""

import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from rarec.data.engines.duckdb_engine import DuckDBEngine
from rarec.data.engines.table_checks import check_columns, check_parquet, check_types
from rarec.data.engines.table_files import NAMED, TableLocation, open_file_system
from rarec.data.tables import write_rows
from rarec.errors import UserError

try:
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.errors import PySparkException
    from pyspark.sql import Column, DataFrame, SparkSession
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
        self._system = open_file_system(self._scratch, "prepare.scratch")
        self._files = files
        self._own_session = SparkContext._active_spark_context is None
        self._session = _start_session(settings, self._own_session)
        self._former_settings = {name: self._session.conf.get(name, None) for name in REQUIRED_SETTINGS}
        for name, setting in REQUIRED_SETTINGS.items():
            self._session.conf.set(name, setting)
        self._ibis = ibis.pyspark.connect(self._session)
        self._folders: dict[str, str] = {}
        self._views: set[str] = set()

    def read(self, location: TableLocation, roles: Mapping[str, str], *, lines: bool = False) -> ir.Table:
        """See `PrepareEngine`. Parquet and catalog tables are read in place; text files are copied by the driver."""
        name = f"read_{location.short_section}"
        if location.format not in (NAMED, "parquet"):
            return self._copy(name, self._files.read(location, roles, lines=lines))
        with _explained(f"{location.name} cannot be read", "repair or convert the file"):
            frame = self._scan(location)
            check_columns(frame.columns, roles, location)
            firsts = check_parquet(location, roles.values(), pages=False)
            columns = [F.col(_identifier(column)).alias(role) for role, column in roles.items()]
            of_files = lines and location.format == "parquet"
            frame = self._numbered(frame, columns, firsts) if of_files else frame.select(*columns)
            table = self._view(name, frame)
        check_types(table, roles, location)
        if lines and location.format == NAMED:
            table = table.mutate(line=ibis.row_number().over(order_by=list(table.columns)) + 1)
        return table

    def _numbered(self, frame: DataFrame, columns: Sequence[Column], firsts: Sequence[int]) -> DataFrame:
        """Return columns of Parquet files, and the number of each row, `line`.

        Args:
            frame: the files as they are read.
            columns: columns of the frame.
            firsts: the number of each file's first row, in the order of the files' names.
        """
        files = sorted(frame.inputFiles(), key=unquote)  # URLs
        first = self._session.createDataFrame(list(zip(files, firsts, strict=True)), "_file string, _first bigint")
        row = frame.metadataColumn("_metadata")["row_index"]
        rows = frame.select(*columns, F.input_file_name().alias("_file"), row.alias("_row"))
        joined = rows.join(F.broadcast(first), "_file").withColumn("line", F.col("_first") + F.col("_row"))
        return joined.drop("_file", "_first", "_row")

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING), self._replaced(name) as folder:
            frame = self._sql(expression)
            frame.write.parquet(hadoop_path(folder))
            # with the schema, or a job would read it from the files
            return self._view(name, self._session.read.schema(frame.schema).parquet(hadoop_path(folder)))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _explained(*COMPUTING):
            table = self._sql(expression).toArrow()
        rows: list[dict[str, Any]] = table.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `PrepareEngine`. Spark numbers the part files of a sorted result in its order."""
        self.keep("result", expression)
        for part in sorted(name for name in self._system.find(self._folders["result"]) if name.endswith(".parquet")):
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
        if location.format == NAMED:
            return self._session.table(location.path)
        reader = self._session.read.option("parquet.page.verify-checksum.enabled", "true")  # Spark leaves it off
        return reader.parquet(*map(_pattern, location.paths))

    def _copy(self, name: str, table: ir.Table) -> ir.Table:
        """Copy a table from the engine of the files to the scratch directory."""
        with _explained(*COMPUTING), self._replaced(name) as folder:
            self._system.makedirs(folder)
            with self._system.open(f"{folder}/part.parquet", "wb") as file:
                write_rows(self._files.batches(table), file, table.schema().to_pyarrow())
            return self._view(name, self._session.read.parquet(hadoop_path(folder)))

    @contextmanager
    def _replaced(self, name: str) -> Iterator[str]:
        """Yield a new folder for what a name will hold, and remove at the end the one that it had before."""
        before = self._folders.get(name)
        self._folders[name] = f"{self._scratch}/{name}-{uuid.uuid4().hex}"
        yield self._folders[name]
        if before:
            self._system.rm(before, recursive=True)

    def _view(self, name: str, frame: DataFrame) -> ir.Table:
        frame.createOrReplaceTempView(f"rarec_{name}")
        self._views.add(f"rarec_{name}")
        table: ir.Table = self._ibis.table(f"rarec_{name}")
        return table

    def _sql(self, expression: ir.Table) -> DataFrame:
        return self._session.sql(str(ibis.to_sql(expression, dialect="pyspark")))


def hadoop_path(path: str) -> str:
    """Return a path or URL in Hadoop's spelling."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return f"file://{Path(path).absolute()}"
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


def _reason(error: Exception) -> str:
    """Return the message of the deepest cause of a Java exception, after the file that was read, if it names one."""
    causes = re.findall(r"^(?:Caused by)?: ?[\w.$]+: (.+)", str(error), re.MULTILINE)
    reason = (causes[-1] if causes else str(error).strip().splitlines()[0]).strip()
    file = re.search(r"error while reading file (.+?)\. +SQLSTATE", str(error))
    return f"{unquote(file[1])}: {reason}" if file and file[1] not in reason else reason


@contextmanager
def _explained(task: str, remedy: str) -> Iterator[None]:
    """Turn an error of Spark into a `UserError`."""
    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise UserError(f"{task}: {_reason(error)[:400]}", remedy) from None


def _start_session(settings: Mapping[str, str], own: bool) -> SparkSession:
    """Return the active session, or start a new one.

    Args:
        settings: settings of the session; they override the defaults.
        own: True if the session is new.

    Raises:
        UserError: Spark does not start.
    """
    local = LOCAL_SETTINGS if own and settings.get("spark.master", "local").startswith("local") else {}
    try:
        session = SparkSession.builder.appName("rarec prepare").config(map={**local, **settings}).getOrCreate()
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
