"""The house as docs/architecture.md has it: rooms and their imports, and the files that a step and a top-k pass."""

import re
import subprocess
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

import rarec
from rarec.entry import open_run
from rarec.training.loop import Trainer
from tests.ranks import copied
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
    "module",
    "cli config planning.doctor prompts stages cluster bundle.rules bundle.base_recommender".split(),
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys, rarec.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def traced(action: Callable[[], object]) -> set[str]:
    """Run an action; return the files of the package that run in it."""
    root, files = Path(rarec.__file__).parent, set[Path]()
    sys.setprofile(lambda frame, event, _: files.add(Path(frame.f_code.co_filename)) if event == "call" else None)
    try:
        action()
    finally:
        sys.setprofile(None)
    return {str(file.relative_to(root)) for file in files if file.is_relative_to(root)}


def listed(title: str) -> set[str]:
    """Return the files that a section of the page names; a name without a room is of the room before it."""
    section = PAGE.read_text().split(f"## {title}")[1].split("\n## ")[0]
    files, room = set(), ""
    for name in re.findall(r"`([a-z_/]+\.py)`", section):
        room = name.rpartition("/")[0] or room
        files.add(f"{room}/{name.rpartition('/')[2]}")
    return files | {"distributed/world.py", "data/tables.py"}


def test_a_history_passes_the_files_of_the_page_to_its_top_k(recommender):
    history = list(recommender.items)[:3]
    recommender.recommend([history])  # the first list loads the model
    files = traced(lambda: recommender.recommend([history], k=5))
    own = {"models/slots.py", "prompts/hybrid.py"}  # the page has them in a training step
    assert {"bundle/recommender.py", "ranking/rank.py"} <= files
    assert files - listed("From a log") <= own
    assert len(files) <= 17


def test_a_step_passes_the_files_of_the_page(decoder, tmp_path, monkeypatch):
    step, files = Trainer._step, set()

    def traced_step(*args: Any) -> Any:
        results = []
        files.update(traced(lambda: results.append(step(*args))))
        return results[0]

    monkeypatch.setattr(Trainer, "_step", traced_step)
    open_run(decoder, [copied(decoder, tmp_path / "run"), "train.stream.workers=0", "train.max_steps=2"]).run(["train"])
    assert {"training/loop.py", "models/losses.py"} <= files
    assert files - listed("A training step") == set()
    assert len(files) <= 17
