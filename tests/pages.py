"""The pages, as tests read them: their fenced blocks, links and commands, and a place where the commands run."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from rarec.config.load import set_field
from tests.commands import Command, run_command
from tests.engines import ENGINES_HERE
from tests.synthetic import write_llm, write_log

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
BIN = Path(sys.executable).parent
SMALL = {
    "ids.sasrec.epochs": 1,
    "prompt.max_history": 2,
    "shards.share": 0.5,
    "train.variants": ["text_only", "per_layer"],
    "train.max_steps": 2,
    "train.validation_users": 40,
    "evaluate.users": 10,
    "evaluate.sanity_checks": False,
    "evaluate.resamples": 50,
    "report.examples": 1,
}
"""Makes a run a matter of seconds."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages() -> list[Path]:
    """Return the pages that people read: those of the root and of `docs/`."""
    return sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language. `bash` is run by tests, `sh` needs a cluster or hours."""
    return [text for found, text in _FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def write_files(page: Path, directory: Path) -> dict[str, str]:
    """Write the Python blocks of a page that begin with their file's name; return the texts by that name."""
    named = {text.partition("\n")[0].removeprefix("# "): text for text in blocks(page, "python")}
    files = {name: text for name, text in named.items() if name.endswith(".py")}
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    importlib.invalidate_caches()
    return files


def prose(page: Path) -> str:
    """Return a page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.DOTALL)


def lines(page: Path, *languages: str) -> list[str]:
    """Return the commands of a page's shell blocks, one a line, without comments."""
    text = [line for language in languages for block in blocks(page, language) for line in block.splitlines()]
    return [line for line in (re.split(r"\s+#", each)[0].strip() for each in text) if line]


def runnable(page: Path) -> list[str]:
    """Return the commands that a test can run here, in the order of the page; a service has a test of its own."""
    skipped = ("make ", "source ", "pip ", "python -m tools", "rarec serve ", "curl ")
    return [
        line
        for line in lines(page, "bash")
        if not line.startswith(skipped) and ("engine=spark" not in line or "spark" in ENGINES_HERE)
    ]


def make_place(directory: Path) -> Path:
    """Make a directory like a checkout's root, with the README's `mine.yaml`, made small, and the data it names."""
    for name in ("configs", "launch"):
        shutil.copytree(ROOT / name, directory / name)
    interactions, items = write_log(directory / "made")
    (directory / "logs").mkdir()
    log = interactions.read_text().replace("user,item,time", "customer,sku,bought_at")
    (directory / "logs" / "november.csv").write_text(log)
    rows = [line.split(",") for line in items.read_text().splitlines()[1:]]
    text = [f'{{"sku": "{sku}", "name": "{name}", "brand": "{brand}", "category": null}}' for sku, name, brand in rows]
    (directory / "catalogue.jsonl").write_text("\n".join(text))
    (directory / "new.jsonl").write_text('{"sku": "new", "name": "amber lamp", "brand": null, "category": "lamps"}')
    tree = mine()
    for name, value in {**SMALL, "llm.path": str(write_llm(directory / "llm"))}.items():
        set_field(tree, name, value)
    (directory / "mine.yaml").write_text(yaml.safe_dump(tree))
    return directory


def mine() -> dict[str, object]:
    """Return the configuration for a user's own data, as the README has it."""
    tree: dict[str, object] = yaml.safe_load(next(block for block in blocks(README, "yaml") if "run:" in block))
    return tree


def shell(command: str, directory: Path, quick: bool = False, timeout: float = 600) -> str:
    """Run a command of a page as a reader would; return what it printed, and fail with all that it said.

    Args:
        command: as on the page.
        directory: where it runs.
        quick: run a `rarec` command without the seconds in which Python imports what it needs.
        timeout: in seconds.
    """
    if quick and command.startswith("rarec ") and not set("|&;<>$`") & set(command):
        outcome = run_command(Command(shlex.split(command)[1:], str(directory), timeout=timeout))
        code, printed, said = outcome.code, outcome.stdout, outcome.stdout + outcome.stderr
    else:
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        words = ["bash", "-c", command]
        result = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, timeout=timeout)
        code, printed, said = result.returncode, result.stdout, result.stdout + result.stderr
    assert code == 0, f"{command}\n{said}"
    return printed
