"""Submit a sweep to SLURM: an array of jobs for what the runs share, then an array with a task for each unfinished run.

The arrays run `launch/slurm/sweep.sbatch`, which handles preemption; each task reads its overrides from a text file.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rarec.cluster.definition import Sweep, SweepRun
from rarec.cluster.state import first_to_do
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
    queue = _Queue(sweep, shlex.split(options))
    queue.raise_if_queued()
    shared = [stage for stage in sweep.stages if STAGES[stage].shareable]
    own = [stage for stage in sweep.stages if not STAGES[stage].shareable]
    makers = _one_run_per_set([run for run in due if first_to_do(run.config, shared) is not None], shared)
    jobs = []
    if makers:
        jobs.append(queue.submit("shared", makers, shared))
        say(f"job {jobs[0]}: {' '.join(shared)}, {_tasks(makers)}")
    if own:
        jobs.append(queue.submit("runs", due, own, after=jobs[:1]))
        say(f"job {jobs[-1]}: {' '.join(own)}, {_tasks(due)}" + (f", after job {jobs[0]}" if makers else ""))
    return jobs


def _one_run_per_set(runs: Sequence[SweepRun], stages: Sequence[str]) -> list[SweepRun]:
    """Return one run for each set of artefacts that these stages share."""
    sets = {tuple(stage.directory for stage in Run(run.config).all_stages(stages)): run for run in reversed(runs)}
    return list(sets.values())[::-1]


def _tasks(runs: Sequence[SweepRun]) -> str:
    return "1 task" if len(runs) == 1 else f"{len(runs)} tasks"


class _Queue:
    """SLURM's queue, for one sweep.

    Args:
        sweep: sweep to submit.
        options: further options of `sbatch`.
    """

    def __init__(self, sweep: Sweep, options: Sequence[str]) -> None:
        self.sweep, self.options = sweep, options
        self.script = shipped_files() / SCRIPT
        self.directory = sweep.directory.absolute() / "slurm"
        self.name = f"rarec-sweep-{sha256_json(str(sweep.directory.absolute()))[:8]}"

    def raise_if_queued(self) -> None:
        """Raise if jobs of this sweep are in the queue: two tasks must not train the same run."""
        queued = self._call("squeue", "--me", "--noheader", "--format=%F", f"--name={self.name}").split()
        if queued:
            jobs = sorted(set(queued))
            problem = f"{self.sweep.path}: jobs {', '.join(jobs)} of this sweep are still in the queue"
            raise UserError(problem, f"wait for them, or run scancel {' '.join(jobs)}")

    def submit(self, what: str, runs: Sequence[SweepRun], stages: Sequence[str], after: Sequence[str] = ()) -> str:
        """Submit an array with one task per run; return the job's number."""
        lines = "".join(f"{' '.join(map(self._override, run.overrides.items()))}\n" for run in runs)
        file = (
            self.directory / f"{what}-{sha256_json(lines)[:8]}.txt"
        )  # named by content: a requeued task reads it again
        if file.exists() and file.read_text(errors="replace") != lines:
            raise UserError(f"{file} is there, and is not this sweep's", "move it away")
        write_text(file, lines)
        # not `afterok`: one failed task would block all runs; a run whose shared part is missing fails by itself
        dependencies = [f"--dependency=afterany:{job}" for job in after]
        command = [
            "sbatch",
            "--parsable",
            f"--output={self.directory}/%A_%a.log",
            *self.options,
            f"--job-name={self.name}",
            f"--array=1-{len(runs)}",
            *dependencies,
            str(self.script),
            str(self.sweep.base.absolute()),
            str(file),
        ]
        return self._call(*command, RAREC_STAGES=" ".join(stages)).strip().partition(";")[0]

    def _override(self, field: tuple[str, object]) -> str:
        name, value = field
        return format_override(name, str(Path(str(value)).absolute()) if name in _DIRECTORY_FIELDS and value else value)

    def _call(self, *command: str, **settings: str) -> str:
        """Run one of SLURM's commands with the settings of `launch/slurm/common.sh`; return its output."""
        environment = {"RAREC_HOME": str(Path.cwd()), "RAREC_VENV": sys.prefix, **os.environ, **settings}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not installed", "submit on a machine that has SLURM's commands") from None
        if done.returncode:
            remedy = "see --sbatch, and the manual of sbatch"
            raise UserError(f"{command[0]} failed: {done.stderr.strip()}", remedy)
        return done.stdout
