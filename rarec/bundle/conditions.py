"""Conditions on the columns of a catalogue, such as `in_stock = true and category in ('lamps', 'chairs')`.

They are parsed as SQL, and computed here from a short list of forms: no text ever reaches a database. As in SQL, a
comparison with a missing value is neither true nor false; an item is chosen where the whole condition is true. Needs no
torch. Shape letter: N catalogue.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from sqlglot import Dialect, exp
from sqlglot.errors import SqlglotError, TokenError

from rarec.errors import UserError, nearest

Columns = Mapping[str, pa.Array]
"""Columns of a catalogue by name, (N,) each."""
Node = Any
"""A node of sqlglot's tree."""
LONGEST = 10_000
"""Characters of a condition."""
EXAMPLE = "in_stock = true and category in ('lamps', 'chairs')"
_FORMS = f"use comparisons, and, or, not, in (...) and is null alone: {EXAMPLE}"
KINDS: dict[pa.DataType, str] = {
    pa.bool_(): "true or false",
    pa.int64(): "a number",
    pa.float64(): "a number",
    pa.string(): "text",
    pa.timestamp("us"): "a time",
}
"""Types of columns, and what a value of them is."""
DATED = ("a time", "a number")
"""What a column of dates may hold."""
_VALUES = {"true or false": (bool,), "a number": (int, Decimal), "text": (str,), "a time": (str,)}
_COMPARED: dict[type[Any], Callable[[Any, Any], Any]] = {
    exp.EQ: pc.equal,
    exp.NEQ: pc.not_equal,
    exp.LT: pc.less,
    exp.LTE: pc.less_equal,
    exp.GT: pc.greater,
    exp.GTE: pc.greater_equal,
}
_JOINED: dict[type[Any], Callable[[Any, Any], Any]] = {exp.And: pc.and_kleene, exp.Or: pc.or_kleene}


def matching(condition: str, columns: Columns) -> npt.NDArray[np.bool_]:
    """Return the items for which a condition is true, (N,).

    Args:
        condition: comparisons of columns with values or each other, `in (...)`, `is null`; with `and`, `or`, `not`.
        columns: of the catalogue by name, of the types in `KINDS`.

    Raises:
        UserError: it is not such a condition, names an unknown column, or compares values of two kinds.
    """
    try:
        chosen = _chosen(_parsed(condition), columns)
    except RecursionError:
        raise UserError("where: the condition is nested too deeply", "write it shorter") from None
    return np.asarray(pc.fill_null(chosen, False).to_numpy(zero_copy_only=False), np.bool_)


def _parsed(condition: str) -> Node:
    if len(condition) > LONGEST:
        raise UserError(
            f"where: the condition has more than {LONGEST:,} characters", "use allow or deny for long lists"
        )
    try:
        trees = Dialect.get_or_raise("duckdb").parse_into(exp.Condition, condition)
    except TokenError:
        raise UserError("where: a quotation mark is not closed", f"write text in single quotes: {EXAMPLE}") from None
    except SqlglotError as error:
        near = next(
            (part.get("highlight") for part in getattr(error, "errors", ()) if part.get("highlight")), "its end"
        )
        raise UserError(f"where: no condition, from {near!r} on", _FORMS) from None
    if len(trees) != 1 or trees[0] is None:
        raise UserError("where: there must be one condition", _FORMS)
    if any(node.comments for node in trees[0].walk()):
        raise UserError("where: a condition has no comments", "leave them out")
    return trees[0]


def _chosen(node: Node, columns: Columns) -> Any:
    """Return for each item true, false or null, (N,), in Kleene's logic."""
    kind = type(node)
    if kind is exp.Paren:
        return _chosen(node.this, columns)
    if kind is exp.Not:
        return pc.invert(_chosen(node.this, columns))
    if kind in _JOINED:
        return _JOINED[kind](_chosen(node.left, columns), _chosen(node.right, columns))
    if kind in _COMPARED:
        return _compared(_COMPARED[kind], node.left, node.right, columns)
    if kind is exp.In and node.expressions and set(filter(node.args.get, node.args)) == {"this", "expressions"}:
        return reduce(pc.or_kleene, (_compared(pc.equal, node.this, value, columns) for value in node.expressions))
    if kind is exp.Is and isinstance(node.expression, exp.Null):
        return pc.is_null(_column(node.this, columns))
    raise _refused(node)


def _compared(compare: Callable[[Any, Any], Any], left: Node, right: Node, columns: Columns) -> Any:
    """Return the comparison of two columns, or of a column and a value."""
    sides = [_column(side, columns) if isinstance(side, exp.Column) else None for side in (left, right)]
    (name, column), (other, beside) = sorted(zip((left, right), sides, strict=True), key=lambda pair: pair[1] is None)
    if column is None:
        raise UserError(f"where: {_text(left)} is compared with {_text(right)}", "compare a column with a value")
    if beside is None:
        value = _value(name, column, other)
        return compare(*(value if part is None else part for part in sides))
    if KINDS[beside.type] != KINDS[column.type]:
        raise _unlike(name, column, other)
    return compare(*sides)


def _column(node: Node, columns: Columns) -> pa.Array:
    if not isinstance(node, exp.Column) or set(filter(node.args.get, node.args)) != {"this"}:
        raise _refused(node)
    if node.name in columns:
        return columns[node.name]
    remedy = "name one that it has" if columns else "add it: rarec items update BUNDLE TABLE COLUMN"
    if node.this.args.get("quoted"):
        remedy = f"write text in single quotes: '{node.name}'; double quotes are for names of columns"
    problem = f"where: the catalogue has no column {node.name!r}"
    raise UserError(problem + nearest(node.name, columns), remedy)


def _value(name: Node, column: pa.Array, node: Node) -> pa.Scalar:
    """Return a value that a column is compared with."""
    try:
        value = node.to_py()
    except (ValueError, TypeError):
        raise _refused(node) from None
    if value is None:
        raise UserError(f"where: {_text(name)} is compared with null", f"write {_text(name)} is null")
    try:
        if type(value) in _VALUES[KINDS[column.type]]:
            scalar = pa.scalar(float(value) if isinstance(value, Decimal) else value)
            return scalar.cast(column.type) if isinstance(value, str) else scalar
    except (OverflowError, pa.ArrowException):
        pass
    raise _unlike(name, column, node)


def _unlike(name: Node, column: pa.Array, other: Node) -> UserError:
    examples = {"true or false": "true", "a number": "10", "text": "'lamps'", "a time": "'2024-12-31'"}
    kind = KINDS[column.type]
    problem = f"where: {_text(name)} holds {kind}, and {_text(other)} is none"
    return UserError(problem, f"compare it with {kind}, such as {examples[kind]}")


def _refused(node: Node) -> UserError:
    return UserError(f"where: {_text(node)} is no part of a condition", _FORMS)


def _text(node: Node) -> str:
    return str(node.sql(dialect="duckdb"))[:50]
