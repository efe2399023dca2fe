"""DeepSpeed's own op for CPUs, which is compiled where it is first used.

PyTorch marks a directory in which it compiles by a file, and whoever finds that file waits until it is gone: after a
process that was killed there, every later one waits for ever. So ranks compile under a lock that the kernel lets go
with its process, in a directory of rarec's own, where a mark that stands while nobody has the lock is nobody's.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from torch.utils.cpp_extension import get_default_build_root

from rarec.errors import UserError
from rarec.files import locked

MARK = "lock"
"""PyTorch's name for that file."""


def op_directory() -> Path:
    """Where the op is compiled, apart for each Python and PyTorch."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, "rarec", f"python{sys.version_info.major}.{sys.version_info.minor}-torch{torch.__version__}")


def load_cpu_op() -> None:
    """Load the op by which DeepSpeed's ranks on one machine reduce through shared memory, compiled if need be.

    DeepSpeed then finds it loaded.

    Raises:
        UserError: it does not compile, or there is no place for it.
    """
    from deepspeed.accelerator import get_accelerator  # takes seconds, and fixes the accelerator

    op = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if op is None or not op.is_compatible():
        return
    directory = op_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"{directory}, for DeepSpeed's op for CPUs, cannot be made: {error.strerror}"
        raise UserError(problem, "set TORCH_EXTENSIONS_DIR to a directory that you may write to", shared=True) from None
    with locked(directory / "rarec.lock"), patch_environment(TORCH_EXTENSIONS_DIR=directory):
        for mark in directory.glob(f"*/{MARK}"):
            mark.unlink()
        try:
            op.load()
        except RuntimeError as error:
            causes = [line for line in f"{error}".splitlines() if "error:" in line or "not found" in line]
            problem = f"DeepSpeed's op for CPUs does not compile: {causes[0] if causes else error}"
            raise UserError(problem, "rarec doctor says what is missing", shared=True) from None
