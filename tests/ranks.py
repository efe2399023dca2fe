"""Several ranks in tests: the project's own stages in processes as a launcher starts them, engine and all.

They are forked from a server that has imported everything once, so a start costs a second and not ten.
"""

import json
import multiprocessing
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

os.environ.setdefault("DS_ACCELERATOR", "cpu")
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(
    ["tests.ranks", "rarec.stages.run", "rarec.training.engines.zero", "rarec.training.loop", "rarec.training.watchdog"]
)

ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_hpz", "fsdp2")
ROOT = Path(__file__).parents[1]
VARIANT = "per_layer_lora"


@dataclass
class Job:
    """Ranks under way.

    Attributes:
        processes: by rank.
        told: where each writes what it says.
    """

    processes: list[BaseProcess]
    told: list[Path]

    def codes(self, timeout: float = 240) -> list[int | None]:
        """Wait for all; their exit codes. What still runs then is killed, and has None."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self, rank: int = 0) -> str:
        """All that a rank wrote to standard error."""
        return self.told[rank].read_text()


def start(
    stage: str,
    config: Path,
    overrides: Sequence[str],
    *,
    engine: str = "ddp",
    ranks: int = 2,
    scratch: Path,
    deepspeed: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Job:
    """Start a stage on so many ranks of this machine's CPU.

    Args:
        stage: as in `rarec STAGE`.
        config: of the run.
        overrides: of its fields.
        engine: one of `ENGINES`.
        ranks: how many processes.
        scratch: for a DeepSpeed configuration and what the ranks say.
        deepspeed: more of DeepSpeed's configuration. It is the shipped one, but nothing stays whole for being small.
        environment: more of the environment.
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
    told = [scratch / f"said-{rank}.txt" for rank in range(ranks)]
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
        arguments = (stage, config, ["run.device=cpu", *overrides], own, told[rank])
        processes.append(START.Process(target=_run, args=arguments))
    for process in processes:
        process.start()
    return Job(processes, told)


def finish(*arguments: Any, **keywords: Any) -> Job:
    """Start a stage, wait for all ranks, and expect that all ended well."""
    job = start(*arguments, **keywords)
    codes = job.codes()
    assert codes == [0] * len(codes), (codes, [job.said(rank)[-3000:] for rank in range(len(codes))])
    return job


def wait_for_step(run: Path, step: int, job: Job, variant: str = VARIANT) -> None:
    """Until the log has that step, or the job has ended."""
    log, deadline = run / "train" / variant / "log.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and all(process.is_alive() for process in job.processes):
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.005)


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def copied(config: Path, to: Path) -> str:
    """A copy of the run that a configuration stands beside; the override that points there."""
    shutil.copytree(config.parent / "run", to)
    return f"run.dir={to}"


def losses(run: Path, variant: str = VARIANT) -> list[float]:
    """Of every step, each of which is in the log once."""
    lines = [json.loads(line) for line in (run / "train" / variant / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path, variant: str = VARIANT) -> dict[str, torch.Tensor]:
    """What trains and its moments, as the newest checkpoint has them."""
    newest = sorted((run / "train" / variant / "checkpoints").glob("step-*"))[-1]
    files = [newest / "alignment.safetensors", newest / "optimizer.safetensors"]
    adapter = newest / "lora" / "adapter_model.safetensors"
    return {name: tensor for file in [*files, adapter] if file.exists() for name, tensor in load_file(file).items()}


def _run(stage: str, config: Path, overrides: list[str], environment: dict[str, str], told: Path) -> None:
    os.environ.update(environment)
    from rarec import cli, launch

    torch.set_num_threads(1)
    with told.open("w") as file:
        os.dup2(file.fileno(), 2)  # what libraries write, as well
    sys.stderr = cli.console.file = os.fdopen(os.dup(2), "w", buffering=1)
    cli.guarded(lambda: launch.run(stage, config, overrides))
