"""The one place where ranks are started and an engine is chosen, and where both are proved to be what was asked for.

`accelerate launch` says by its environment how many ranks there are and which engine they run; the run's configuration
says on what device. Accelerate itself does not notice when these do not fit: it then trains apart on every rank, or
without the engine.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState

from rarec.config import RunConfig
from rarec.errors import UserError
from rarec.files import read_json
from rarec.training.engines import Engine
from rarec.world import World

ONCE = {
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "bf16": "llm.dtype",
    "fp16": "llm.dtype",
    "optimizer": "train",
    "scheduler": "train",
}
"""What a DeepSpeed file might say again, and the field that says it."""


def start_world(config: RunConfig) -> World:
    """Join the other processes that the launcher started, if any.

    Raises:
        UserError: there is no GPU though one is asked for, or not the ranks that were asked for.
    """
    world, wanted = int(os.environ.get("WORLD_SIZE", "1")), config.run.num_processes
    if wanted is not None and world != wanted:
        remedy = f"accelerate launch --num_processes {wanted} ..., or change run.num_processes"
        raise UserError(f"run.num_processes is {wanted}, but {world} processes were started", remedy, shared=True)
    on_gpu = _on_gpu(config, world)
    if world == 1 and not _asked("DEEPSPEED"):
        return World(device=torch.device("cuda" if on_gpu else "cpu"))
    state = _state(on_gpu)
    if state.num_processes != world or dist.get_world_size() != world:
        raise UserError(f"the launcher started {world} ranks, but Accelerate found {state.num_processes}")
    return World(state.process_index, world, state.device)


def _on_gpu(config: RunConfig, world: int) -> bool:
    """Whether models run on GPUs.

    Raises:
        UserError: they should, and there is none.
    """
    wanted = config.run.device
    if wanted == "auto" and world > 1:
        wanted = "cuda"  # one machine of many that has lost its GPUs must not go on without
    if wanted == "cuda" and not torch.cuda.is_available():
        asked = "run.device is cuda" if config.run.device == "cuda" else f"{world} ranks are for GPUs"
        remedy = "install a PyTorch that sees the GPU, or train on CPUs: run.device=cpu"
        raise UserError(f"{asked}, but PyTorch sees no GPU here", remedy, shared=True)
    return wanted != "cpu" and torch.cuda.is_available()


def _state(on_gpu: bool) -> PartialState:
    """Accelerate's, which starts the process group."""
    if on_gpu:
        return PartialState()
    os.environ["DS_ACCELERATOR"] = "cpu"
    if not _asked("DEEPSPEED"):
        return PartialState(cpu=True)
    from rarec.training.engines.zero_op import load_cpu_op

    load_cpu_op()
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, Accelerate trains without DeepSpeed and does not say so
    return PartialState(backend="gloo")


def build_engine(world: World, config: RunConfig) -> Engine:
    """The engine that the launcher's file names.

    Raises:
        UserError: its settings contradict the run's.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", ""):
        raise _twice("mixed_precision", precision, "llm.dtype", "the launcher's file")
    if _asked("DEEPSPEED"):
        from rarec.training.engines.zero import ZeroEngine

        return ZeroEngine(world, _deepspeed_config(config))
    if _asked("FSDP") and world.size > 1:
        from rarec.training.engines.fsdp import Fsdp2Engine

        return Fsdp2Engine(world)
    from rarec.training.engines.plain import PlainEngine

    return PlainEngine(world)


def build_accelerator(world: World, trackers: list[str], logs: Path) -> Accelerator:
    """For its trackers.

    Args:
        world: all of them.
        trackers: Accelerate's, by name.
        logs: where they write.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    on_cpu = world.device.type == "cpu" and not _asked("DEEPSPEED")
    try:
        return Accelerator(cpu=on_cpu, mixed_precision="no", log_with=trackers or None, project_dir=str(logs))
    except (ValueError, ImportError) as error:
        raise UserError(f"train.trackers: {error}", "install that tracker, or set train.trackers=[]") from None


def _asked(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """The JSON that the launcher's file names, if it leaves to the run's configuration what that says.

    Raises:
        UserError: it names none, or says something a second time and otherwise.
    """
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if not path.is_file():
        remedy = "set deepspeed_config_file there, as in configs/accelerate/zero2.yaml"
        raise UserError("the launcher's file asks for DeepSpeed without a configuration", remedy, shared=True)
    tree: dict[str, Any] = read_json(path)
    if not isinstance(tree, dict) or "stage" not in tree.get("zero_optimization", {}):
        raise UserError(f"{path} says no zero_optimization.stage", "see configs/deepspeed/zero2.json", shared=True)
    same = {"gradient_accumulation_steps": config.train.accumulate, "gradient_clipping": config.train.clip}
    for key, field in ONCE.items():
        given = tree.get(key, "auto")
        if given not in ("auto", same.get(key), {"enabled": False}):
            raise _twice(key, given, field, str(path))
    return {key: value for key, value in tree.items() if key not in ONCE}


def _twice(key: str, given: object, field: str, where: str) -> UserError:
    problem = f"{where} says {key}: {given}, which is the run's own to say, in {field}"
    return UserError(problem, f"take {key} out of {where}", shared=True)
