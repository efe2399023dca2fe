"""ID models on several ranks: as one process trains them, after a kill and on another number of ranks as well."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rarec.entry import open_run
from rarec.errors import EXIT_CODE
from rarec.storage.artefacts import PROGRESS
from rarec.storage.files import read_json
from tests.ranks import Job, copied, finish, start

pytestmark = pytest.mark.multiprocess

SMALL = {
    "sasrec": ["ids.sasrec.dropout=0.3", "ids.sasrec.epochs=5", "ids.sasrec.negatives=7"],
    "gru4rec": ["ids.gru4rec={dim: 16, dropout: 0.3, epochs: 5, negatives: 7, batch_size: 32}"],
    "comirec": ["ids.comirec={dim: 16, dropout: 0.3, epochs: 5, negatives: 7, batch_size: 32}"],
}


def prepared(config: Path, to: Path, kind: str = "sasrec") -> list[str]:
    """Copy what is prepared; return the overrides of a training there."""
    place = copied(config, to)
    for later in ("ids", "shards", "train", "evaluate", "bundle", "report"):
        shutil.rmtree(to / later, ignore_errors=True)
    return [place, "run.device=cpu", f"ids.model={kind}", *SMALL[kind]]


def curve(run: Path) -> list[float]:
    return [epoch["loss"] for epoch in read_json(run / "ids" / "id" / "manifest.json")["curve"]]


def vectors(run: Path) -> np.ndarray:
    return np.load(run / "ids" / "id" / "items.npy")


@pytest.fixture(scope="module")
def alone(finished, tmp_path_factory):
    """For each kind of model, a run whose ID model one process has trained."""
    runs = {}
    for kind in SMALL:
        run = tmp_path_factory.mktemp("alone") / "run"
        open_run(finished, prepared(finished, run, kind)).make("ids")
        runs[kind] = run
    return runs


@pytest.mark.parametrize(("kind", "ranks"), [("sasrec", 2), ("sasrec", 3), ("gru4rec", 2), ("comirec", 2)])
def test_ranks_train_as_one_process_does(finished, alone, tmp_path, kind, ranks):
    """The same losses, with dropout too, and the same ranking after each epoch."""
    run = tmp_path / "run"
    finish("ids", finished, prepared(finished, run, kind), ranks=ranks, scratch=tmp_path)
    assert curve(run) == pytest.approx(curve(alone[kind]), rel=1e-4)
    np.testing.assert_allclose(vectors(run), vectors(alone[kind]), atol=2e-3)
    one, other = (read_json(root / "ids/id/manifest.json")["validation"] for root in (run, alone[kind]))
    assert one == pytest.approx(other, abs=0.01)
    assert (run / "ids/id/model.safetensors").exists()
    assert not (run / "ids/id" / PROGRESS).exists()


def wait_for_epoch(run: Path, epoch: int, job: Job) -> None:
    """Wait for a checkpoint, or the end of the job."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(process.is_alive() for process in job.processes):
        if (run / "ids/id" / PROGRESS / f"step-{epoch:08d}").exists():
            return
        time.sleep(0.002)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_costs_an_epoch_and_no_bit(finished, tmp_path, rank):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish("ids", finished, prepared(finished, whole), scratch=tmp_path)
    arguments = "ids", finished, prepared(finished, killed)
    job = start(*arguments, scratch=tmp_path)
    wait_for_epoch(killed, 2, job)
    os.kill(job.processes[rank].pid, signal.SIGKILL)
    job.codes(timeout=0.5)  # the other is ended as by a launcher
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(killed, elsewhere)
    resumed = finish(*arguments, scratch=tmp_path)
    assert "resuming after epoch" in resumed.said()
    assert vectors(killed).tobytes() == vectors(whole).tobytes()
    assert curve(killed) == curve(whole)
    finish("ids", finished, [f"run.dir={elsewhere}", *arguments[2][1:]], ranks=3, scratch=tmp_path)
    assert curve(elsewhere) == pytest.approx(curve(whole), rel=1e-4)


def test_a_loss_that_is_not_finite_is_one_error_on_rank_0(finished, tmp_path):
    run = tmp_path / "run"
    job = start("ids", finished, [*prepared(finished, run), "ids.sasrec.lr=1e12"], scratch=tmp_path)
    assert job.codes(timeout=60) == [EXIT_CODE] * 2
    assert "epoch" in job.said(0)
    assert "ids.sasrec.lr" in job.said(0)
    assert job.said(1) == ""


def test_ranks_that_disagree_on_the_catalogue_are_one_error_on_rank_0(finished, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    arguments = prepared(finished, one)
    prepared(finished, other)
    open_run(finished, [f"run.dir={other}", "prepare.min_user_interactions=6"]).make("prepare", fresh=True)
    elsewhere = {1: [f"run.dir={other}", "prepare.min_user_interactions=6"]}
    job = start("ids", finished, arguments, scratch=tmp_path, apart=elsewhere)
    assert job.codes(timeout=60) == [EXIT_CODE] * 2
    assert "rank 1" in job.said(0)
    assert "prepare" in job.said(0)
    assert str(one) in job.said(0)
    assert not (one / "ids" / "id").exists()


def test_what_rank_0_alone_makes_is_finished_when_it_is_made_on_two(finished, tmp_path):
    """`rarec run` under a launcher: a second writer would leave a folder that nobody may replace."""
    run = tmp_path / "run"
    finish("prepare", finished, [f"run.dir={run}"], scratch=tmp_path)
    assert not open_run(finished, [f"run.dir={run}"]).make("prepare")
    shutil.rmtree(run)
    shutil.copytree(finished.parent / "run", run)
    shutil.rmtree(run / "report")
    finish("report", finished, [f"run.dir={run}"], scratch=tmp_path)
    assert not open_run(finished, [f"run.dir={run}", "run.device=cpu"]).make("report")


def test_what_does_not_train_is_made_by_rank_0(finished, tmp_path):
    """An import, and one of another source."""
    run = tmp_path / "run"
    overrides = prepared(finished, run)
    open_run(finished, overrides).make("ids")
    source = shutil.copyfile(run / "ids/id/items.npy", tmp_path / "items.npy")
    ids = list(open_run(finished, overrides).dataset.item_ids)
    (tmp_path / "ids.txt").write_text("\n".join(map(str, ids)))
    shutil.rmtree(run / "ids")
    files = f"{{items: {source}, item_ids: {tmp_path / 'ids.txt'}}}"
    imported = ["ids.model=import", f"ids.imported={files}", f"sources.image={files}"]
    finish("ids", finished, [*overrides[:2], *imported], scratch=tmp_path)
    assert np.array_equal(vectors(run), np.load(source))
    assert np.array_equal(np.load(run / "ids/image/items.npy"), np.load(source))
