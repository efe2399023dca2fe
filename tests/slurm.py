"""A SLURM cluster of two nodes on this host: real daemons with their own key, started in seconds, stopped at the end.

With `slurm` in RAREC_REQUIRE, as in CI, nothing is skipped where SLURM is missing. Root is not needed.
"""

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.ranks import ROOT, free_port

CONFIG = """
ClusterName=rarec
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmdParameters=config_overrides
PrologFlags=Contain
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
MinJobAge=3600
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=all Nodes=ALL Default=YES State=UP
"""
"""A requeued job waits for `cred_expire` seconds. The names of the nodes are not names of hosts."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"
OWN = ("SLURM_", "SBATCH_", "RAREC_")
"""Prefixes of environment variables that jobs of this cluster do not inherit."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_installed = all(shutil.which(program, path=PATH) for program in PROGRAMS)
_required = "slurm" in os.environ.get("RAREC_REQUIRE", "")
needs_slurm = pytest.mark.skipif(not _installed and not _required, reason="needs SLURM: slurm-wlm and munge")


class Cluster:
    """Two nodes, n1 and n2.

    Args:
        root: directory for its files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
        self.environment = {**inherited, "PATH": PATH, "SLURM_CONF": str(root / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def submit(
        self, script: str, *arguments: str, options: Sequence[str] = (), where: Path = ROOT, **settings: str
    ) -> str:
        """Run `sbatch OPTIONS launch/slurm/SCRIPT ARGUMENTS` in `where`, with settings; return the job's number."""
        command = ["sbatch", "--parsable", "--time=60", f"--output={self.root}/said-%j.txt", *options]
        command += [str(ROOT / "launch" / "slurm" / script), *arguments]
        return self.call(command, where, RAREC_VENV=sys.prefix, **settings).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return SLURM's record of a job, or of a task `JOB_TASK` of an array."""
        words = self.call(["scontrol", "--oneliner", "show", "job", job]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str) -> dict[str, str]:
        """Wait for the end of a job; return its record."""
        self.until(lambda: self.job(job)["JobState"] in ENDED, job)
        return self.job(job)

    def until(self, condition: Callable[[], bool], job: str) -> None:
        """Wait until a condition holds, which the job brings about."""
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline, (self.job(job), self.said(job)[-3000:])
            time.sleep(0.2)

    def said(self, job: str) -> str:
        """Return the output of a job, of all its starts."""
        path = Path(self.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def call(self, command: Sequence[str], where: Path = ROOT, **environment: str) -> str:
        """Run one of SLURM's programs; return its output."""
        own = {**self.environment, **environment}
        called = subprocess.run(command, env=own, cwd=where, capture_output=True, text=True, timeout=60)
        assert called.returncode == 0, (command, called.stderr)
        return called.stdout


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start a cluster; at the end, stop its processes and delete its files."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's: the path of a socket must be short
    own = Cluster(root)
    _adopt_orphans(True)
    try:
        _configure(root)
        files = {"key-file": "munge.key", "seed-file": "seed", "pid-file": "munge.pid", "socket": "munge.socket"}
        _start(own, "munged", "--foreground", "--force", *(f"--{name}={root / file}" for name, file in files.items()))
        _await(own, (root / "munge.socket").exists)
        _start(own, "slurmctld", "-D")
        _start(own, "slurmd", "-D", "-N", "n1")
        _start(own, "slurmd", "-D", "-N", "n2")
        _await(own, lambda: own.call(["sinfo", "-h", "-N", "-o", "%T"]).split() == ["idle", "idle"])
        yield own
    finally:
        _end(own)
        _adopt_orphans(False)
        shutil.rmtree(root, ignore_errors=True)


def _configure(root: Path) -> None:
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    for name in ("state", "n1", "n2"):
        (root / name).mkdir()
    host, ports = socket.gethostname().partition(".")[0], [free_port() for _ in range(3)]
    (root / "slurm.conf").write_text(CONFIG.format(root=root, host=host, user=getpass.getuser(), ports=ports))
    (root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def _start(own: Cluster, *command: str) -> None:
    with (own.root / "daemons.log").open("a") as log:
        subprocess.Popen(command, env=own.environment, stdout=log, stderr=log, preexec_fn=_end_with_the_tests)


def _end_with_the_tests() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _await(own: Cluster, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, (own.root / "daemons.log").read_text()[-3000:]
        time.sleep(0.1)


def _adopt_orphans(adopt: bool) -> None:
    """Make orphaned processes children of this one, or stop that: SLURM's `slurmstepd` leaves its parent."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def _end(own: Cluster) -> None:
    """Terminate the daemons, and the jobs that still run."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        left = [process for process in psutil.process_iter() if _is_of(own, process)]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                end(process)
        psutil.wait_procs(left, timeout=5)


def _is_of(own: Cluster, process: psutil.Process) -> bool:
    """Return whether a process is of the cluster, by its environment; `slurmstepd` overwrites that, so by its name."""
    with suppress(psutil.Error, OSError):
        step_daemon = process.ppid() == os.getpid() and process.name().startswith("slurmstepd")
        return step_daemon or process.environ().get("SLURM_CONF") == own.environment["SLURM_CONF"]
    return False
