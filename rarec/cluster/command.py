"""`rarec sweep`: list the runs of a sweep, run them on this machine, or submit them to SLURM."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rarec.cluster.definition import Sweep, SweepRun, load_sweep
from rarec.cluster.local import run_locally
from rarec.cluster.slurm import submit
from rarec.cluster.state import state_of

Say = Callable[[str], None]


def sweep(
    file: Path, overrides: Sequence[str], only: str | None, say: Say, console: Console, listed: bool, sbatch: str | None
) -> bool:
    """List, submit or run a sweep; return whether a run failed.

    Args:
        file: the sweep's file.
        overrides: overrides for all runs.
        only: glob pattern over the names of runs; None for all runs.
        say: prints a line to the user.
        console: shows what the current run is doing, on a terminal.
        listed: print the runs and their states on standard output, and run nothing.
        sbatch: submit to SLURM with these options of `sbatch`; None runs here.

    Raises:
        UserError: the sweep, its base or a run is invalid; nothing was started.
        Stopped: a signal ended the sweep.
    """
    whole = load_sweep(file, overrides)
    runs = whole.matching(only)
    if listed:
        print("\n".join(_states(whole, runs)))
        return False
    if sbatch is not None:
        submit(whole, runs, sbatch, say)
        return False
    with console.status("") as status:
        failed = run_locally(whole, runs, say, lambda line: status.update(Text(line)))
    for line in failed:
        say(f"failed: {line}")
    return bool(failed)


def _states(whole: Sweep, runs: Sequence[SweepRun]) -> list[str]:
    width = max(len(run.label) for run in runs)
    lines = []
    for run in runs:
        state, stage = state_of(run, whole.stages)
        lines.append(f"{run.label:{width}}  {state}" + (f", next: {stage}" if state == "begun" else ""))
    return lines
