"""Helpers of the tests of sweeps: files of small sweeps, and `rarec sweep` as a process."""

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
    "neighbours.models": ["cooccurrence"],
    "train.epochs": 1,
    "train.variants": ["per_layer"],
    "train.stream.workers": 0,
    "evaluate.sanity_checks": False,
    "evaluate.resamples": 50,
}
"""Overrides that make a run of the small world take seconds."""


def write_sweep(config: Path, runs: dict[str, object], **fields: object) -> Path:
    """Write a sweep beside a run configuration, with that as its base, made small; return the sweep's file."""
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
    """Run `rarec sweep` to its end."""
    return subprocess.run(command(path, *arguments), env=own(environment), capture_output=True, text=True, timeout=300)


def begin(path: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start `rarec sweep`."""
    return subprocess.Popen(command(path, *arguments), env=own({}), stderr=subprocess.PIPE, text=True)


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "rarec", "sweep", str(path), *arguments]


def own(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which processes import this checkout from any directory and use one thread."""
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
