"""A sweep on SLURM: an array for what its runs share, and behind it one with a task for each run that is not done."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rarec.artefacts import sha256_json
from rarec.config.load import format_override
from rarec.errors import UserError
from rarec.files import write_text
from rarec.stages.run import Run
from rarec.sweep.expand import Sweep, SweepRun
from rarec.sweep.state import first_to_do

SCRIPT = Path("launch", "slurm", "sweep.sbatch")
SHARED_STAGES = ("prepare", "ids", "shards")
_PLACES = ("run.dir", "run.shared")
_SUBMIT = "submit from the checkout, or name it by RAREC_HOME"


def submit(sweep: Sweep, runs: Sequence[SweepRun], options: str, say: Callable[[str], None]) -> list[str]:
    """Submit what is not done of these runs; returns the numbers of the jobs.

    Args:
        sweep: that they are of.
        runs: which are looked at.
        options: more of sbatch's own, as a shell would read them.
        say: told the jobs.

    Raises:
        UserError: this is no checkout, SLURM is not here or refuses, or jobs of this sweep are still in its queue.
    """
    home = Path(os.environ.get("RAREC_HOME", ".")).absolute()
    if not (home / SCRIPT).is_file():
        raise UserError(f"{home} holds no {SCRIPT}", _SUBMIT)
    due = [run for run in runs if first_to_do(run.config, sweep.stages) is not None]
    if not due:
        say("every run is done: nothing to submit")
        return []
    queue = _Queue(sweep, home, shlex.split(options))
    queue.refuse_twice()
    early = [stage for stage in sweep.stages if stage in SHARED_STAGES]
    late = [stage for stage in sweep.stages if stage not in SHARED_STAGES]
    makers = _makers([run for run in due if first_to_do(run.config, early) is not None])
    jobs = []
    if makers:
        jobs.append(queue.submit("shared", makers, early))
        say(f"job {jobs[0]}: {' '.join(early)}, {_tasks(makers)}")
    if late:
        jobs.append(queue.submit("runs", due, late, after=jobs[:1]))
        say(f"job {jobs[-1]}: {' '.join(late)}, {_tasks(due)}" + (f", after job {jobs[0]}" if makers else ""))
    return jobs


def _makers(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """One run for each set of shards, by whose making all else that is shared comes to be."""
    return list({Run(run.config).directory("shards"): run for run in reversed(runs)}.values())[::-1]


def _tasks(runs: Sequence[SweepRun]) -> str:
    return "1 task" if len(runs) == 1 else f"{len(runs)} tasks"


class _Queue:
    """SLURM, for one sweep."""

    def __init__(self, sweep: Sweep, home: Path, options: Sequence[str]) -> None:
        self.sweep, self.home, self.options = sweep, home, options
        self.directory = sweep.directory.absolute() / "slurm"
        self.name = f"rarec-sweep-{sha256_json(str(sweep.directory.absolute()))[:8]}"

    def refuse_twice(self) -> None:
        """Two tasks must not train the same run."""
        waiting = self._call("squeue", "--me", "--noheader", "--format=%F", f"--name={self.name}").split()
        if waiting:
            jobs = ", ".join(sorted(set(waiting)))
            raise UserError(f"{self.sweep.path}: its jobs {jobs} are still in the queue", "wait, or scancel them")

    def submit(self, what: str, runs: Sequence[SweepRun], stages: Sequence[str], after: Sequence[str] = ()) -> str:
        """An array with one task a run; returns the job's number."""
        lines = "".join(f"{' '.join(map(self._override, run.overrides.items()))}\n" for run in runs)
        file = self.directory / f"{what}-{sha256_json(lines)[:8]}.txt"  # a requeued task reads it again
        write_text(file, lines)
        # not `afterok`, which one failed task breaks for all; a run that lacks what it shares says so itself
        behind = [f"--dependency=afterany:{job}" for job in after]
        command = [
            "sbatch",
            "--parsable",
            f"--output={self.directory}/%A_%a.log",
            *self.options,
            f"--job-name={self.name}",
            f"--array=1-{len(runs)}",
            *behind,
            str(self.home / SCRIPT),
            str(self.sweep.base.absolute()),
            str(file),
        ]
        return self._call(*command, RAREC_STAGES=" ".join(stages)).strip().partition(";")[0]

    def _override(self, field: tuple[str, object]) -> str:
        name, value = field
        return format_override(name, str(Path(str(value)).absolute()) if name in _PLACES and value else value)

    def _call(self, *command: str, **settings: str) -> str:
        own = {"RAREC_HOME": str(self.home), "RAREC_VENV": sys.prefix, **os.environ, **settings}
        try:
            done = subprocess.run(command, env=own, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not here", "submit where SLURM's own commands are") from None
        if done.returncode:
            raise UserError(f"{command[0]} refuses: {done.stderr.strip()}", "see --sbatch, and sbatch's own manual")
        return done.stdout
