"""Bundles that vLLM serves, and vLLM itself, in an environment of its own: `make test-vllm`."""

import os
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import rarec
from rarec.bundle.recommender import Recommender
from rarec.entry import open_run
from rarec.export import write_targets
from tests.conftest import CONFIG
from tests.ranks import free_port
from tests.synthetic import write_llm, write_log

PYTHON = os.environ.get("RAREC_VLLM", "")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="needs vLLM in an environment of its own: make test-vllm")
SMALL = ["run.device=cpu", "evaluate.sanity_checks=false", "train.max_steps=30", "readout.size=16"]
BUNDLES = {
    "every block, mean": ("llama", "train.variants=[per_layer] export.variant=per_layer+id+cheap"),
    "keys with a norm": ("qwen3", "train.variants=[per_layer] export.variant=per_layer"),
    "LoRA, last, words before": (
        "llama",
        "train.variants=[per_layer_lora] export.variant=per_layer_lora+id+cheap readout.pool=last "
        "prompt.user=Taste:{soft:id}{history}.",
    ),
    "text only": ("llama", "train.variants=[text_only] export.variant=text_only+id+cheap"),
    "bfloat16, LoRA": (
        "llama",
        "llm.dtype=bfloat16 train.variants=[per_layer_lora] export.variant=per_layer_lora+id+cheap",
    ),
    "input, at titles, LoRA": (
        "llama",
        "preset=llara_input train.variants=[input_lora] export.variant=input_lora+id+cheap",
    ),
}
"""By what is special about it: kind of the language model, and settings."""


@dataclass(frozen=True)
class Served:
    """A bundle and its folder for vLLM.

    Attributes:
        recommender: over the bundle, in float32.
        folder: of `--to vllm`.
    """

    recommender: Recommender
    folder: Path


def bundle(root: Path, kind: str, overrides: str) -> Recommender:
    """Train a bundle whose heads are as large as vLLM wants them on a CPU."""
    write_log(root / "log")
    write_llm(root / "llm", kind, hidden=128)
    (root / "run.yaml").write_text(CONFIG.format(root=root))
    run = open_run(root / "run.yaml", [*SMALL, *overrides.split()])
    run.run(["prepare", "ids", "neighbours", "shards", "train", "evaluate", "export"])
    return rarec.load(run.directory("export"), device="cpu")


def served(root: Path, name: str) -> Served:
    """Train a bundle, and write its folder."""
    recommender = bundle(root, *BUNDLES[name])
    write_targets(recommender, ["vllm"], root / "served", say=lambda line: None)
    return Served(rarec.load(recommender.bundle.directory, device="cpu"), root / "served")


def environment() -> dict[str, str]:
    """Return the environment of vLLM on two cores."""
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    path = f"{Path(PYTHON).absolute().parent}:{os.environ['PATH']}"
    return {**os.environ, **own, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PATH": path}


@contextmanager
def server(folder: Path, *options: str) -> Iterator[str]:
    """Start vLLM by the folder's script; yield its address. Raises as `listening` does."""
    port = free_port()
    command = ["sh", str(folder / "serve.sh"), "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
    with listening(command, port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def listening(command: list[str], port: int, directory: Path | None = None) -> Iterator[None]:
    """Run a command that starts vLLM, until it listens; end it afterwards.

    Raises:
        RuntimeError: it ends before it listens; the message is what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        own = {"env": environment(), "cwd": directory, "stdout": said, "stderr": said, "start_new_session": True}
        process = subprocess.Popen(command, **own)
        try:
            while not _listens(port):
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(said.read())
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(60)


def _listens(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        return bool(answer.status == 200)
    return False
