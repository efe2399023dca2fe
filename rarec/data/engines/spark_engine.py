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

from rarec.data.engines.file_checks import check_parquet_columns, raise_if_damaged
from rarec.data.engines.prepare_engine import InputTable, TableLocation, check_columns, check_types, display_name
from rarec.data.engines.table_files import DELIMITED, TableFiles
from rarec.errors import UserError

try:
    from py4j.protocol import Py4JError
    from pyspark import SparkContext
    from pyspark.errors import PySparkException
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql import functions as F

    from rarec.data.engines.spark_scan import hadoop_path, identifier, json_unfit, raise_if_not_utf8, scan
except ImportError as missing:
    raise UserError(f"prepare.engine: spark needs PySpark ({missing})", "pip install 'rarec[spark]'") from None

REQUIRED_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.parquet.binaryAsString": "true",
    # with pruning, rows with too few fields would pass unnoticed
    "spark.sql.csv.parser.columnPruning.enabled": "false",
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


class SparkEngine:
    """Run the preparation on Spark, in the active session if there is one, else in a new session.

    A new session is stopped with the engine; an existing one gets its settings back.

    Args:
        scratch: scratch directory or URL that all executors can reach; removed at the end.
        settings: settings of the session, applied after the defaults.

    Raises:
        UserError: Spark does not start.
    """

    def __init__(self, scratch: str, settings: Mapping[str, str]) -> None:
        self._scratch = scratch if "://" in scratch else str(Path(scratch).absolute())
        self._system = _file_system(self._scratch)
        self._own_session = SparkContext._active_spark_context is None
        self._session = _start_session(settings, self._own_session)
        self._former_settings = (
            {} if self._own_session else {name: self._session.conf.get(name, None) for name in REQUIRED_SETTINGS}
        )
        for name, setting in REQUIRED_SETTINGS.items():
            self._session.conf.set(name, setting)
        self._ibis = ibis.pyspark.connect(self._session)
        self._kept: dict[str, int] = {}
        self._views: set[str] = set()

    def read(
        self, location: TableLocation, roles: Mapping[str, str], section: str, *, lines: bool = False
    ) -> InputTable:
        """See `PrepareEngine`. Parquet and catalog tables are read in place; other formats are copied first."""
        with _readable(location):
            columnar = not isinstance(location, TableFiles) or location.format == "parquet"
            frame, names = scan(self._session, location)
            check_columns(names, roles, location, section)
            if isinstance(location, TableFiles) and location.format == "parquet":
                check_parquet_columns(location, roles.values())
            own = [F.col(identifier(names[name])).alias(role) for role, name in roles.items()]
            name = section.rpartition(".")[2]
            if lines:
                table = self._numbered(frame, own, name, isinstance(location, TableFiles))
            else:
                table = self._view(name, frame.select(*own)) if columnar else self._write(name, frame.select(*own))
            unfit = json_unfit(self._session, location, roles) if isinstance(location, TableFiles) else {}
        check_types(table, roles, location, section, unfit)
        untyped = isinstance(location, TableFiles) and location.format in DELIMITED
        if isinstance(location, TableFiles) and untyped and self._marks(table):
            raise_if_not_utf8(location)
        return InputTable(table, frozenset(roles) if untyped else frozenset())

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """See `PrepareEngine`."""
        with _computing():
            return self._write(name, self._sql(expression))

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """See `PrepareEngine`."""
        with _computing():
            found = self._sql(expression).toArrow()
        rows: list[dict[str, Any]] = found.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> Iterator[pa.RecordBatch]:
        """See `PrepareEngine`. Spark numbers the part files of a sorted result in its order."""
        with _computing():
            self._write("result", self._sql(expression))
        folder = self._path("result")
        for part in sorted(name for name in self._system.find(folder) if name.endswith(".parquet")):
            with self._system.open(part) as file:
                yield from pq.ParquetFile(file).iter_batches()

    def close(self) -> None:
        """See `PrepareEngine`."""
        for view in self._views:
            self._session.catalog.dropTempView(view)
        if self._system.exists(self._scratch):
            self._system.rm(self._scratch, recursive=True)
        if self._own_session:
            _stop_session(self._session)
        for name, setting in self._former_settings.items():
            self._session.conf.unset(name) if setting is None else self._session.conf.set(name, setting)

    def _numbered(self, frame: DataFrame, own: list[Any], name: str, files: bool) -> ir.Table:
        """Add `line`. A single task numbers all rows, so use this for catalogues, not for logs."""
        path = F.expr("url_decode(replace(_metadata.file_path, '+', '%2B'))")
        places = {"_file": path, "_block": F.col("_metadata.file_block_start"), "_row": F.monotonically_increasing_id()}
        keys = [place.alias(key) for key, place in places.items()] if files else []
        table = self._write(name, frame.select(*own, *keys))
        order = list(places) if files else list(table.columns)
        line = ibis.row_number().over(ibis.window(order_by=order)) + 1
        return table.mutate(line=line).drop(*places) if files else table.mutate(line=line)

    def _marks(self, table: ir.Table) -> int:
        """Count texts with U+FFFD, which Spark writes for bytes that are not UTF-8 (and which text may contain)."""
        texts = [table[name] for name in table.columns if table[name].type().is_string()]
        marks = sum((text.contains("\ufffd").sum().fill_null(0) for text in texts), ibis.literal(0))
        return int(self.rows(table.agg(marks=marks))[0]["marks"])

    def _write(self, name: str, frame: DataFrame) -> ir.Table:
        number = self._kept.get(name, 0)
        self._kept[name] = number + 1
        frame.write.mode("overwrite").parquet(hadoop_path(self._path(name)))
        if number:
            self._system.rm(self._path(name, number), recursive=True)
        reader = self._session.read.schema(frame.schema)  # or a job would read it from the files
        return self._view(name, reader.parquet(hadoop_path(self._path(name))))

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
def _readable(location: TableLocation) -> Iterator[None]:
    try:
        yield
    except (PySparkException, Py4JError) as error:
        if isinstance(location, TableFiles) and location.format != "parquet":
            raise_if_damaged(location, ())  # names the file, which Spark may not
        raise UserError(
            f"{display_name(location)} cannot be read: {_reason(error)[:200]}",
            "repair or remove that row, or convert the file",
        ) from None


@contextmanager
def _computing() -> Iterator[None]:
    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise UserError(
            f"Spark: {_reason(error)}", "raise memory in prepare.spark, or repair the table named above"
        ) from None


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
        raise UserError(
            f"prepare.engine: Spark does not start: {error}", "install Java 17 or 21; see prepare.spark"
        ) from None
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
