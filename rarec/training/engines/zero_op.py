"""DeepSpeed's op for CPUs, which is compiled at its first use.

PyTorch marks a directory in which it compiles by a file, and other processes wait until that file is gone: if a process
is killed there, every later one waits forever. So ranks compile under a lock that the kernel releases when its process
ends, in a directory of rarec's own. A mark found while holding the lock was left by a killed process, and is deleted.
Ninja, which decides what is to be compiled, is always the one that came with DeepSpeed: it does not know what another
version has compiled, and would compile it again.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from torch.utils.cpp_extension import get_default_build_root

from rarec.errors import UserError
from rarec.storage.files import locked

MARK = "lock"
"""PyTorch's name of that file."""


def op_directory() -> Path:
    """Return the directory in which the op is compiled; each version of Python and PyTorch has its own."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, "rarec", f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}")


def load_cpu_op() -> None:
    """Load the op by which DeepSpeed's ranks on one machine reduce through shared memory; compile it if necessary.

    DeepSpeed then uses the loaded op.

    Raises:
        UserError: it does not compile, or its directory cannot be created.
    """
    import ninja
    from deepspeed.accelerator import get_accelerator  # slow; it also sets DeepSpeed's accelerator for this process

    op = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if op is None or not op.is_compatible():
        return
    directory = op_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot create {directory} for DeepSpeed's CPU op: {error.strerror}"
        raise UserError(problem, "set TORCH_EXTENSIONS_DIR to a directory that you may write to", shared=True) from None
    path = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", os.defpath)])
    with locked(directory / "rarec.lock"), patch_environment(TORCH_EXTENSIONS_DIR=directory, PATH=path):
        for mark in directory.glob(f"*/{MARK}"):
            mark.unlink()
        try:
            op.load()
        except RuntimeError as error:
            causes = [line for line in f"{error}".splitlines() if "error:" in line or "not found" in line]
            problem = f"DeepSpeed's CPU op does not compile: {causes[0] if causes else error}"
            raise UserError(problem, "run rarec doctor to see what is missing", shared=True) from None
