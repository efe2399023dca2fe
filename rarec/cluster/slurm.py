"""Submit a sweep to SLURM: an array of jobs for what the runs share, then an array with a task for each unfinished run.

The arrays run `launch/slurm/sweep.sbatch`, which handles preemption; each task reads its overrides from a text file.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rarec.cluster.definition import Sweep, SweepRun, first_to_do
from rarec.config.load import format_override
from rarec.config.shipped import shipped_files
from rarec.errors import UserError
from rarec.stages import STAGES
from rarec.stages.run import Run
from rarec.storage.artefacts import sha256_json
from rarec.storage.files import write_text

SCRIPT = Path("launch", "slurm", "sweep.sbatch")
_DIRECTORY_FIELDS = ("run.dir", "run.shared")


def submit(sweep: Sweep, runs: Sequence[SweepRun], options: str, say: Callable[[str], None]) -> list[str]:
    """Submit the unfinished ones of these runs; return the numbers of the jobs.

    Args:
        sweep: sweep that the runs belong to.
        runs: runs to look at.
        options: further options of `sbatch`, as a shell reads them.
        say: prints a line to the user.

    Raises:
        UserError: SLURM is missing or refuses, or jobs of this sweep are still in the queue.
    """
    due = [run for run in runs if first_to_do(run.config, sweep.stages) is not None]
    if not due:
        say("every run is done: nothing to submit")
        return []
    _raise_if_queued(sweep)
    shared = [stage for stage in sweep.stages if STAGES[stage].shareable]
    own = [stage for stage in sweep.stages if not STAGES[stage].shareable]
    makers = _one_run_per_set([run for run in due if first_to_do(run.config, shared) is not None], shared)
    jobs: list[str] = []
    for name, tasks, stages in (("shared", makers, shared), ("runs", due, own)):
        if tasks and stages:
            # not `afterok`: one failed task would block all runs; a run without its shared part fails by itself
            after = [f"--dependency=afterany:{first}" for first in jobs]
            job = _submit_array(sweep, name, tasks, stages, [*shlex.split(options), *after])
            count = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
            say(f"job {job}: {' '.join(stages)}, {count}" + "".join(f", after job {first}" for first in jobs))
            jobs.append(job)
    return jobs


def _one_run_per_set(runs: Sequence[SweepRun], stages: Sequence[str]) -> list[SweepRun]:
    """Return one run for each set of artefacts that these stages share."""
    sets = {tuple(stage.directory for stage in Run(run.config).all_stages(stages)): run for run in reversed(runs)}
    return list(sets.values())[::-1]


def _name(sweep: Sweep) -> str:
    return f"rarec-sweep-{sha256_json(str(sweep.directory.absolute()))[:8]}"


def _raise_if_queued(sweep: Sweep) -> None:
    """Raise if jobs of this sweep are in the queue: two tasks must not train the same run."""
    queued = _call("squeue", "--me", "--noheader", "--format=%F", f"--name={_name(sweep)}").split()
    if queued:
        jobs = sorted(set(queued))
        problem = f"{sweep.path}: jobs {', '.join(jobs)} of this sweep are still in the queue"
        raise UserError(problem, f"wait for them, or run scancel {' '.join(jobs)}")


def _submit_array(
    sweep: Sweep, name: str, runs: Sequence[SweepRun], stages: Sequence[str], options: Sequence[str]
) -> str:
    """Submit an array with one task per run; return the job's number."""
    directory = sweep.directory.absolute() / "slurm"
    lines = "".join(f"{' '.join(_override(*field) for field in run.overrides.items())}\n" for run in runs)
    file = directory / f"{name}-{sha256_json(lines)[:8]}.txt"  # named by content: a requeued task reads it again
    write_text(file, lines)
    array = [f"--output={directory}/%A_%a.log", *options, f"--job-name={_name(sweep)}", f"--array=1-{len(runs)}"]
    script = [str(shipped_files() / SCRIPT), str(sweep.base.absolute()), str(file)]
    return _call("sbatch", "--parsable", *array, *script, RAREC_STAGES=" ".join(stages)).strip().partition(";")[0]


def _override(name: str, value: object) -> str:
    return format_override(name, str(Path(str(value)).absolute()) if name in _DIRECTORY_FIELDS and value else value)


def _call(*command: str, **settings: str) -> str:
    """Run one of SLURM's commands with the settings of `launch/slurm/common.sh`; return its output."""
    environment = {"RAREC_HOME": str(Path.cwd()), "RAREC_VENV": sys.prefix, **os.environ, **settings}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not installed", "submit on a machine that has SLURM's commands") from None
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr.strip()}", "see --sbatch, and the manual of sbatch")
    return done.stdout
