"""The engines that the tests run the preparation on: DuckDB always, Spark where it is installed.

CI sets RAREC_REQUIRE=spark, so that nothing is skipped there without notice.
"""

import functools
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rarec.config.schema import Prepare
from rarec.data.engines import PrepareEngine
from rarec.data.engines.duckdb_engine import DuckDBEngine

SPARK = {
    "spark.master": "local[2]",
    "spark.sql.shuffle.partitions": "2",
    "spark.driver.memory": "2g",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    # generating code and planning again while a query runs cost more than they save on a few rows
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
    # nor does a JVM that lives for minutes gain from the optimizing compiler, or from a garbage collector with threads
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}
"""Small, as the tests' tables are."""

_installed = importlib.util.find_spec("pyspark") is not None and shutil.which("java") is not None
_required = "spark" in os.environ.get("RAREC_REQUIRE", "")
needs_spark = pytest.mark.skipif(not _installed and not _required, reason="needs PySpark (extra spark) and Java 17")
ENGINES_HERE = ["duckdb", *(["spark"] if _installed or _required else [])]
ENGINES = ["duckdb", pytest.param("spark", marks=needs_spark)]


@functools.cache
def spark_session() -> Any:
    """Return the session that all tests share; the engine uses it and does not stop it."""
    from pyspark.sql import SparkSession

    builder = SparkSession.builder
    for setting, value in SPARK.items():
        builder = builder.config(setting, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("FATAL")
    return session


def start(name: str, spill: Path) -> PrepareEngine:
    """Return an engine by its name."""
    if name == "duckdb":
        return DuckDBEngine(spill)
    from rarec.data.engines.spark_engine import SparkEngine

    spark_session()
    return SparkEngine(str(spill), {}, DuckDBEngine(spill.with_name("files")))


def on(name: str, config: Prepare) -> Prepare:
    """Return the preparation, configured for another engine."""
    if name == "spark":
        spark_session()
    return config.model_copy(update={"engine": name})
