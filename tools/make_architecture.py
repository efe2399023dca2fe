#!/usr/bin/env python
"""Write the table of rooms into docs/architecture.md: what each holds, and from which rooms it imports.

python -m tools.make_architecture
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, PAGE = ROOT / "rarec", ROOT / "docs" / "architecture.md"
ROOMS = [
    *("config", "storage", "console", "distributed"),
    *("data", "neighbours", "ranking", "ids", "prompts", "models", "vectors", "training"),
    *("planning", "evaluation", "report", "bundle", "export", "stages", "serve", "cluster"),
]
"""The folders of the package, in the order in which data flows through them."""
GROUND = ("errors", "version")
"""Modules of the root that any module may import; the others of the root may import any."""
_TABLE = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)


def imports() -> dict[str, set[str]]:
    """Return the modules of the package that each one imports, wherever in the file it does.

    A name `a.b` stands for `rarec.a.b`, the empty one for the package itself. What is imported for types alone counts
    only where it leads to another room.
    """
    paths = {_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: _imported(name, path, paths) for name, path in paths.items()}


def room_of(module: str) -> int:
    """Return the place of a module's room in `ROOMS`: -1 for the ground, above all for other modules of the root."""
    room = module.split(".")[0]
    return -1 if module in GROUND else ROOMS.index(room) if room in ROOMS else len(ROOMS)


def with_table(page: str) -> str:
    """Return the page with a table that is up to date."""
    graph = imports()
    lines = ["| room | what it holds | imports from |", "| --- | --- | --- |"]
    for room in ROOMS:
        others = {other.split(".")[0] for name in graph if name.split(".")[0] == room for other in graph[name]}
        names = ", ".join(f"`{other}`" for other in ROOMS if other in others - {room})
        about = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        first = " ".join(about.partition("\n\n")[0].split())
        lines.append(f"| `{room}/` | {first} | {names or '–'} |")
    return _TABLE.sub(lambda _: "\n".join(lines) + "\n", page)


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, paths: dict[str, Path]) -> set[str]:
    tree = ast.parse(path.read_text())
    only_types = {inner for node in ast.walk(tree) if _is_type_checking(node) for inner in ast.walk(node)}
    imported: set[str] = set()
    for node in ast.walk(tree):
        modules = {_short(module, paths) for module in _modules(node) if module.split(".")[0] == "rarec"}
        same_room = {module for module in modules if module.split(".")[0] == name.split(".")[0]}
        imported |= modules - same_room if node in only_types else modules
    return imported - {name}


def _modules(node: ast.AST) -> list[str]:
    """Return the modules that a statement may import, as it names them."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module" and node.args:
        return [str(node.args[0].value)] if isinstance(node.args[0], ast.Constant) else []
    return []


def _short(module: str, paths: dict[str, Path]) -> str:
    """Return the module that is imported: of `rarec.a.b.name`, that is `a.b` or `a.b.name`."""
    short = module.removeprefix("rarec").lstrip(".")
    return short if short in paths else short.rpartition(".")[0]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
