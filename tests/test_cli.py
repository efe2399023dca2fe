"""The command line: standard output and error, exit codes, help."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

import rarec
from rarec import cli
from rarec.cli import app
from rarec.console.last_resort import guarded
from rarec.console.progress import say
from rarec.entry import open_run, run_stage
from rarec.errors import EXIT_CODE, UserError
from rarec.stages import STAGES

ROOT = Path(__file__).parents[1]
RAREC = Path(sys.executable).parent / "rarec"


def refused(capsys: pytest.CaptureFixture[str], command) -> str:
    """Run a command that must end with exit code 2 and return its message."""
    with pytest.raises(SystemExit) as end:
        guarded(command)
    assert end.value.code == EXIT_CODE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


def test_help_shows_every_stage_in_order_and_each_names_the_next_command():
    page = CliRunner().invoke(app, ["--help"], terminal_width=200).output
    places = [re.search(rf"^\W*{name} ", page, re.MULTILINE) for name in STAGES]
    assert all(places)
    starts = [place.start() for place in places]
    assert starts == sorted(starts)
    for name, following in zip(STAGES, [*list(STAGES)[1:], None], strict=True):
        text = " ".join(CliRunner().invoke(app, [name, "--help"]).output.split())
        assert "Next: " in text
        assert following is None or following in text.split("Next: ")[1].split("Arguments")[0]


@pytest.mark.parametrize("behind", [[], ["run"], ["WRONG"]])
def test_version_names_rarec_and_its_stack_whatever_is_behind_it(behind):
    lines = CliRunner().invoke(app, ["--version", *behind]).output.splitlines()
    assert lines[0].startswith("rarec ")
    assert {"torch", "transformers", "accelerate"} <= {line.split()[0] for line in lines}


@pytest.mark.slow
def test_recommend_prints_items_alone_on_standard_output(finished, capsys, monkeypatch):
    bundle = str(open_run(finished).directory("export"))
    monkeypatch.setattr(sys, "argv", ["rarec", "recommend", bundle, "--history", "i001,i002", "-k", "3"])
    guarded(cli.command)
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3
    assert all(re.fullmatch(r"i\d{3}", item) and item.removeprefix("i").lstrip("0") in title for item, title, _ in rows)


def test_a_user_error_names_the_command_to_type_and_makes_nothing(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rarec", "ids", str(finished), f"run.dir={tmp_path / 'none'}"])
    message = refused(capsys, cli.command)
    assert message.startswith(f"error: {tmp_path / 'none' / 'prepare'} has no manifest.json\n")
    assert "rarec prepare CONFIG" in message
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_script_that_accelerate_launches_ends_in_the_same_way(finished, tmp_path):
    words = [f"run.dir={tmp_path / 'x'}", f"--config={finished}"]  # in any order
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == EXIT_CODE
    assert "Traceback" not in result.stderr
    assert "rarec shards CONFIG" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "CONFIG", "train.epoch=3"], "`train.epoch`; did you mean `epochs`"),
        (["run", "CONFIG", "train.epochs=many"], "override 'train.epochs=many': field `train.epochs`"),
        (["run", "CONFIG", "prompt.user={soft:id} {history}"], 'prompt.user="..."'),
        (["run", "."], "configuration '.' "),
        (["sweep", "x.yaml", "--list", "--slurm"], "--list"),
        (["run", "CONFIG", "epochs"], "section.field=value"),
        (["run", "CONFIG", "export.variant=input"], "field `export.variant`"),
        (["recommend", "CONFIG", "--user", "7"], "--log FILE"),
    ],
)
def test_wrong_arguments_are_named(finished, capsys, monkeypatch, arguments, match):
    monkeypatch.setattr(sys, "argv", ["rarec", *(str(finished) if a == "CONFIG" else a for a in arguments)])
    assert match in refused(capsys, cli.command)


def test_paths_with_brackets_are_no_markup(capsys):
    def fail() -> None:
        say("read [bold]x[/nothing]")
        raise UserError("runs/[red]a[/b] is corrupt")

    with pytest.raises(SystemExit):
        guarded(fail)
    assert capsys.readouterr().err == "read [bold]x[/nothing]\nerror: runs/[red]a[/b] is corrupt\n"


@pytest.mark.parametrize(
    ("number", "named"),
    [(errno.ENOSPC, "run.dir"), (errno.EDQUOT, "quota"), (errno.EACCES, "run.dir"), (errno.EROFS, "run.dir")],
)
def test_trouble_with_the_machine_is_one_message(capsys, number, named):
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    message = refused(capsys, fail)
    problem, remedy = message.split("->")
    assert "/some/file" in problem
    assert named in remedy


def test_a_file_in_the_place_of_the_run_is_named(finished, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    message = refused(capsys, lambda: run_stage("prepare", finished, [f"run.dir={tmp_path / 'run'}"]))
    assert str(tmp_path / "run") in message
    assert (tmp_path / "run").read_text() == "mine"


def test_links_that_go_round_in_a_circle_are_named(finished, tmp_path, capsys):
    circle = tmp_path / "run" / "prepare"
    circle.parent.mkdir()
    circle.symlink_to(circle)
    message = refused(capsys, lambda: open_run(finished, [f"run.dir={tmp_path / 'run'}"]).make("prepare"))
    assert str(circle) in message.replace("\n", "")
    assert "move it away" in message
    assert circle.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "named", "remedy"),
    [
        (["trian"], "'train'", "rarec --help"),
        (["run", "x.yaml", "--frsh"], "--fresh", "rarec run --help"),
        (["run"], "config", "rarec run --help"),
        (["recommend", "bundle", "--user", "1", "-k", "many"], "-k", "rarec recommend --help"),
        (["\x1b[31m" + 9_000 * "x"], "\\x1b[31m", "rarec --help"),
    ],
)
def test_a_mistyped_command_is_one_line_with_the_nearest_name(capsys, monkeypatch, arguments, named, remedy):
    monkeypatch.setattr(sys, "argv", ["rarec", *arguments])
    problem, hint = refused(capsys, cli.command).splitlines()
    assert named in problem
    assert remedy in hint
    assert len(problem) < 400


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [([], EXIT_CODE, "Usage"), (["--help"], 0, "Usage"), (["run", "--help"], 0, "stages"), (["--version"], 0, "torch")],
)
def test_help_is_a_success_where_it_was_asked_for(capsys, monkeypatch, arguments, code, shown):
    monkeypatch.setattr(sys, "argv", ["rarec", *arguments])
    with pytest.raises(SystemExit) as end:
        guarded(cli.command)
    assert end.value.code == code
    assert shown in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_resumes(finished, tmp_path):
    command = [str(RAREC), "run", str(finished), f"run.dir={tmp_path / 'run'}", "ids.sasrec.epochs=100000"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job inherits a SIGINT that is ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "prepare").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.rstrip().endswith("run the same command to resume")
    assert "Traceback" not in err


def test_reading_a_run_writes_nothing_into_it(finished, capsys):
    root = Path(open_run(finished, []).config.run.dir)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    run_stage("evaluate", finished, [])
    cli.recommend(root / "bundle", "i001,i002")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(
    "options",
    [
        ["mine.yaml", "--push", "me/mine"],
        ["mine.yaml", "--out", "there", "--depth", "3"],
        ["bundle", "run.seed=3", "--to", "vectors", "--out", "there"],
        ["bundle", "--fresh", "--to", "vectors", "--out", "there"],
    ],
)
def test_an_option_of_export_that_would_do_nothing_is_refused(options):
    found = CliRunner().invoke(cli.app, ["export", *options])
    assert isinstance(found.exception, UserError)
    assert "--to" in found.exception.problem
    assert "rarec export" in found.exception.remedy


def test_verify_reads_what_was_checked_before(finished, tmp_path):
    root = Path(shutil.copytree(open_run(finished, []).config.run.dir, tmp_path / "run"))
    cli.run(finished, [f"run.dir={root}"], stages="neighbours")
    table = next(root.glob("neighbours/*/neighbours.parquet"))
    before, content = table.stat(), bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk damages it, unseen
    cli.run(finished, [f"run.dir={root}"], stages="neighbours")
    with pytest.raises(UserError, match=re.escape(str(table))):
        cli.run(finished, [f"run.dir={root}"], stages="neighbours", verify=True)


def test_the_results_end_with_whole_paths_the_best_variant_and_the_next_step(finished, capsys):
    run = open_run(finished)
    cli.show_results(run)
    out = capsys.readouterr().out
    assert f"\nreport: {run.directory('report') / 'report.html'}\n" in out
    assert f"\nbundle: {run.directory('export')}\n" in out
    assert f"\nfigures: {run.directory('evaluate') / 'metrics.json'}\n" in out
    assert "Deploy: " in out
    *_, after, first, second, third, more = out.splitlines()
    assert after.startswith("After ")
    history = more.split("--history ")[1]
    assert more.startswith(f"More: rarec recommend {run.directory('export')} --history ")
    expected = rarec.load(run.directory("export")).recommend([history.split(",")], 3)[0]
    assert [line.split()[0] for line in (first, second, third)] == [one.item for one in expected]
