"""YAML as a configuration needs it: plain values, each key once, and bounds on the size of what a text stands for.

PyYAML's safe loader builds plain values only, but a hundred characters of aliases can stand for a billion values. Every
bound here is far above what a person writes.
"""

import math
import re
from typing import Any

import yaml

from rarec.errors import UserError

MAX_BYTES = 100_000
"""Largest file. PyYAML reads it in under two seconds."""
MAX_SIZE = 500_000
"""Largest size of all values, in characters; an alias counts as what it stands for."""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_INTEGER = re.compile("^[-+]?(0|[1-9][0-9_]{0,99}|0b[01_]{1,99}|0x[0-9a-fA-F_]{1,99})$")
_FLOAT = re.compile(
    r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?)$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
"""Numbers as people write them. YAML 1.1 reads 1:30 as 90 and 010 as 8, and 1e-3 as a text."""
_FIRST = list("-+.0123456789")
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but for line breaks and tabs, and halves of surrogate pairs: they steer a terminal."""


class Loader(yaml.SafeLoader):
    """YAML as people expect it: a key given twice is an error; merged ones (`<<`) give way."""

    def get_single_node(self) -> yaml.Node | None:
        """Read the text as nodes, and refuse what stands for too much or for itself."""
        root = super().get_single_node()
        if root is not None:
            _check_size(root, {})
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value, and refuse control characters in a text."""
        value = super().construct_object(node, deep)
        control = _CONTROL.search(value) if isinstance(value, str) else None
        if control:
            raise _error(f"a text holds the control character {control[0]!r}", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a section, and refuse a field that is given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _error(f"field {key!r} is given twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for something else."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in zip(_NUMBERS, (_INTEGER, _FLOAT), strict=True):
    Loader.add_implicit_resolver(_tag, _pattern, _FIRST)
Dumper.add_implicit_resolver(_NUMBERS[1], _FLOAT, _FIRST)


def parse(text: str, where: str, remedy: str = "") -> Any:
    """Return the value that a YAML text stands for.

    Args:
        text: the YAML.
        where: for messages.
        remedy: for messages.

    Raises:
        UserError: it is not YAML of plain values, or it exceeds a bound; the message names line and column.
    """
    place = ""
    try:
        return yaml.load(text, Loader)  # a SafeLoader: it builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem: object = error.problem or error
    except RecursionError:
        problem = "lists and sections are nested too deeply"
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        problem = error  # the last ones of a value that its tag does not allow, such as `2020-99-99` or `!!int x`
    raise UserError(f"{where}{place} is not valid YAML: {problem}", remedy)


def _check_size(node: yaml.Node, sizes: dict[yaml.Node, float]) -> float:
    """Return the size of what a node stands for, if it is not above the largest one.

    Args:
        node: of the text.
        sizes: of the nodes that were met; infinite for those around this one, which may not be inside it again.
    """
    if node not in sizes:
        sizes[node] = math.inf
        entries = [node.value] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [part for entry in entries for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[node] = 1 + sum(len(part) if isinstance(part, str) else _check_size(part, sizes) for part in parts)
    if sizes[node] > MAX_SIZE:
        raise _error(f"a value contains itself, or its aliases stand for more than {MAX_SIZE:,} characters", node)
    return sizes[node]


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, node.start_mark)
