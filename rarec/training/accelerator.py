"""Join the other processes of a run and choose the engine, and check that both are as configured.

`accelerate launch` sets the number of ranks and the engine by environment variables; the run's configuration sets the
device. Accelerate itself does not notice when they contradict each other: it then trains on every rank separately, or
without the engine.
"""

import logging
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState

from rarec.config import RunConfig
from rarec.console.last_resort import world_size
from rarec.distributed.world import World
from rarec.errors import UserError
from rarec.storage.files import read_json

if TYPE_CHECKING:
    from rarec.training.engines import Engine

SET_BY_RUN = {
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "mixed_precision": "llm.dtype",
    "bf16": "llm.dtype",
    "fp16": "llm.dtype",
    "optimizer": "train",
    "scheduler": "train",
}
"""Settings of launchers and of DeepSpeed, and the field of the run's configuration that sets each."""
_OWN_ENGINES = "launch with a file of configs/accelerate/: ddp.yaml, fsdp2.yaml, zero2.yaml or zero3.yaml"
NOT_APPLIED = {
    "ACCELERATE_DYNAMO_BACKEND": "set llm.compile: true",
    "ACCELERATE_USE_MEGATRON_LM": _OWN_ENGINES,
    "ACCELERATE_USE_PARALLELISM_CONFIG": _OWN_ENGINES,
    "FSDP_OFFLOAD_PARAMS": "use more GPUs",
    "FSDP_ACTIVATION_CHECKPOINTING": "set llm.gradient_checkpointing: true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "use more GPUs",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "use more GPUs",
}
"""Variables of launchers that would be ignored, and what to do instead. Without its prefixes, a variable's name is that
of the setting that it is from."""


def start_world(config: RunConfig) -> World:
    """Join the other processes that the launcher started for a run, if any.

    Raises:
        UserError: see `join_world`; or the number of processes is not `run.num_processes`.
    """
    started, wanted = world_size(), config.run.num_processes
    if wanted is not None and started != wanted:
        remedy = f"accelerate launch --num_processes {wanted} ..., or change run.num_processes"
        raise UserError(f"run.num_processes is {wanted}, but {started} processes were started", remedy, shared=True)
    return join_world(config.run.device, "run.device", "run.device=cpu")


def join_world(device: str, field: str, on_cpu: str) -> World:
    """Join the other processes that the launcher started, if any.

    Args:
        device: where models run: `auto`, `cpu` or `cuda`.
        field: where the user says so, for messages.
        on_cpu: what the user writes to have `cpu` there.

    Raises:
        UserError: it is another word; or a GPU is required and there is none.
    """
    _silence_libraries()
    world = world_size()
    on_gpu = _on_gpu(device, field, on_cpu, world)
    if world == 1 and not _launched_with("DEEPSPEED"):
        return World(device=torch.device("cuda" if on_gpu else "cpu"))
    state = _state(on_gpu)
    if state.num_processes != world or dist.get_world_size() != world:
        raise UserError(f"the launcher started {world} processes, but Accelerate found {state.num_processes}")
    return World(state.process_index, world, state.device)


def _silence_libraries() -> None:
    """Keep notices of the libraries below off the user's terminal: they say nothing about the run."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|transformers|deepspeed)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _on_gpu(device: str, field: str, on_cpu: str, world: int) -> bool:
    """Return whether models run on GPUs.

    Raises:
        UserError: it is another word; or they must, and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"{field} is {device!r}", "choose auto, cpu or cuda", shared=True)
    wanted = device
    if wanted == "auto" and world > 1:
        wanted = "cuda"  # if one of several machines has lost its GPUs, it must not continue on its CPU
    if wanted == "cuda" and not torch.cuda.is_available():
        reason = f"{field} is cuda" if device == "cuda" else f"{world} processes run on GPUs by default"
        remedy = f"install a PyTorch that supports your GPU, or use CPUs: {on_cpu}"
        raise UserError(f"{reason}, but PyTorch finds no GPU", remedy, shared=True)
    return wanted != "cpu" and torch.cuda.is_available()


