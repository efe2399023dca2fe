"""Rooms (folders of the package) import only from rooms before them, without circles; light modules load no torch."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from tools.make_architecture import PAGE, ROOMS, imports, room_of, with_table

GRAPH = imports()


def test_every_folder_is_a_room_and_the_root_is_small():
    folders = {module.split(".")[0] for module in GRAPH if "." in module}
    assert folders == set(ROOMS)
    assert len([module for module in GRAPH if "." not in module and module not in ROOMS]) <= 8


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_a_module_imports_only_from_rooms_before_its_own(module):
    room = room_of(module)
    upward = {other for other in GRAPH[module] if room_of(other) > room}
    assert not upward, f"{module} imports from {upward}"


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_page_has_the_table_of_rooms_and_their_imports():
    assert PAGE.read_text() == with_table(PAGE.read_text()), "run: python -m tools.make_architecture"


@pytest.mark.parametrize(
    "module", ["rarec.cli", "rarec.config", "rarec.planning.doctor", "rarec.prompts", "rarec.stages", "rarec.cluster"]
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
