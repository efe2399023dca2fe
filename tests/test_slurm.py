"""Jobs on a real SLURM cluster of two nodes: training, preemption and resume, failure, and sweeps."""

import getpass
import json
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from rarec.cluster.definition import load_sweep, state_of
from rarec.stages.run import Run
from tests.conftest import make_world
from tests.ranks import ROOT, VARIANT, copied, finish, losses, weights
from tests.slurm import Cluster, cluster, needs_slurm
from tests.sweeps import command, own, write_sweep

SCRIPTS = sorted((ROOT / "launch" / "slurm").iterdir())
TRAIN = [
    "run.device=cpu",
    f"train.variants=[{VARIANT}]",
    "train.epochs=6",
    "train.validate_every=1000",
    "lora.dropout=0.1",
]
SAVED = "stopped by a signal at step"


def submitted(slurm: Cluster, submit: Sequence[str], places: dict[str, str]) -> list[str]:
    """Return, for each line that `rarec sweep --slurm` prints, the number of tasks of a job, or the line itself."""
    result = subprocess.run(
        submit, env={**slurm.environment, **places}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stderr.splitlines()
    found = [re.fullmatch(r"job \d+: [a-z ]+, (\d tasks?)(, after job \d+)?", line) for line in lines]
    return [match[1] if match else line for match, line in zip(found, lines, strict=True)]


def await_queue(slurm: Cluster) -> None:
    """Wait until the queue is empty."""
    deadline = time.monotonic() + 300
    while slurm.call(["squeue", "--noheader"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)


def preempt(slurm: Cluster, job: str, run: Path) -> None:
    """Send a job the signal of `--signal=B:USR1` once it trains."""
    log = run / "train" / VARIANT / "log.jsonl"
    slurm.until(lambda: log.exists() and log.read_text().count("\n") > 3, job)
    slurm.call(["scancel", "--signal=USR1", "--batch", job])


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as own:
        yield own


@needs_slurm
def test_a_preempted_job_of_two_nodes_requeues_itself_and_ends_with_the_weights_of_an_undisturbed_training(
    slurm, decoder, tmp_path
):
    """With ZeRO-3; bit for bit those of two processes that no SLURM started."""
    runs = {name: tmp_path / name for name in ("preempted", "whole")}
    places = {name: copied(decoder, run) for name, run in runs.items()}
    zero = {"RAREC_ACCELERATE": "configs/accelerate/zero3.yaml"}
    fewer = [*TRAIN, "train.epochs=4"]
    job = slurm.submit("multi_node.sbatch", str(decoder), places["preempted"], *fewer, **zero)
    preempt(slurm, job, runs["preempted"])
    finish("train", decoder, [places["whole"], *fewer], engine="zero3", scratch=tmp_path)
    ended, said = slurm.ended(job), slurm.said(job)
    assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", "1", "2"), said
    assert said.count(SAVED) == 1
    expected, found = weights(runs["whole"]), weights(runs["preempted"])
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(runs["preempted"]) == losses(runs["whole"])


@needs_slurm
def test_each_task_trains_by_its_own_line_and_one_that_is_preempted_leaves_the_others_alone(slurm, decoder, tmp_path):
    """The last task is preempted; its job number is also that of the whole array."""
    place = {task: copied(decoder, tmp_path / task) for task in ("1", "3")}
    (tmp_path / "sweep.txt").write_text(f"{place['1']} train.max_steps=1\ntrain.max_steps=2\n{place['3']}\n")
    arguments = str(decoder), str(tmp_path / "sweep.txt"), *TRAIN
    # called from elsewhere
    job = slurm.submit("sweep.sbatch", *arguments, options=["--array=1-3"], where=tmp_path, RAREC_HOME=str(ROOT))
    preempt(slurm, f"{job}_3", tmp_path / "3")
    ended = {task: slurm.ended(f"{job}_{task}") for task in ("1", "2", "3")}
    said = {task: slurm.said(f"{job}_{task}") for task in ended}
    assert {task: (one["JobState"], one["Restarts"], one["ExitCode"]) for task, one in ended.items()} == {
        "1": ("COMPLETED", "0", "0:0"),
        "2": ("FAILED", "0", "2:0"),
        "3": ("COMPLETED", "1", "0:0"),
    }, said
    assert [said[task].count(SAVED) for task in said] == [0, 0, 1]
    assert len(losses(tmp_path / "1")) == 1
    assert "run.dir" in said["2"]


@needs_slurm
def test_a_sweep_submits_what_is_not_done_and_a_shared_part_that_fails_stops_only_the_runs_that_need_it(
    slurm, tmp_path
):
    path = write_sweep(make_world(tmp_path), {"bad": {"shards.state_blocks": [99]}, "good": None})
    submit = [*command(path, "--slurm", "--sbatch=--time=30"), "prompt.separator=' and '"]
    places = {"PYTHONPATH": own({})["PYTHONPATH"]}
    assert submitted(slurm, submit, places) == ["2 tasks", "2 tasks"]
    with pytest.raises(AssertionError, match=r"sweep\.yaml: jobs .*scancel"):
        slurm.call(submit, **places)
    await_queue(slurm)

    sweep = load_sweep(path, ["prompt.separator=' and '"])
    logs = {log.name: log.read_text() for log in (tmp_path / "all" / "slurm").glob("*.log")}
    assert [state_of(run, sweep.stages) for run in sweep.runs] == [("begun", "shards"), ("done", "evaluate")], logs
    missing = Run(sweep.runs[0].config).directory("shards")
    errors = [line for name in sorted(logs) for line in logs[name].splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert errors[0].startswith("error: shards.state_blocks: ")
    assert str(missing) in errors[1]
    record = json.loads((sweep.runs[1].directory / "record.json").read_text())
    assert record["train"]["seconds"] > 0

    (line,) = submitted(slurm, [*submit, "--only", "good/seed-17"], places)
    assert "nothing to submit" in line
    assert submitted(slurm, submit, places) == ["1 task", "1 task"]  # what failed is submitted again
    slurm.call(["scancel", "--user", getpass.getuser()])


@needs_slurm
def test_a_job_that_fails_has_the_exit_code_and_is_not_begun_again(slurm, tmp_path):
    job = slurm.submit("single_node.sbatch", str(tmp_path / "missing.yaml"), RAREC_STAGES="prepare train")
    ended = slurm.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert slurm.said(job).count("missing.yaml") == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)
