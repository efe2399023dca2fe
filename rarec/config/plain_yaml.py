"""YAML as a configuration needs it: plain values, each key once, and bounds on what a text may ask for.

PyYAML's safe loader builds plain values only, but a hundred characters of aliases can stand for a billion values, and
brackets can be nested until Python's stack ends. Every bound here is far above what a person writes.
"""

import re
import unicodedata
from collections.abc import Hashable
from typing import Any

import yaml

from rarec.errors import UserError

MAX_BYTES = 100_000
"""Largest file. PyYAML reads it in under two seconds."""
MAX_OVERRIDE = 20_000
"""Largest override `section.field=value`, in characters."""
MAX_DEPTH = 40
"""Deepest nesting of lists and sections."""
MAX_SIZE = 500_000
"""Largest size of all values, in characters; an alias counts as what it stands for."""
SHOWN = 200
"""Characters of a library's message that are shown."""


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: 1e-3 is a number, and a key given twice is an error; merged ones (`<<`) give way."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} levels of lists and sections", self.get_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and _UNEXPECTED.search(node.value):
            what = "a number to the base of 60, or of 8: write it as people do, or in quotes"
            raise _error(f"{_cut(node.value)} is, in YAML, {what}", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:  # such as 2020-99-99, !!int x
            raise _error(f"not a valid {node.tag.rpartition(':')[2]}: {error}", node.start_mark) from None
        foreign = unprintable(value) if isinstance(value, str) else ""
        if foreign:
            raise _error(f"a text holds the control character {foreign}", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _error("the name of a field is a list or a section", key_node.start_mark)
            if key in seen:
                raise _error(f"field {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for something else."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_UNEXPECTED = re.compile(r":|^[-+]?0[0-7_]+$")
"""Numbers that YAML 1.1 reads otherwise than people do: 1:30 is 90, and 010 is 8."""
_EXPONENT = "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
_Loader.add_implicit_resolver(*_EXPONENT)
Dumper.add_implicit_resolver(*_EXPONENT)


def parse(text: str, where: str, remedy: str = "") -> Any:
    """Return the value that a YAML text stands for.

    Args:
        text: the YAML.
        where: for messages.
        remedy: for messages.

    Raises:
        UserError: it is not YAML of plain values, or it exceeds a bound; the message names line and column.
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: it builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place} is not valid YAML: {_cut(error.problem or error)}", remedy) from None
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_cut(error)}", remedy) from None


def unprintable(text: str) -> str:
    """Return the first control character or half of a surrogate pair in a text, escaped; line breaks and tabs may be.

    They are no part of any honest name, path or prompt, and they steer a terminal.
    """
    foreign = (char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r")
    return repr(next(foreign, ""))[1:-1]


def _size(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Return the size of what a node stands for, and refuse too much, or a value that is inside itself."""
    if node in known:
        if not known[node]:
            raise _error("a value that contains itself", node.start_mark)
        return known[node]
    known[node] = 0
    if isinstance(node, yaml.ScalarNode):
        size = len(node.value)
    else:
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        size = sum(_size(part, known) for part in parts)
    known[node] = size = size + 1
    if size > MAX_SIZE:
        raise _error(f"its aliases stand for more than {MAX_SIZE:,} characters", node.start_mark)
    return size


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)


def _cut(message: object) -> str:
    return " ".join(str(message).split())[:SHOWN]
