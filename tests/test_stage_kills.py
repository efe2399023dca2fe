"""The runner of stages under kill -9 before each change to the disk, and on several ranks."""

import os
import shutil
import signal
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch.distributed as dist

from rarec.config import RunConfig
from rarec.console.last_resort import guarded
from rarec.distributed.watchdog import watched
from rarec.distributed.world import World
from rarec.errors import EXIT_CODE, UserError
from rarec.stages.run import Run
from rarec.stages.stage import Built
from rarec.storage.artefacts import BEGUN, MANIFEST, PROGRESS
from rarec.storage.directories import CHECKED, MARKER
from tests.processes import be_killed_at_change
from tests.ranks import START, free_port
from tests.test_stage import TREE, Slow, Toy

RANKS = 2


def stage_in(root: Path, kind: type[Toy], value: int, seed: int = 0) -> Toy:
    tree = {**TREE, "run": {"dir": str(root), "device": "cpu", "seed": seed}}
    stage = kind(Run(RunConfig.model_validate(tree), say=lambda line: None))
    stage.value = value
    return stage


def make_until(root: Path, kind: type[Toy], value: int, fresh: bool, change: int) -> None:
    """Build a stage in this process, which is killed before its nth change to files below `root`."""
    be_killed_at_change(change, root)
    stage_in(root, kind, value).make(fresh)


def code_of(*arguments: object) -> int | None:
    process = START.Process(target=make_until, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def files(root: Path) -> set[str]:
    """Return all files but locks and notes of what was checked, which stay by design."""
    there = (p for p in root.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != CHECKED)
    return {p.relative_to(root).as_posix() for p in there}


def assert_whole(stage: Toy, value: int) -> None:
    stage.require(outside=True)
    stage.checked()
    assert (stage.directory / "value").read_text() == str(value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Toy, Slow])
def test_killed_before_any_change_to_the_disk_the_same_command_builds_the_same(tmp_path, kind):
    for change in count(1):
        root = tmp_path / f"{change}"
        code = code_of(root, kind, 1, False, change)
        assert code in (0, -signal.SIGKILL)
        stage = stage_in(root, kind, 1)
        stage.make()
        assert_whole(stage, 1)
        assert files(root) == {"resolved.yaml", *(f"{kind.name}/{name}" for name in ("value", MANIFEST, MARKER))}
        if code == 0:
            break
    assert change > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Toy, Slow])
def test_killed_before_any_change_of_a_fresh_build_the_old_stays_usable_and_the_same_command_builds_the_new(
    tmp_path, kind
):
    before = tmp_path / "before"
    stage_in(before, kind, 1).make()
    for change in count(1):
        root = tmp_path / f"{change}"
        shutil.copytree(before, root)
        code = code_of(root, kind, 2, True, change)
        assert code in (0, -signal.SIGKILL)
        shutil.copytree(root, tmp_path / f"{change}-old")
        old, new = (stage_in(tmp_path / f"{change}-old", kind, value) for value in (1, 2))
        if not new.is_done():
            assert not old.make(), "nothing of it was lost"
            assert_whole(old, 1)
        stage = stage_in(root, kind, 2)
        stage.make(fresh=True)
        assert_whole(stage, 2)
        assert files(root) == files(before)
        if code == 0:
            break
    assert change > 10


def fail(directory: Path) -> None:
    raise RuntimeError("half-way")


def test_a_fresh_build_where_nothing_was_is_resumed_by_the_same_command(tmp_path):
    stage = stage_in(tmp_path / "run", Slow, 1)
    stage.during = fail
    for steps in (1, 2):
        with pytest.raises(RuntimeError):
            stage.make(fresh=True)
        assert len(list((stage.run.root / ".slow.fresh" / PROGRESS).iterdir())) == steps
    stage.during = None
    stage.make(fresh=True)
    assert_whole(stage, 1)
    assert files(stage.run.root) == {"resolved.yaml", *(f"slow/{name}" for name in ("value", MANIFEST, MARKER))}


