"""YAML as a configuration needs it: plain values, each key once, and bounds on the size of what a text stands for.

PyYAML's safe loader builds plain values only, but a hundred characters of aliases can stand for a billion values, and
brackets can be nested until Python's stack ends. Every bound here is far above what a person writes.
"""

import re
import unicodedata
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
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_INTEGER = re.compile("^[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?)$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
)
"""Numbers as people write them. YAML 1.1 reads 1:30 as 90 and 010 as 8, and 1e-3 as a text."""
_FIRST = list("-+.0123456789")


class Loader(yaml.SafeLoader):
    """YAML as people expect it: a key given twice is an error; merged ones (`<<`) give way."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and refuse what is too deep, too large or inside itself."""
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(f"more than {MAX_DEPTH} levels of lists and sections", self.get_mark())
        node = super().compose_node(parent, index)
        assert isinstance(node, yaml.Node)
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise _error("a value that contains itself", node.start_mark)
        self._sizes[node] = self._size(node)
        if self._sizes[node] > MAX_SIZE:
            raise _error(f"its aliases stand for more than {MAX_SIZE:,} characters", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value, and refuse control characters in a text."""
        value = super().construct_object(node, deep)
        control = unprintable(value) if isinstance(value, str) else ""
        if control:
            raise _error(f"a text holds the control character {control}", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a section, and refuse a field that is given twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _error(f"field {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def _size(self, node: yaml.Node) -> int:
        """Return the size of what a node stands for; the sizes of the nodes inside it are known."""
        if isinstance(node, yaml.ScalarNode):
            return len(node.value) + 1
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        return sum(self._sizes[part] for part in parts) + 1


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
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        problem = error  # the last ones of a value that its tag does not allow, such as `2020-99-99` or `!!int x`
    raise UserError(f"{where}{place} is not valid YAML: {' '.join(str(problem).split())[:SHOWN]}", remedy)


def unprintable(text: str) -> str:
    """Return the first control character or half of a surrogate pair in a text, escaped; line breaks and tabs may be.

    They are no part of any honest name, path or prompt, and they steer a terminal.
    """
    controls = (char for char in text if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n\r")
    return repr(next(controls, ""))[1:-1]


def _error(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(None, None, problem, mark)
