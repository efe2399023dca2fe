"""Spark's session: the caller's own, or one that begins and ends with the engine."""

import logging
import os
from collections.abc import Mapping

from pyspark import SparkContext
from pyspark.sql import SparkSession

from rarec.errors import UserError

ALWAYS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.parquet.binaryAsString": "true",
    # with pruning on, rows with too few fields go unnoticed
    "spark.sql.csv.parser.columnPruning.enabled": "false",
}
LOCAL = {
    "spark.master": "local[*]",
    "spark.driver.memory": "4g",
    "spark.driver.bindAddress": "127.0.0.1",  # the host's own name may not resolve
    "spark.driver.host": "127.0.0.1",
    "spark.sql.shuffle.partitions": str(4 * (os.cpu_count() or 2)),  # Spark's own 200 are for clusters
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
"""Unless the settings name a cluster."""


def start(settings: Mapping[str, str], ours: bool) -> SparkSession:
    """The session that runs, or a new one.

    Args:
        settings: of the session, before ours.
        ours: whether it is a new one.

    Raises:
        UserError: Spark does not start.
    """
    builder = SparkSession.builder.appName("rarec prepare")
    local = LOCAL if ours and settings.get("spark.master", "local").startswith("local") else {}
    for name, setting in {**local, **settings}.items():
        builder = builder.config(name, setting)
    try:
        session = builder.getOrCreate()
    except Exception as error:  # no Java, or no such master: PySpark raises of many kinds
        raise UserError(
            f"prepare.engine: Spark does not start: {error}", "install Java 17 or 21; see prepare.spark"
        ) from None
    if ours:  # what fails is raised, once
        session.sparkContext.setLogLevel("FATAL")
        logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    return session


def end(session: SparkSession) -> None:
    """Stop a session and its JVM, which would otherwise keep its gigabytes while models train."""
    session.stop()
    gateway, SparkContext._gateway, SparkContext._jvm = SparkContext._gateway, None, None
    if gateway is not None:
        gateway.shutdown()
        gateway.proc.stdin.close()  # the JVM lives as long as this is open
        gateway.proc.wait()