def test_what_was_begun_and_holds_nothing_yet_belongs_to_no_settings(tmp_path):
    root = tmp_path / "run"
    killed = stage_in(root, Slow, 1)
    killed.during = fail
    with pytest.raises(RuntimeError):
        killed.make()
    for path in (killed.directory / PROGRESS, killed.directory / "value"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage = stage_in(root, Slow, 2)
    stage.make()
    assert_whole(stage, 2)


@pytest.mark.parametrize("content", ["[]", "{", '{"kind": "slow", "schema": 1, "settings": {}, "made_from": {}}'])
def test_a_note_that_is_damaged_or_of_another_version_is_refused_by_name(tmp_path, content):
    stage = stage_in(tmp_path / "run", Slow, 1)
    stage.during = fail
    with pytest.raises(RuntimeError):
        stage.make()
    (stage.directory / BEGUN).write_text(content)
    with pytest.raises(UserError, match=r"slow/\.begun\.json") as error:
        stage.make()
    assert "rarec slow CONFIG --fresh" in error.value.remedy
    with pytest.raises(RuntimeError):
        stage.make(fresh=True)
    (tmp_path / "run" / ".slow.fresh" / BEGUN).write_text(content)
    stage.during = None
    stage.make(fresh=True)  # that of an abandoned --fresh stands in nobody's way
    assert_whole(stage, 1)


@pytest.mark.parametrize("begun", [True, False])
def test_what_is_refused_leaves_the_configuration_of_what_is_there(tmp_path, begun):
    stage = stage_in(tmp_path / "run", Slow, 1)
    stage.during = fail if begun else None
    with suppress(RuntimeError):
        stage.make()
    written = stage.run.config_file.read_text()
    other = stage_in(tmp_path / "run", Slow, 2, seed=1)
    with pytest.raises(UserError, match=r"section\.value: 1 -> 2"):
        other.make()
    assert stage.run.config_file.read_text() == written


class SlowlyBuilt(Slow):
    """Begun by every rank, rank 1 a moment after rank 0."""

    def build(self, directory):
        world = self.run.world
        time.sleep(0.2 * world.rank)
        assert directory.is_dir()
        world.run_on_main(lambda: super(SlowlyBuilt, self).build(directory))
        return Built()


class Shared(Toy):
    """Written by rank 0."""

    def build(self, directory):
        self.run.world.run_on_main(lambda: super(Shared, self).build(directory))
        return Built()


class FailsOnOne(SlowlyBuilt):
    """Fails on rank 1 alone."""

    def build(self, directory):
        super().build(directory)
        if self.run.world.rank == 1:
            raise UserError("the sample is damaged", "repair it")
        self.run.world.barrier()


def make_on_rank(
    rank: int, port: str, stderr: Path, root: Path, kind: type[Toy], value: int, fresh: bool, delay: float
) -> None:
    """Build a stage on one of several ranks; replacing a directory takes rank 0 `delay` seconds more."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo")
    stage = stage_in(root, kind, value)
    stage.run.__dict__["world"] = World(rank, RANKS)
    rename = Path.rename

    def slow_rename(path: Path, target: Path) -> Path:
        time.sleep(delay)
        return rename(path, target)

    Path.rename = slow_rename  # type: ignore[method-assign,assignment]

    def make() -> None:
        with watched(stage.run.world):
            stage.make(fresh)
            stage.require()  # as the next stage does, on every rank

    guarded(make)


def make_on_ranks(tmp_path: Path, *arguments: object, delay: float = 0.0) -> tuple[list[int | None], list[str]]:
    """Return the exit codes of all ranks, and what each printed."""
    port, stderr = str(free_port()), [tmp_path / f"stderr-{rank}" for rank in range(RANKS)]
    processes = [
        START.Process(target=make_on_rank, args=(rank, port, stderr[rank], *arguments, delay)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes], [path.read_text() for path in stderr]


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", [Shared, SlowlyBuilt])
def test_ranks_build_in_one_place_and_go_on_when_the_artefact_is_in_its_own(tmp_path, kind):
    root = tmp_path / "run"
    for value, fresh in ((1, True), (2, True), (2, False)):
        codes, stderr = make_on_ranks(tmp_path, root, kind, value, fresh, delay=0.3)
        assert codes == [0] * RANKS, stderr
        assert_whole(stage_in(root, kind, value), value)
    assert files(root) == {"resolved.yaml", *(f"{kind.name}/{name}" for name in ("value", MANIFEST, MARKER))}


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", [Shared, SlowlyBuilt])
@pytest.mark.parametrize("state", ["finished", "begun", "not rarec's"])
def test_ranks_refuse_alike(tmp_path, kind, state):
    root = tmp_path / "run"
    stage = stage_in(root, kind, 1)
    if state == "not rarec's" or (state == "begun" and not kind.resumable):
        stage.directory.mkdir(parents=True)
        (stage.directory / "notes").write_text("mine")
        named = str(stage.directory)
    else:
        stage.during = fail if state == "begun" else None
        with suppress(RuntimeError):
            stage.make()
        named = "section.value: 1 -> 2"
    before = files(root)
    codes, stderr = make_on_ranks(tmp_path, root, kind, 2, False)
    assert codes == [EXIT_CODE] * RANKS
    assert [text.count("error:") for text in stderr] == [1, 0]
    assert named in stderr[0].replace("\n", "")
    assert files(root) == before


@pytest.mark.multiprocess
def test_an_error_of_one_rank_leaves_what_was_begun_and_the_old(tmp_path):
    root = tmp_path / "run"
    stage_in(root, Slow, 1).make()
    codes, stderr = make_on_ranks(tmp_path, root, FailsOnOne, 2, True)
    assert codes == [EXIT_CODE] * RANKS
    assert "rank 1" in stderr[0]
    assert_whole(stage_in(root, Slow, 1), 1)
    assert stage_in(root, Slow, 2).make(fresh=True)
    assert_whole(stage_in(root, Slow, 2), 2)
    assert not (root / ".slow.fresh").exists()
