"""Files shipped beside the code are found in a checkout and in an installed wheel; printed commands name them."""

import os
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from rarec.cluster.definition import load_sweep
from rarec.cluster.slurm import submit
from rarec.config.shipped import shipped_file, shipped_files
from rarec.errors import UserError
from rarec.planning.plan_table import launch_command
from rarec.planning.setup import Cluster, EngineName, TrainingSetup
from tests.conftest import make_world
from tests.sweeps import write_sweep

ROOT = Path(__file__).parents[1]
DDP = "configs/accelerate/ddp.yaml"


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The package as a wheel installs it, in the place of the checkout; the current directory is elsewhere."""
    package = tmp_path / "site-packages" / "rarec"
    package.mkdir(parents=True)
    for module in ("__init__", "errors", "version"):
        shutil.copy(ROOT / "rarec" / f"{module}.py", package)
    shutil.copytree(ROOT / "rarec" / "config", package / "config")
    for folder in ("configs", "launch"):
        shutil.copytree(ROOT / folder, package / "data_files" / folder)
    monkeypatch.setattr("rarec.config.shipped.__file__", str(package / "config" / "shipped.py"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return package


def launched(engine: EngineName, gpus: int) -> list[str]:
    """Return the words of the command that starts a training."""
    return shlex.split(launch_command(TrainingSetup(Cluster.of(gpus, 1, None, "H100"), engine, 1, False, 8)))


def files(words: list[str]) -> list[str]:
    return [value for option, value in pairwise(words) if option.endswith("config_file")]


def test_in_a_checkout_files_are_named_from_its_root(monkeypatch):
    assert shipped_files() == ROOT
    monkeypatch.chdir(ROOT)
    assert shipped_file(DDP) == Path(DDP)
    assert files(launched("3", 8)) == ["configs/accelerate/zero3.yaml"]


def test_outside_a_checkout_commands_name_files_that_exist(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shipped_file(DDP) == ROOT / DDP
    assert files(launched("3", 8)) == [
        f"{ROOT}/configs/accelerate/zero3.yaml",
        f"{ROOT}/configs/deepspeed/zero3.json",
    ]


@pytest.mark.parametrize("engine", ["0", "1", "2", "3", "fsdp2"])
def test_in_an_installed_wheel_commands_name_files_that_exist(installed, engine):
    named = files(launched(engine, 8))
    assert named
    assert all(Path(name).is_file() and Path(name).is_relative_to(installed / "data_files") for name in named)


def test_the_module_prints_the_directory_for_shells(installed):
    environment = {**os.environ, "PYTHONPATH": str(installed.parent)}
    asked = [sys.executable, "-m", "rarec.config.shipped"]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{installed / 'data_files'}\n"


def test_a_package_without_its_files_is_refused(installed):
    shutil.rmtree(installed / "data_files")
    with pytest.raises(UserError, match="data_files") as error:
        shipped_files()
    assert "pip install" in error.value.remedy


@pytest.mark.slow
def test_the_command_starts_the_entry_from_any_directory(monkeypatch, tmp_path):
    """The launcher takes the file and the module; `--help` ends before anything is trained."""
    monkeypatch.chdir(tmp_path)
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launched("0", 1)[1:], "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CONFIG" in done.stdout


def write_command(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_an_installed_wheel_submits_its_own_script_from_the_users_directory(installed, monkeypatch, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    write_command(commands / "squeue", "")
    write_command(commands / "sbatch", f'echo "$RAREC_HOME" "$@" >> {tmp_path}/submitted; echo 1')
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    sweep = load_sweep(write_sweep(make_world(tmp_path / "world"), {"a": None}))
    assert submit(sweep, sweep.runs, "", print) == ["1", "1"]
    for line in (tmp_path / "submitted").read_text().splitlines():
        assert str(installed / "data_files" / "launch" / "slurm" / "sweep.sbatch") in line.split()
        assert line.split()[0] == str(Path.cwd())


@pytest.mark.parametrize("script", ["single_node", "multi_node"])
def test_an_installed_script_launches_from_the_users_directory(installed, tmp_path, script):
    """SLURM's commands are replaced: `srun` runs its command here, and `accelerate` prints its arguments."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    write_command(commands / "srun", 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"')
    write_command(commands / "scontrol", "echo node1")
    write_command(commands / "accelerate", 'printf "%s\\n" "$PWD" "$@"')
    (commands / "activate").write_text("")
    (commands / "python").symlink_to(sys.executable)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RAREC_"))},
        **{"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(installed.parent)},
        **{"RAREC_VENV": str(commands.parent), "SLURM_SUBMIT_DIR": str(Path.cwd()), "SLURM_JOB_ID": "7"},
        **{"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node1", "SLURM_GPUS_ON_NODE": "4"},
    }
    copied = shutil.copy(installed / "data_files" / "launch" / "slurm" / f"{script}.sbatch", tmp_path)  # as SLURM does
    done = subprocess.run(["bash", copied, "mine.yaml", "a.b=1"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    directory, *words = done.stdout.splitlines()
    assert directory == str(Path.cwd())
    assert all(Path(name).is_relative_to(installed / "data_files") and Path(name).is_file() for name in files(words))
    assert len(files(words)) == {"single_node": 1, "multi_node": 2}[script]
    assert words[-5:] == [
        str(installed / "data_files" / "launch" / "train.py"),
        *["--config", "mine.yaml", "a.b=1", "run.num_processes=8"],
    ]
