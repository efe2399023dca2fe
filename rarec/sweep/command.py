"""`rarec sweep`: list a sweep's runs, run them here, or submit them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rarec.sweep.expand import Sweep, SweepRun, load_sweep
from rarec.sweep.local import run_locally
from rarec.sweep.slurm import submit
from rarec.sweep.state import state_of

Say = Callable[[str], None]


def sweep(
    file: Path, overrides: Sequence[str], only: str | None, say: Say, console: Console, listed: bool, sbatch: str | None
) -> bool:
    """Do what the command line asks for; returns whether a run failed.

    Args:
        file: of the sweep.
        overrides: for all runs.
        only: a glob over their names.
        say: tells the user a line.
        console: on a terminal, for what the run in progress is at.
        listed: print the runs with their states on standard output, and run nothing.
        sbatch: submit to SLURM with these options; None runs here.

    Raises:
        UserError: sweep, base or a run is not as it should be; then nothing was started.
        Stopped: a signal ended it.
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
        failed = run_locally(whole, runs, say, lambda line: status.update(escape(line)))
    for line in failed:
        say(f"failed: {line}")
    return bool(failed)


def _states(whole: Sweep, runs: Sequence[SweepRun]) -> list[str]:
    width = max(len(run.label) for run in runs)
    lines = []
    for run in runs:
        state, stage = state_of(run, whole.stages)
        lines.append(f"{run.label:{width}}  {state}" + (f", {stage} is next" if state == "begun" else ""))
    return lines
