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

from rarec.stages.run import Run
from rarec.sweep import load_sweep, state_of
from tests.conftest import make_world
from tests.ranks import ROOT, VARIANT, copied, losses, weights
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


SAVED = "stopped by a signal at step"


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as own:
        yield own


@pytest.fixture(scope="module")
def two_nodes(slurm, decoder, tmp_path_factory) -> tuple[dict[str, str], dict[str, Path]]:
    """Jobs on two nodes with ZeRO-3, and their run directories: one undisturbed, one preempted in the middle."""
    root = tmp_path_factory.mktemp("two-nodes")
    runs = {name: root / name for name in ("whole", "preempted")}
    zero = {"RAREC_ACCELERATE": "configs/accelerate/zero3.yaml"}
    jobs = {
        name: slurm.submit("multi_node.sbatch", str(decoder), copied(decoder, run), *TRAIN, **zero)
        for name, run in runs.items()
    }
    log = runs["preempted"] / "train" / VARIANT / "log.jsonl"
    slurm.until(lambda: log.exists() and log.read_text().count("\n") > 3, jobs["preempted"])
    slurm.call(["scancel", "--signal=USR1", "--batch", jobs["preempted"]])  # as --signal=B:USR1 has SLURM do
    for job in jobs.values():
        slurm.ended(job)
    return jobs, runs


@needs_slurm
def test_a_job_of_two_nodes_trains_to_its_end(slurm, two_nodes):
    jobs, runs = two_nodes
    job = slurm.job(jobs["whole"])
    assert (job["JobState"], job["Restarts"], job["NumNodes"]) == ("COMPLETED", "0", "2"), slurm.said(jobs["whole"])
    assert SAVED not in slurm.said(jobs["whole"])
    assert json.loads((runs["whole"] / "train" / VARIANT / "manifest.json").read_text())["step"] == len(
        losses(runs["whole"])
    )


@needs_slurm
def test_a_preempted_job_requeues_itself_and_ends_with_the_same_weights_bit_for_bit(slurm, two_nodes):
    jobs, runs = two_nodes
    job, said = slurm.job(jobs["preempted"]), slurm.said(jobs["preempted"])
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count(SAVED) == 1
    expected, found = weights(runs["whole"]), weights(runs["preempted"])
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert losses(runs["preempted"]) == losses(runs["whole"])


@needs_slurm
def test_each_task_of_a_sweep_trains_by_its_own_line(slurm, decoder, tmp_path):
    lines = [f"{copied(decoder, tmp_path / str(steps))} train.max_steps={steps}\n" for steps in (1, 2)]
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("".join([*lines, "train.max_steps=3\n"]))
    arguments = str(decoder), str(sweep), "run.device=cpu", "train.variants=[per_layer]"
    # called from elsewhere
    job = slurm.submit("sweep.sbatch", *arguments, options=["--array=1-3"], where=tmp_path, RAREC_HOME=str(ROOT))
    for task in ("1", "2"):
        assert slurm.ended(f"{job}_{task}")["JobState"] == "COMPLETED", slurm.said(f"{job}_{task}")
        assert len(losses(tmp_path / task, "per_layer")) == int(task)
    assert slurm.ended(f"{job}_3")["ExitCode"] == "2:0"
    assert "run.dir" in slurm.said(f"{job}_3")


@needs_slurm
def test_a_task_that_is_preempted_leaves_the_others_of_its_array_alone(slurm, decoder, tmp_path):
    """The last task is preempted; its job number is also that of the whole array."""
    lines = [f"{copied(decoder, tmp_path / task)} lora.dropout=0.1\n" for task in ("1", "2")]
    (tmp_path / "sweep.txt").write_text("".join(lines))
    job = slurm.submit("sweep.sbatch", str(decoder), str(tmp_path / "sweep.txt"), *TRAIN, options=["--array=1-2"])
    log = tmp_path / "2" / "train" / VARIANT / "log.jsonl"
    slurm.until(lambda: log.exists() and log.read_text().count("\n") > 3, f"{job}_2")
    slurm.call(["scancel", "--signal=USR1", "--batch", f"{job}_2"])
    ended = {task: slurm.ended(f"{job}_{task}") for task in ("1", "2")}
    said = {task: slurm.said(f"{job}_{task}") for task in ended}
    assert {task: (one["JobState"], one["Restarts"]) for task, one in ended.items()} == {
        "1": ("COMPLETED", "0"),
        "2": ("COMPLETED", "1"),
    }, said
    assert (said["1"].count(SAVED), said["2"].count(SAVED)) == (0, 1)


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
