"""Every end of a command is one line and an exit code: crashes, signals, streams, launchers' variables, permissions."""

import os
import random
import re
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rarec import __version__
from rarec.console.last_resort import CRASH, CRASHED, check_launcher, crash_context, guarded
from rarec.distributed.world import World
from rarec.entry import run_stage
from rarec.errors import EXIT_CODE, UserError
from rarec.storage.directories import new_directory
from tests.commands import Command, run_command
from tests.conftest import make_world

ROOT = Path(__file__).parents[1]
SAYS = r"say('working'); print('result'); print('\u2013 more')"
IMPORTS = (
    "import atexit, os, signal, sys, time; from rarec.console.last_resort import guarded; "
    "from rarec.console.progress import say"
)
DEFAULTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


def python(code: str, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a guarded command in a process of its own, started by a shell with these redirections."""
    script = f"{IMPORTS}\ndef command():\n {code}\nguarded(command)"
    line = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        line, capture_output=True, text=True, errors="replace", env=environment, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("shell", "code", "out", "err"),
    [
        ("", 0, "result\n– more\n", "working\n"),
        ("<&-", 0, "result\n– more\n", "working\n"),
        ("2>&-", 0, "result\n– more\n", ""),
        ("2>/dev/full", 0, "result\n– more\n", ""),
        (">&-", EXIT_CODE, "", "standard output"),
        (">/dev/full", EXIT_CODE, "", "standard output"),
        ("<&- >&- 2>&-", EXIT_CODE, "", ""),
        ("> >(exec true)", 141, "", ""),
    ],
)
def test_a_stream_that_is_closed_full_or_left_ends_in_order(shell, code, out, err):
    wait = "time.sleep(0.3); " if ">(" in shell else ""
    result = python(wait + SAYS, shell)
    assert (result.returncode, result.stdout) == (code, out)
    assert err in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 3


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    path = tmp_path / "mine"
    python(f"file = open({str(path)!r}, 'w'); os.system('echo from a child'); file.close()", ">&- 2>&-")
    assert path.read_text() == ""


def test_a_broken_standard_error_ends_no_work(tmp_path):
    code = f"[say('x' * 9000) for _ in range(50)]; open({str(tmp_path / 'done')!r}, 'w')"
    assert python(code, "2> >(exec true)").returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
        *({"COLUMNS": columns} for columns in ("0", "many", "1000000000")),
    ],
    ids=str,
)
def test_any_encoding_and_terminal_show_all(environment):
    table = "from rich.table import Table; t = Table(chr(8211)); t.add_row(chr(233) + chr(128640))"
    shown = "from rarec.console.progress import Console; Console().print(t); Console(width=110).print(t)"
    result = python(f"{table}; {shown}; {SAYS}", **environment)
    assert result.returncode == 0
    assert result.stderr == "working\n"
    assert "result\n" in result.stdout
    assert result.stdout.endswith(" more\n")


FAILURES = {
    "a defect": "1 / 0",
    "memory": "raise MemoryError",
    "memory of a device": "raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory')",
    "a lot of memory": "bytearray(1 << 60)",
    "depth": "f = lambda: f(); f()",
    "an encoding": "'\\udc80'.encode()",
    "another pipe": "raise BrokenPipeError(32, 'Broken pipe')",
    "end of file": "raise EOFError",
    "no message": "raise AssertionError",
    "lines": "raise ValueError('a' + '\\n' * 50 + 'b' * 20_000)",
    "an import": "import rarec.no_such_module",
    "a group": "raise ExceptionGroup('both', [ValueError(1), KeyError(2)])",
}


@pytest.mark.parametrize("code", FAILURES.values(), ids=FAILURES)
def test_what_nobody_foresaw_is_one_line_that_names_the_file_with_the_traceback(code, tmp_path):
    result = python(f"sys.argv = ['rarec', 'ids', 'x.yaml']; {code}", TMPDIR=str(tmp_path))
    assert result.returncode == CRASHED
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert "\n" not in line
    assert len(line) < 700
    assert line.startswith("error: rarec ids: ")
    report = Path(re.search(r"the traceback is in (\S+)\)", line)[1])
    assert report.parent == tmp_path
    assert "Traceback" in report.read_text()
    assert not list(tmp_path.glob(".*"))


def test_a_command_out_of_memory_names_the_fields_that_take_it_by_stage(tmp_path):
    result = python("sys.argv = ['rarec', 'train', 'x.yaml']; raise MemoryError", TMPDIR=str(tmp_path))
    for field in ("train.batch_size (train)", "negatives of ids.MODEL (ids)", "evaluate.batch_size (evaluate, export)"):
        assert field in result.stderr


@pytest.mark.parametrize("wrapped", [False, True])
def test_too_many_open_files_are_named_whatever_a_reader_makes_of_them(wrapped):
    code = "files = [open(os.devnull) for _ in range(1 << 20)]"
    if wrapped:
        code = (
            f"try: {code}\n except OSError as error: raise UserError(f'x.npy cannot be read: {{error}}', 'rebuild it')"
        )
    result = python(f"from rarec.errors import UserError\n {code}")
    assert result.returncode == EXIT_CODE
    assert "ulimit -n" in result.stderr
    assert "rebuild" not in result.stderr


def test_a_crash_of_a_stage_is_reported_in_its_run_without_secrets(finished, tmp_path, capsys, monkeypatch):
    from rarec.stages import STAGES

    def fail(*_: object) -> None:
        raise RuntimeError("cannot reach postgresql://me:hunter2@host/db?password=hunter3")

    monkeypatch.setattr(STAGES["prepare"], "build", fail)
    monkeypatch.setenv("HUNTER", "hunter4")
    monkeypatch.setattr(sys, "argv", ["rarec", "prepare", str(finished), "x=sql://me:hunter5@host"])
    with pytest.raises(SystemExit) as end:
        guarded(lambda: run_stage("prepare", finished, [f"run.dir={tmp_path / 'run'}"]))
    assert end.value.code == CRASHED
    line = capsys.readouterr().err
    assert line.startswith("error: prepare: RuntimeError: ")
    path = tmp_path / "run" / CRASH
    assert str(path) in line
    report = path.read_text()
    for fact in (__version__, f"rarec prepare {finished}", "stage: prepare", f"configuration: {finished}", "in fail"):
        assert fact in report
    assert "hunter" not in report + line


def test_a_file_of_the_users_with_the_name_of_the_report_stays(tmp_path, capsys):
    mine = tmp_path / CRASH
    mine.write_text("mine")

    def fail() -> None:
        crash_context["directory"] = tmp_path
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(SystemExit):
            guarded(fail)
    assert mine.read_text() == "mine"
    assert "rarec-crash-" in capsys.readouterr().err
    mine.unlink()
    for _ in range(2):  # its own is replaced
        with pytest.raises(SystemExit):
            guarded(fail)
    assert str(mine) in capsys.readouterr().err


def test_nothing_is_printed_after_the_last_line():
    """Destructors and exit handlers may fail after an error."""
    broken = "type('Broken', (), {'__del__': lambda self: 1 / 0})()"
    result = python(f"import atexit; atexit.register(lambda: 1 / 0); half_made = {broken}; raise MemoryError")
    assert result.returncode == CRASHED
    (line,) = result.stderr.splitlines()
    assert "MemoryError" in line


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("times", [1, 5])
def test_a_signal_ends_in_order_however_often_it_comes(name, times, tmp_path):
    left = str(tmp_path / "left")
    code = (
        f"\n try:\n  open({left!r}, 'w'); print('ready', flush=True); time.sleep(60)"
        f"\n except Exception: pass\n finally:\n  os.unlink({left!r})"
    )
    script = f"{IMPORTS}; {DEFAULTS}\ndef command():{code}\nguarded(command)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "ready\n"
        for _ in range(times):
            process.send_signal(getattr(signal, name))
        try:
            err = process.communicate(timeout=5)[1]
        except subprocess.TimeoutExpired:  # Python saw it in the microsecond before it slept, and sleeps until the next
            process.send_signal(getattr(signal, name))
            err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + getattr(signal, name)
    assert len(err.splitlines()) == 1
    assert err.endswith("run the same command to resume\n")
    assert not Path(left).exists()


def test_an_error_that_a_library_makes_of_an_interrupt_is_an_interrupt():
    code = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)"
    result = python(f"\n try:\n  {code}\n except BaseException:\n  raise RuntimeError('Query interrupted')")
    assert result.returncode == 143
    assert "SIGTERM" in result.stderr


def test_an_interrupt_on_the_way_into_a_with_leaves_nothing_aside(tmp_path):
    lines = [
        "from rarec.storage.directories import Path, new_directory",
        "def trace(frame, event, _):",
        "  if event == 'return': sys.settrace(None); os.kill(os.getpid(), signal.SIGTERM)",
        "  return trace",
        "atexit.register(os._exit, 7)",  # at once: Python's own end would tidy up as well
        f"made = new_directory(Path({str(tmp_path)!r}) / 'made')",
        "sys.settrace(lambda frame, *_: trace if frame.f_back.f_code.co_name == 'command' else None)",
        "with made: pass",
    ]
    assert python("\n ".join(["", *lines])).returncode == 7
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_interrupted_at_any_moment_leaves_nothing_half_written(finished, tmp_path):
    moments = random.Random(5)
    command = Command(["run", str(finished), f"run.dir={tmp_path / 'run'}", "train.epochs=1"], str(tmp_path))
    for number in [signal.SIGINT, signal.SIGTERM] * 4:
        moment = moments.choice([moments.uniform(0.05, 0.5), moments.uniform(0.5, 5)])
        ended = run_command(replace(command, kill_after=(number, moment)))
        assert ended.code in (0, 128 + number), ended.stderr
        assert "Traceback" not in ended.stderr
        assert ended.code == 0 or ended.stderr.endswith("run the same command to resume\n")
        assert not list(tmp_path.rglob("*.aside-*"))
    assert run_command(command).code == 0


NONSENSE = ["", " ", "abc", "-1", "1.5", "1e3", "0x1", "٣", "1000000000", "9" * 400, "+1", "01"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", NONSENSE)
def test_a_launchers_variable_of_nonsense_is_named(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        guarded(lambda: pytest.fail("it ran"))
    assert end.value.code == EXIT_CODE
    problem, remedy = capsys.readouterr().err.splitlines()
    assert name in problem
    assert f"unset {name}" in remedy


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("1", None), ("0", "0")])
def test_a_rank_beyond_the_world_is_named(rank, size, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        check_launcher()


def test_what_launchers_set_passes(monkeypatch):
    check_launcher()
    for name, value in {"RANK": "7", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    check_launcher()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_in_a_destructor_is_not_lost(number):
    dying = f"type('Dying', (), {{'__del__': lambda _: os.kill(os.getpid(), {int(number)})}})()"
    result = python(f"{dying}; time.sleep(30); print('went on')")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (128 + number, "", 1), result.stderr


class Pair(World):
    """Two ranks, of which the other one has met an error, or nothing."""

    def exchange(self, text: str) -> list[str]:
        return [text, ""]


def test_an_error_without_a_message_is_not_lost_between_ranks():
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Pair(size=2).run_on_all(fail)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o027])
def test_tensors_and_directories_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        with new_directory(tmp_path / "artefact") as temporary:
            (temporary / "inner").mkdir()
            save_file({"x": torch.zeros(2)}, temporary / "inner" / "weights.safetensors")
            (temporary / "manifest.json").write_text("{}")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert_modes(tmp_path / "artefact", mask)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "mask"), [("run", 0o077), ("prepare", 0o002)])
def test_every_file_follows_the_umask(stage, mask, tmp_path):
    config = make_world(tmp_path)
    assert run_command(Command([stage, str(config)], str(tmp_path), umask=mask)).code == 0
    assert_modes(tmp_path / "run", mask)


def assert_modes(root: Path, mask: int) -> None:
    paths = [root, *root.rglob("*")]
    assert len(paths) > 3
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
