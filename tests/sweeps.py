"""Sweeps over a small world, for tests: their files, and `rarec sweep` as a process."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from rarec.config.load import read_tree, set_field
from tests.ranks import ROOT

SMALL = {
    "run.device": "cpu",
    "ids.sasrec.epochs": 1,
    "train.epochs": 1,
    "train.variants": ["per_layer"],
    "train.stream.workers": 0,
    "evaluate.sanity_checks": False,
    "evaluate.resamples": 50,
}
"""Overrides that make a run of the small world take seconds."""


def write_sweep(config: Path, runs: dict[str, object], **fields: object) -> Path:
    """A sweep beside a run configuration, of which it makes small runs; returns its file."""
    small = config.with_name("small.yaml")
    if not small.exists():
        tree = read_tree(config)
        for name, value in SMALL.items():
            set_field(tree, name, value)
        small.write_text(yaml.safe_dump(tree))
    path = config.with_name("sweep.yaml")
    path.write_text(yaml.safe_dump({"dir": str(config.parent / "all"), "base": small.name, **fields, "runs": runs}))
    return path


def sweep(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`rarec sweep` to its end."""
    return subprocess.run(command(path, *arguments), env=own(environment), capture_output=True, text=True, timeout=300)


def begin(path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`rarec sweep`, under way."""
    return subprocess.Popen(command(path, *arguments), env=own({}), stderr=subprocess.PIPE, text=True)


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rarec", "sweep", str(path), *arguments]


def own(environment: dict[str, str]) -> dict[str, str]:
    """This checkout is what processes import, wherever they run; a thread is enough for tiny tensors."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
