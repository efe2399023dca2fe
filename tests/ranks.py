"""Stages on several ranks in tests, started with the environment of a launcher, with any engine.

The processes are forked from a server that has imported everything once, so a start takes a second, not ten.
"""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.forks import START

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_hpz", "fsdp2")
ROOT = Path(__file__).parents[1]
VARIANT = "per_layer_lora"


@dataclass
class Job:
    """Running ranks.

    Attributes:
        processes: processes by rank.
        stderr: the file of each rank's standard error.
    """

    processes: list[BaseProcess]
    stderr: list[Path]

    def codes(self, timeout: float = 240) -> list[int | None]:
        """Wait for all and return their exit codes; None for a process that is killed after the timeout."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self, rank: int = 0) -> str:
        """Return the standard error of a rank."""
        return self.stderr[rank].read_text()


def start(
    stage: str,
    config: Path,
    overrides: Sequence[str],
    *,
    engine: str = "ddp",
    ranks: int = 2,
    fresh: bool = False,
    scratch: Path,
    deepspeed: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    apart: dict[int, list[str]] | None = None,
    cwd: Path | None = None,
) -> Job:
    """Start a stage on several ranks on this machine's CPU.

    Args:
        stage: name of the stage.
        config: configuration of the run.
        overrides: overrides of its fields.
        engine: one of `ENGINES`.
        ranks: number of processes.
        fresh: build anew, as `--fresh` does.
        scratch: directory for a DeepSpeed configuration and the ranks' output.
        deepspeed: changes to the shipped DeepSpeed configuration, in which small parameters are sharded too.
        environment: further environment variables.
        apart: further overrides of some ranks.
        cwd: current directory, by default that of this process.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_FSDP": str(engine == "fsdp2"),
    }
    if engine.startswith("zero"):
        path = scratch / f"{engine}.json"
        shipped = json.loads((ROOT / "configs" / "deepspeed" / path.name).read_text())
        few = {"stage3_param_persistence_threshold": 0} | (
            {"zero_hpz_partition_size": ranks} if "hpz" in engine else {}
        )
        tree = {"zero_optimization": {**shipped["zero_optimization"], **few}, **(deepspeed or {})}
        path.write_text(json.dumps(tree))
        common |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    stderr = [scratch / f"said-{rank}.txt" for rank in range(ranks)]
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
        given = ["run.device=cpu", *overrides, *(apart or {}).get(rank, [])]
        arguments = (stage, config, given, own, fresh, stderr[rank], cwd or Path.cwd())
        processes.append(START.Process(target=_run, args=arguments))
    for process in processes:
        process.start()
    return Job(processes, stderr)


def finish(*arguments: Any, **keywords: Any) -> Job:
    """Start a stage, wait for all ranks, and assert that they succeed."""
    job = start(*arguments, **keywords)
    codes = job.codes()
    assert codes == [0] * len(codes), (codes, [job.said(rank)[-3000:] for rank in range(len(codes))])
    return job


def wait_for_step(run: Path, step: int, job: Job, variant: str = VARIANT, folder: str = "") -> None:
    """Wait until the log of a variant (in `folder`, by default the variant's) has a step, or the job has ended."""
    log, deadline = run / "train" / (folder or variant) / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and all(process.is_alive() for process in job.processes):
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.005)


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def copied(config: Path, to: Path) -> str:
    """Copy the run beside a configuration; return the override that points to the copy."""
    shutil.copytree(config.parent / "run", to)
    return f"run.dir={to}"


def losses(run: Path, variant: str = VARIANT) -> list[float]:
    """Return the loss of every step; each step is in the log once."""
    lines = [json.loads(line) for line in (run / "train" / variant / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path, variant: str = VARIANT) -> dict[str, torch.Tensor]:
    """Return the trained weights and their moments from the newest checkpoint."""
    newest = sorted((run / "train" / variant / "checkpoints").glob("step-*"))[-1]
    files = [newest / "alignment.safetensors", newest / "optimizer.safetensors"]
    adapter = newest / "lora" / "adapter_model.safetensors"
    return {name: tensor for file in [*files, adapter] if file.exists() for name, tensor in load_file(file).items()}


def _run(
    stage: str, config: Path, overrides: list[str], environment: dict[str, str], fresh: bool, stderr: Path, cwd: Path
) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    from rarec.console.last_resort import guarded
    from rarec.entry import run_stage

    torch.set_num_threads(1)
    with stderr.open("w") as file:
        os.dup2(file.fileno(), 2)  # also what libraries write
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    guarded(lambda: run_stage(stage, config, overrides, fresh))
