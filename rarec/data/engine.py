"""The embedded engine: DuckDB in this process, spilling to a directory when memory runs short.

The steps of the preparation are Ibis expressions and know no engine; what is particular to one stands here.
"""

import difflib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa

from rarec.data.files import Files
from rarec.data.readers import Column, Source, open_source
from rarec.errors import UserError

CANONICAL = "^(0|-?[1-9][0-9]{0,17})$"
"""An integer in its one spelling, within int64."""


class EmbeddedEngine:
    """Reads tables, keeps intermediate results, and streams expressions out. Made by `embedded_engine`."""

    def __init__(self, spill: Path) -> None:
        self._ibis = ibis.duckdb.connect(temp_directory=str(spill), autoinstall_known_extensions=False)
        self._duckdb: duckdb.DuckDBPyConnection = self._ibis.con
        # the order of a scan is the order of the rows in the files, which `line` relies on
        self._duckdb.execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = true")
        self._kept: dict[str, int] = {}

    def read(
        self, files: Files, section: str, *, ids: Mapping[str, str], order: Mapping[str, str], text: Mapping[str, str]
    ) -> ir.Table:
        """Read the named columns of a table (see `rarec.data.readers` for their types).

        Args:
            files: the table.
            section: the configuration's section, for messages.
            ids: column of each id, by the role it plays, which is also its name in the result.
            order: columns that order the rows, likewise: numbers, or text.
            text: text columns, likewise.

        Returns:
            The columns by role, and `line`: the rows from 1 up, in the order of the files. Kept under the last word of
            `section`.

        Raises:
            UserError: a column is missing, the table has no rows, or a row cannot be read.
        """
        with _readable(files):
            source = open_source(files, self._query)
            roles = {**ids, **order, **text}
            columns = {role: _column(source, name, files, f"{section}.{role}") for role, name in roles.items()}
            select = [f'{_sql(column, role in order)} AS "{role}"' for role, column in columns.items()]
            scan = f"SELECT row_number() OVER () AS line, {', '.join(select)} FROM {source.relation}"
            table = self._keep(section.rpartition(".")[2], scan)
        if not self.value(table.count()):
            raise UserError(f"{files.name} has a header but no rows", "give a table with at least one row")
        whole = {role: not columns[role].text and self._integers(table[role]) for role in ids}
        return table.mutate(**{role: table[role].cast("int64") for role, yes in whole.items() if yes})

    def keep(self, name: str, expression: ir.Table) -> ir.Table:
        """Compute an expression and keep its rows under a name; what the name held before is given up."""
        return self._keep(name, str(ibis.to_sql(expression, dialect="duckdb")))

    def value(self, expression: ir.Scalar) -> Any:
        """Compute one value."""
        return expression.to_pyarrow().as_py()

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """Compute a table that is known to be small."""
        found = self.batches(expression).read_all()
        # DuckDB sums integers to 128 bits, which arrive as decimals
        rows: list[dict[str, Any]] = found.cast(expression.schema().to_pyarrow()).to_pylist()
        return rows

    def batches(self, expression: ir.Table) -> pa.RecordBatchReader:
        """Stream an expression's rows; read it to its end before anything else is asked of the engine."""
        return pa.RecordBatchReader.from_stream(self._duckdb.sql(str(ibis.to_sql(expression, dialect="duckdb"))))

    def close(self) -> None:
        """Give up everything kept."""
        self._ibis.disconnect()

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        return self._duckdb.execute(sql).fetchall()

    def _keep(self, name: str, sql: str) -> ir.Table:
        number = self._kept.get(name, 0)
        self._duckdb.execute(f"CREATE TEMP TABLE {name}_{number + 1} AS {sql}")
        if number:
            self._duckdb.execute(f"DROP TABLE {name}_{number}")
        self._kept[name] = number + 1
        return self._table(f"{name}_{number + 1}")

    def _table(self, name: str) -> ir.Table:
        table: ir.Table = self._ibis.table(name, database=("temp", "main"))
        return table

    def _integers(self, column: ir.Column) -> bool:
        return bool(self.value(column.re_search(CANONICAL).all()))


@contextmanager
def embedded_engine(spill: Path) -> Iterator[EmbeddedEngine]:
    """An engine for the length of a `with`; `spill` is a directory of its own, made when needed and removed."""
    engine = EmbeddedEngine(spill)
    try:
        yield engine
    finally:
        engine.close()
        shutil.rmtree(spill, ignore_errors=True)


def _sql(column: Column, order: bool) -> str:
    return column.sql if order and column.number else column.as_text


def _column(source: Source, name: str, files: Files, field: str) -> Column:
    """The column of that name, or an error that names those which are there."""
    if name in source.columns:
        return source.columns[name]
    folded = {known.casefold(): known for known in source.columns}
    close = difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.5)
    hint = f"; did you mean {folded[close[0]]!r}?" if close else ""
    raise UserError(
        f"{files.name} has no column {name!r} ({field.partition('_')[0]}){hint}",
        f"its columns: {', '.join(source.columns)}",
    )


@contextmanager
def _readable(files: Files) -> Iterator[None]:
    """Turn the engine's complaint about a file into one that names the file and the line."""
    try:
        yield
    except duckdb.Error as error:
        text = re.split(r"\n\s*Possible|\n\s*file = ", str(error))[0]
        where = re.search(r"file = (.+)", str(error))
        name = where[1].strip() if where else files.name
        problem = re.sub(r"^[A-Za-z ]+Error: ", "", text).strip().replace("\n", "; ")
        raise UserError(f"{name} cannot be read: {problem}", "mend or remove that row, or convert the file") from None
