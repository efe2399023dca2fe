"""Rooms (folders of the package) import only from rooms before them, and light modules do not load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rarec

ROOT = Path(rarec.__file__).parent
ROOMS = "config data ranking neighbours ids prompts models training planning evaluation serving stages sweep".split()
UNRELATED = {("evaluation", "training"), ("serving", "training")}
"""Pairs of rooms that are ordered in the list, and yet independent."""


def imports(path: Path) -> set[str]:
    """Return the rooms of this package that a module imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("rarec.") and name.split(".")[1] in ROOMS}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_before_it(room):
    for module in (ROOT / room).rglob("*.py"):
        later = {other for other in imports(module) if ROOMS.index(other) > ROOMS.index(room)}
        assert not later, f"{module} imports from {later}"
        assert not {other for other in imports(module) if (room, other) in UNRELATED}, module


def test_every_room_is_known():
    folders = {module.parent.name for module in ROOT.glob("*/*.py")}
    assert folders == set(ROOMS)


@pytest.mark.parametrize(
    "module", ["rarec.cli", "rarec.config", "rarec.doctor", "rarec.prompts", "rarec.stages", "rarec.sweep"]
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
