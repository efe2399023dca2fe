"""The wheel, installed beside nothing else of this project: its commands work from any directory."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.synthetic import write_llm

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def call(*arguments: str, where: Path, **environment: str) -> str:
    """Run Python with these arguments and return its standard output."""
    own = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=where, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the wheel is installed to."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels), str(ROOT)]
    call("-m", "pip", *build, where=wheels)
    wheel = next(wheels.glob("rarec-*.whl"))
    call("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), where=wheels)
    return target


@pytest.fixture
def rarec(installed, tmp_path) -> Callable[..., str]:
    """Run the installed command in an empty directory, and return what it prints."""
    return lambda *arguments: call("-m", "rarec", *arguments, where=tmp_path, PYTHONPATH=str(installed))


def texts(tree: Any) -> Iterator[str]:
    """Yield every text of a configuration."""
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from texts(value)
    elif isinstance(tree, str):
        yield tree


def test_the_wheel_has_the_examples_configurations_and_scripts(installed):
    for folder in ("configs", "launch"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        shipped = installed / "rarec" / "data_files"
        assert [path for path in files if not (shipped / path.relative_to(ROOT)).exists()] == []
    for path in (installed / "rarec" / "data_files" / "configs" / "runs").glob("*.yaml"):
        own = [text for text in texts(yaml.safe_load(path.read_text())) if text.startswith("package:rarec/")]
        assert all((installed / text.removeprefix("package:")).exists() for text in own), path
    assert (installed / "rarec" / "py.typed").exists()
    assert (installed / "rarec" / "report" / "report.html.j2").exists()


def test_the_package_is_that_of_the_wheel_and_not_of_the_checkout(installed, tmp_path):
    where = call("-c", "import rarec; print(rarec.__file__)", where=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.strip()) == installed / "rarec" / "__init__.py"


def test_help_and_doctor_need_nothing_beside_the_wheel(rarec):
    assert "rarec run CONFIG" in " ".join(rarec("--help").split())
    assert "torch" in rarec("doctor")


def test_init_copies_from_the_wheel(rarec, tmp_path):
    assert "rarec run mine.yaml" in rarec("init", "here")
    for name in ("configs/accelerate/zero3.yaml", "configs/deepspeed/zero3.json", "launch/slurm/multi_node.sbatch"):
        assert (tmp_path / "here" / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_commands_that_plan_prints_name_files_that_exist(installed, rarec, tmp_path):
    write_llm(tmp_path / "llm", "llama")
    rarec("init", ".", "--example", "mine")
    (tmp_path / "configs").rename(tmp_path / "not-here")
    options = ["--gpus", "8", "--zero", "3", "--memory", "80GB"]
    printed = rarec("plan", "mine.yaml", f"llm.path={tmp_path}/llm", "ids.sasrec.dim=16", *options)
    command = next(line for line in printed.splitlines() if "accelerate launch" in line)
    words = shlex.split(command)
    named = [Path(value) for option, value in pairwise(words) if option.endswith("config_file")]
    assert len(named) == 2
    assert all(path.is_file() and path.is_relative_to(installed / "rarec" / "data_files") for path in named)
    assert words[words.index("-m") :][:4] == ["-m", "rarec", "train", "mine.yaml"]
