"""Read the environment variables that a launcher (`accelerate launch`, torchrun, SLURM) sets for this process."""

import os
import re

from rarec.errors import UserError

MOST_RANKS = 100_000
"""More processes than any machine runs: such a number is a mistake, and waiting for them all would never end."""
_LIMITS = {"RANK": MOST_RANKS - 1, "LOCAL_RANK": MOST_RANKS - 1, "WORLD_SIZE": MOST_RANKS, "MASTER_PORT": 65_535}


def rank() -> int:
    """Return the rank of this process among those that a launcher started.

    Raises:
        UserError: the variable holds no rank.
    """
    return _number("RANK", 0)


def world_size() -> int:
    """Return the number of processes that a launcher started.

    Raises:
        UserError: the variable holds no such number.
    """
    return _number("WORLD_SIZE", 1)


def check_launcher() -> None:
    """Check the variables together, before anything is done.

    Raises:
        UserError: naming the variable that makes no sense.
    """
    _number("MASTER_PORT", 0)
    for name in ("RANK", "LOCAL_RANK"):
        if _number(name, 0) >= world_size():
            raise _refusal(name, f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set, which means 1')}")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("0|[1-9][0-9]{0,9}", text) or int(text) > _LIMITS[name]:
        raise _refusal(name, f"it must be a number from 0 to {_LIMITS[name]:,}")
    return int(text)


def _refusal(name: str, reason: str) -> UserError:
    problem = f"the environment variable {name} is {os.environ.get(name, 'not set')!r}: {reason}"
    return UserError(problem, f"unset {name}, or start several processes with accelerate launch, which sets it")