def _state(on_gpu: bool) -> PartialState:
    """Start the process group, through Accelerate."""
    if on_gpu:  # NCCL waits ten minutes; hashing a large log on rank 0 takes longer. The watchdog sees what hangs
        return PartialState(timeout=timedelta(hours=1))
    os.environ["DS_ACCELERATOR"] = "cpu"
    if not _launched_with("DEEPSPEED"):
        return PartialState(cpu=True)
    import deepspeed

    # DeepSpeed would compile this op for half a minute, and only its inference calls it: gloo reduces in training.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.pop("ACCELERATE_USE_CPU", None)  # if it is set, Accelerate trains without DeepSpeed and gives no warning
    return PartialState(backend="gloo")


def build_engine(world: World, config: RunConfig) -> "Engine":
    """Return the engine that the launcher's file names.

    What an engine needs is imported only here: a stage without a model starts in a fraction of the time.

    Raises:
        UserError: the file's settings contradict the run's configuration.
    """
    _check_launcher_settings(config)
    if _launched_with("DEEPSPEED"):
        from rarec.training.zero import ZeroEngine

        return ZeroEngine(world, _deepspeed_config(config))
    from rarec.training.engines import Engine, Fsdp2Engine

    return Fsdp2Engine(world) if _launched_with("FSDP") and world.size > 1 else Engine(world)


def _check_launcher_settings(config: RunConfig) -> None:
    """Refuse what the launcher's file, or a variable, sets beside the run's configuration."""
    agreeing = {"mixed_precision": ("no", ""), "gradient_accumulation_steps": ("1", str(config.train.accumulate))}
    for name, values in agreeing.items():
        variable = f"ACCELERATE_{name.upper()}"
        given = os.environ.get(variable, values[0])
        if given not in values:
            raise _conflict(f"the launcher's file, or {variable},", name, given)
    for variable, instead in NOT_APPLIED.items():
        given = os.environ.get(variable, "")
        if given.lower() not in ("", "no", "none", "false"):
            name = variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()
            problem = f"the launcher's file, or {variable}, sets {name}: {given}, which rarec does not apply"
            raise UserError(problem, f"remove it from there; {instead}", shared=True)


def _conflict(place: str, name: str, given: object) -> UserError:
    problem = f"{place} sets {name}: {given}, but the run's configuration sets it, in {SET_BY_RUN[name]}"
    return UserError(problem, f"remove {name} from there", shared=True)


def build_accelerator(world: World, trackers: list[str], logs: Path) -> Accelerator:
    """Return an Accelerator for its trackers.

    Args:
        world: all ranks.
        trackers: names of Accelerate's trackers.
        logs: directory that they write to.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    on_cpu = world.device.type == "cpu" and not _launched_with("DEEPSPEED")
    try:
        return Accelerator(cpu=on_cpu, mixed_precision="no", log_with=trackers or None, project_dir=str(logs))
    except (ValueError, ImportError) as error:
        raise UserError(f"train.trackers: {error}", "install the tracker, or set train.trackers=[]") from None


def _launched_with(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration that the launcher's file names, without what the run's configuration sets.

    Raises:
        UserError: the launcher's file names none, or it contradicts the run's configuration.
    """
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))
    if not path.is_file():
        remedy = "set deepspeed_config_file there, as in configs/accelerate/zero2.yaml"
        raise UserError("the launcher's file asks for DeepSpeed without a configuration", remedy, shared=True)
    tree: dict[str, Any] = read_json(path)
    if not isinstance(tree, dict) or "stage" not in tree.get("zero_optimization", {}):
        raise UserError(f"{path}: zero_optimization.stage is missing", "see configs/deepspeed/zero2.json", shared=True)
    same = {"gradient_accumulation_steps": config.train.accumulate, "gradient_clipping": config.train.clip}
    for key in SET_BY_RUN:
        given = tree.get(key, "auto")
        if given not in ("auto", same.get(key), {"enabled": False}):
            raise _conflict(str(path), key, given)
    return {key: value for key, value in tree.items() if key not in SET_BY_RUN}
