"""The watchdog in real processes that are killed, suspended, fail or hang."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from rarec.console.last_resort import CRASHED, guarded
from rarec.distributed.watchdog import watched
from rarec.distributed.world import SINGLE, World
from rarec.errors import EXIT_CODE, Stopped, UserError
from tests.ranks import START, free_port

pytestmark = pytest.mark.alone

RANKS = 3
AT = 2  # the step in which it happens
KILLED = -signal.SIGKILL


@contextmanager
def job(
    trouble: Callable[[World], None], said: Path, *, dead: float = 2.0, stall: float = 60.0
) -> Iterator[list[BaseProcess]]:
    """Start ranks that run into trouble; `said` gets what they print, a line each, with the rank that printed it."""
    said.touch()
    limits = {"dead": dead, "stall": stall}
    arguments = (str(free_port()), said, trouble, limits)
    processes = [START.Process(target=run, args=(rank, *arguments)) for rank in range(RANKS)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(rank: int, port: str, said: Path, trouble: Callable[[World], None], limits: dict[str, float]) -> None:
    os.dup2(os.open(said.with_name(f"stderr-{rank}"), os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    def say(line: str) -> None:
        with said.open("a") as file:
            file.write(f"{rank}: {line}\n")

    guarded(lambda: steps(trouble, World(rank, RANKS), say, limits))


def steps(trouble: Callable[[World], None], world: World, say: Callable[[str], None], limits: dict[str, float]) -> None:
    with watched(world, say, **limits):
        for step in range(1, AT + 1):
            world.report(f"reading samples {step}0, ...", step)
            if step == AT:
                trouble(world)
            world.report("forward and backward")
            world.all_reduce_sum(torch.ones(1))


def codes(processes: list[BaseProcess], within: float = 15) -> list[int | None]:
    end = time.monotonic() + within
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    return [process.exitcode for process in processes]


def awaited(said: Path, within: float = 15) -> str:
    """Return what is printed, once something is."""
    end = time.monotonic() + within
    while not said.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    return said.read_text()


def killed_1(world: World) -> None:
    time.sleep(0.5)  # until every rank has sent a heartbeat
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_1_unnoticed(world: World) -> None:
    """As on GPUs, where the others do not notice that a rank is gone."""
    killed_1(world)
    time.sleep(60)


def killed_0(world: World) -> None:
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def frozen_0(world: World) -> None:
    """As if its machine were gone: connections stay open, and nobody answers."""
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def refused_2(world: World) -> None:
    if world.rank == 2:
        raise UserError("shard 7 is missing", "make it again")


def refused_0(world: World) -> None:
    if world.rank == 0:
        raise UserError("shard 7 is missing", "make it again")


def broken_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("three is not five")


def asleep_1(world: World) -> None:
    if world.rank == 1:
        time.sleep(60)


def asleep_while_all_are_there(world: World) -> None:
    world.run_on_main(lambda: time.sleep(60))


def refused_together(world: World) -> None:
    raise UserError("run.num_processes is 2", shared=True)


def stopped_together(world: World) -> None:
    raise Stopped("at step 2")


def forking(world: World) -> None:
    """Read with worker processes, without trouble; the ranks end one after the other."""
    for _ in range(3):
        assert len(list(DataLoader(range(8), num_workers=2, multiprocessing_context="fork"))) == 8
    world.barrier()
    time.sleep(world.rank)


def gloo_broke_1(world: World) -> None:
    """No rank has died: the failure is not the consequence of another."""
    if world.rank == 1:
        raise RuntimeError("gloo: a cable is torn")
    time.sleep(60)


@pytest.mark.parametrize("trouble", [killed_1, killed_1_unnoticed])
def test_a_killed_rank_ends_all_and_is_named(trouble: Callable[[World], None], tmp_path: Path) -> None:
    with job(trouble, tmp_path / "said") as processes:
        assert codes(processes) == [EXIT_CODE, KILLED, EXIT_CODE]
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith("0: no sign of life for 2 s from rank 1 on ")
    assert line.endswith("(last at step 2: reading samples 20, ...)")


@pytest.mark.parametrize(("trouble", "code"), [(killed_0, KILLED), (frozen_0, None)])
def test_where_the_first_rank_is_gone_all_others_say_so(
    trouble: Callable[[World], None], code: int | None, tmp_path: Path
) -> None:
    with job(trouble, tmp_path / "said") as processes:
        assert codes(processes[1:]) == [EXIT_CODE, EXIT_CODE]
        assert processes[0].exitcode == code
    lines = sorted((tmp_path / "said").read_text().splitlines())
    assert [line.partition(" on ")[0] for line in lines] == [f"{r}: no answer any more from rank 0" for r in (1, 2)]


@pytest.mark.parametrize(("trouble", "failed"), [(refused_2, 2), (refused_0, 0)])
def test_an_error_of_one_rank_ends_all_and_is_printed_by_another(
    trouble: Callable[[World], None], failed: int, tmp_path: Path
) -> None:
    with job(trouble, tmp_path / "said") as processes:
        assert codes(processes) == [EXIT_CODE] * RANKS
    speaker, said = (tmp_path / "said").read_text().split(": ", 1)
    assert int(speaker) != failed
    assert said == f"rank {failed} stopped at step 2: shard 7 is missing\n  -> make it again\n"
    assert "error: " in (tmp_path / f"stderr-{failed}").read_text()


@pytest.mark.parametrize(
    ("trouble", "text"),
    [(broken_1, "ValueError: three is not five"), (gloo_broke_1, "RuntimeError: gloo: a cable is torn")],
)
def test_a_defect_on_one_rank_ends_all(trouble: Callable[[World], None], text: str, tmp_path: Path) -> None:
    with job(trouble, tmp_path / "said", dead=1.5) as processes:
        assert codes(processes) == [EXIT_CODE, CRASHED, EXIT_CODE]
    assert (tmp_path / "said").read_text() == f"0: rank 1 stopped at step 2: {text}\n"
    (line,) = (line for line in (tmp_path / "stderr-1").read_text().splitlines() if line.startswith("error: "))
    assert line.startswith("error: rank 1: ")
    assert text in line
    report = Path(line.partition("traceback is in ")[2].partition(")")[0])
    assert f"in {trouble.__name__}" in report.read_text()
    report.unlink()


def test_a_job_that_was_suspended_goes_on(tmp_path: Path) -> None:
    with job(forking, tmp_path / "said", dead=1.5) as processes:
        time.sleep(1)
        for number, pause in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0)):
            for process in processes:
                os.kill(process.pid or 0, number)
            time.sleep(pause)
        assert codes(processes) == [0] * RANKS
    assert (tmp_path / "said").read_text() == ""


@pytest.mark.parametrize(("trouble", "rank"), [(asleep_1, 1), (asleep_while_all_are_there, 0)])
def test_a_rank_that_hangs_is_named_once_and_no_other(
    trouble: Callable[[World], None], rank: int, tmp_path: Path
) -> None:
    with job(trouble, tmp_path / "said", stall=1.0) as processes:
        assert awaited(tmp_path / "said")
        time.sleep(0.6)
        assert [process.exitcode for process in processes] == [None] * RANKS
        (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith(f"0: no progress for 1 s: the others wait for rank {rank} on ")
    assert line.endswith("(last at step 2: reading samples 20, ...)")
    assert line.count("rank ") == 1


@pytest.mark.parametrize(("trouble", "code"), [(forking, 0), (refused_together, EXIT_CODE), (stopped_together, 0)])
def test_ranks_that_end_together_have_nothing_to_say(
    trouble: Callable[[World], None], code: int, tmp_path: Path
) -> None:
    with job(trouble, tmp_path / "said", dead=1.5) as processes:
        assert codes(processes) == [code] * RANKS
    assert (tmp_path / "said").read_text() == ""


def test_one_rank_alone_is_not_watched() -> None:
    before = threading.enumerate()
    with watched(SINGLE, print, dead=0.1, stall=0.1):
        SINGLE.report("reading", 1)
        assert threading.enumerate() == before
