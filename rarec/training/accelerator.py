"""The one function that builds the accelerator, and proves what it built."""

import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from rarec.errors import UserError


def build_accelerator(trackers: list[str], logs: Path) -> Accelerator:
    """An accelerator for one process, CPU or GPU.

    Precision is the language model's own (`llm.dtype`); what trains stays float32, so Accelerate casts nothing.

    Args:
        trackers: Accelerate's trackers by name.
        logs: where they write.

    Raises:
        UserError: a tracker is unknown or not installed, or the launcher started more than one process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UserError(
            f"the launcher started {world} processes; this version trains in one",
            "accelerate launch --num_processes 1 launch/train.py --config CONFIG",
        )
    try:
        accelerator = Accelerator(mixed_precision="no", log_with=trackers or None, project_dir=str(logs))
    except (ValueError, ImportError) as error:
        raise UserError(f"train.trackers: {error}", "install that tracker, or set train.trackers=[]") from None
    if accelerator.distributed_type != DistributedType.NO or accelerator.num_processes != 1:
        raise UserError(
            f"Accelerate built {accelerator.distributed_type} with {accelerator.num_processes} processes",
            "use configs/accelerate/one.yaml",
        )
    return accelerator
