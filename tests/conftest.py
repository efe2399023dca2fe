"""A small world on disk, and one finished run over it, made once for all tests."""

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pytest
import torch
from hypothesis import settings

import rarec
from rarec.data.engines import PrepareEngine
from rarec.data.engines.duckdb_engine import DuckDBEngine
from tests.engines import ENGINES as PREPARE_ENGINES
from tests.engines import start
from tests.synthetic import write_llm, write_log

if TYPE_CHECKING:
    from tests.tiny_runs import World

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also what tests start is faster on one thread
# Spark on tables of a few rows: to compile better, or to collect garbage on more threads, takes longer than it saves
os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # in the background, or under nohup: what is started inherits it
        signal.signal(number, handler)
settings.register_profile("rarec", deadline=None)  # a busy machine fails no test
settings.load_profile("rarec")

TOOLS = str(Path(__file__).parents[1] / "tools")
CONFIG = """
run: {{dir: {root}/run}}
prepare:
  interactions: {{path: {root}/log/interactions.csv, user: user, item: item, time: time}}
  items: {{path: {root}/log/items.csv, item: item, title: title, text: [brand]}}
ids: {{holdout: 0.0, sasrec: {{dim: 16, epochs: 8, negatives: 16, batch_size: 32, dropout: 0.0}}}}
llm: {{path: {root}/llm}}
shards: {{samples_per_shard: 64, share: 0.7}}
train: {{batch_size: 32, epochs: 2, validate_every: 4, variants: [text_only, per_layer], validation_users: 30}}
evaluate: {{resamples: 200}}
export: {{variant: per_layer+id+cheap}}
report: {{examples: 2}}
"""


ENGINES = {"needs PySpark": "spark", "needs SLURM": "slurm"}
LONG = "slurm faults docs distributed remedies elastic formats readme engines sweep bench".split()
"""Files that take minutes, longest first. They begin: no worker is left with one when the others have ended."""


def pytest_xdist_auto_num_workers() -> int:
    """Start half as many workers again as there are cores: many tests wait for a process, the disk or a clock."""
    return max(1, (os.cpu_count() or 1) * 3 // 2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of Spark and SLURM, those that are skipped without them; put the long files first."""
    for item in items:
        for skip in item.iter_markers("skipif"):
            for reason, marker in ENGINES.items():
                if skip.kwargs["reason"].startswith(reason):
                    item.add_marker(marker)
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny tensors are faster on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A command sets its signals for good, because its process ends with it; here the tests go on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=["local", "nfs"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as they are here, and as on NFS: who would lock a file against all others has it open for writing."""
    local = fcntl.flock

    def flock(file: int | BinaryIO, operation: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        reads_only = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if reads_only and operation & fcntl.LOCK_EX and not stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        local(file, operation)

    if request.param == "nfs":
        monkeypatch.setattr(fcntl, "flock", flock)


def make_world(root: Path, kind: str = "bert") -> Path:
    """A log, a language model and a configuration in `root`; returns the configuration."""
    write_log(root / "log")
    write_llm(root / "llm", kind)
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root=root))
    return config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a finished run; tests read it and change nothing."""
    from rarec.entry import open_run

    config = make_world(tmp_path_factory.mktemp("world"))
    open_run(config).run()
    return config


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> "World":
    """Runs over a tinier world that are new, half built and finished, to be copied and harmed."""
    from tests.tiny_runs import World

    return World(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder and a tiny decoder of three blocks, by architecture."""
    root = tmp_path_factory.mktemp("models")
    return {kind: write_llm(root / kind, kind, blocks=3) for kind in ("bert", "llama")}


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run up to its shards, over a tiny Llama."""
    config = make_world(tmp_path_factory.mktemp("decoder"), "llama")
    from rarec.entry import open_run

    open_run(config, ["run.device=cpu"]).run(["prepare", "ids", "neighbours", "shards"])
    return config


@pytest.fixture(params=PREPARE_ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PrepareEngine]:
    """Every engine of preparation, one after the other."""
    opened = start(request.param, tmp_path / "spill")
    yield opened
    opened.close()


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[PrepareEngine]:
    """DuckDB alone, for what no engine does otherwise."""
    opened = DuckDBEngine(tmp_path / "spill")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def run(finished: Path) -> Any:
    """The finished run, opened."""
    from rarec.entry import open_run

    return open_run(finished)


@pytest.fixture(scope="module")
def recommender(run: Any) -> Any:
    """The recommender of its bundle."""
    return rarec.load(run.directory("export"))
