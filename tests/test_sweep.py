"""`rarec sweep`: expansion, invalid files, and that each run is made once, even if the sweep fails or is killed."""

import json
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rarec.cluster.definition import StageName, load_sweep, state_of
from rarec.cluster.local import LOG, last_message
from rarec.config import load_config
from rarec.config.load import format_override, parse_override
from rarec.errors import UserError
from rarec.stages import STAGES
from rarec.stages.run import Run
from rarec.storage.artefacts import MANIFEST, read_sealed
from rarec.storage.files import read_json
from tests.conftest import make_world
from tests.sweeps import begin, sweep, write_sweep

ROOT = Path(__file__).parents[1]
LEARN = {"slow": {"train.lr": 1e-4}, "fast": {"train": {"lr": 1e-2}}}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path)


@pytest.fixture(scope="module")
def unswept(tmp_path_factory) -> Path:
    """A configuration for tests that run nothing."""
    return make_world(tmp_path_factory.mktemp("unswept"))


@pytest.fixture(scope="module", params=[pytest.param("swept", marks=pytest.mark.slow)])
def swept(tmp_path_factory):
    """A finished sweep of two runs, and its output."""
    path = write_sweep(make_world(tmp_path_factory.mktemp("swept")), LEARN)
    return path, sweep(path)


def labels(path: Path, *overrides: str) -> list[str]:
    return [run.label for run in load_sweep(path, overrides).runs]


def stamps(path: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in path.parent.joinpath("all").rglob("*") if file.is_file()}


def steps(path: Path, label: str) -> int:
    log = path.parent / "all" / label / "train" / "per_layer" / "log.jsonl"
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def test_stages_are_those_of_a_run_in_its_order():
    assert list(StageName.__args__) == list(STAGES)


def test_runs_and_seeds_are_expanded_in_the_order_of_the_file(unswept):
    grid = {"grid": {"shards.share": [0.06, 1], "train.variants": [["text_only", "per_layer"]]}, "seeds": [3]}
    path = write_sweep(unswept, {"plain": None, "share": grid}, seeds=[17, 18])
    assert sorted(labels(path)) == [
        "plain/seed-17",
        "plain/seed-18",
        "share/shards.share=0.06,train.variants=text_only,per_layer/seed-3",
        "share/shards.share=1,train.variants=text_only,per_layer/seed-3",
    ]


def test_a_run_has_the_base_its_own_fields_and_those_of_the_command_line_in_that_order(unswept):
    runs = {"a": {"train": {"lr": 0.5, "epochs": 7}, "prepare.spark": {"spark.master": "yarn"}}}
    run = load_sweep(write_sweep(unswept, runs), ["train.epochs=9"]).runs[0]
    assert (run.config.train.lr, run.config.train.epochs, run.config.train.batch_size) == (0.5, 9, 32)
    assert run.config.prepare.spark == {"spark.master": "yarn"}
    assert (run.config.run.dir, run.config.run.seed) == (f"{unswept.parent}/all/a/seed-17", 17)
    assert run.config.run.shared == f"{unswept.parent}/all/shared"
    elsewhere = load_sweep(write_sweep(unswept, runs), ["run.shared=/common"]).runs[0]
    assert elsewhere.config.run.shared == "/common"
    alone = load_sweep(write_sweep(unswept, {"a": {"run.shared": None}})).runs[0]
    assert alone.config.run.shared is None


@pytest.mark.parametrize(
    "value", [0.06, 1e-5, None, True, "", "a b", "1", "ü: {x}", 'say "a" \\ #1', [1, "b c"], {"a": 1}]
)
def test_an_override_is_one_word_and_reads_back_equal(value):
    text = format_override("a.b", value)
    assert len(text.split()) == 1
    assert parse_override(text) == ("a.b", value)


@pytest.mark.parametrize(
    ("runs", "fields", "message"),
    [
        (
            {"a": {"train.epoch": 3}},
            {},
            r"sweep.yaml: run 'a' over .*: unknown field `train.epoch`; did you mean `epochs`",
        ),
        ({"a": {"grid": {"trian.lr": [1]}}}, {}, r"run 'a/trian.lr=1' over .*: unknown field `trian`"),
        ({"a": {"train.lr": "fast"}}, {}, r"run 'a' over .*: field `train.lr`"),
        ({"a": {"train.lr.x": 1, "train": {"lr": 2.0}}}, {}, r"run 'a' over .*: .*"),
        ({"a": {"run.dir": "x"}}, {}, r"sweep.yaml: run 'a': `run.dir`"),
        ({"a": {"run": {"seed": 3}}}, {}, r"run 'a': `run.seed`.*\n  -> .*`seeds`"),
        ({"a": {"grid": {"run.seed": [3]}}}, {}, r"run 'a': `run.seed`"),
        ({"a": {"seeds": [3, 4, 3]}}, {}, r"sweep.yaml: .*a/seed-3\n  -> .*seed"),
        ({"a": None}, {"seeds": [17, 17]}, r"sweep.yaml: .*a/seed-17"),
        ({"a": None}, {"seeds": []}, r"field `seeds`"),
        ({"a": {"grid": {"train.lr": [0.1, 0.1]}}}, {}, r"sweep.yaml: .*a/train.lr=0.1/seed-17"),
        ({"a": {"grid": {"prompt.separator": ["/", "?"]}}}, {}, r"sweep.yaml: .*a/prompt.separator=-/seed-17"),
        ({"a": {"grid": {"train.lr": []}}}, {}, r"field `runs.a.grid.train.lr`"),
        ({"a": {"grid": {"train.lr": [0.1]}, "train.lr": 0.2}}, {}, r"run 'a': field `train.lr`.*grid"),
        ({"a": {"train.lr": 0.1, "train": {"lr": 0.2}}}, {}, r"run 'a': field `train.lr`"),
        ({"shared": None}, {}, r"sweep.yaml: field `runs.shared.*another name"),
        ({"../a": None}, {}, r"sweep.yaml: field `runs.../a.*another name"),
        ({"a": 3}, {}, r"field `runs.a`"),
        ({}, {}, r"field `runs`"),
        ({"a": None}, {"stage": ["train"]}, r"sweep.yaml: unknown field `stage`; did you mean `stages`"),
        ({"a": None}, {"stages": ["evalute"]}, r"field `stages.0`.*'evaluate'"),
        ({"a": None}, {"base": "no.yaml"}, r"sweep.yaml, field `base`: .*no.yaml .*\n  -> .*sweep's file"),
        (
            {"a": {"export.variant": "input"}},
            {"stages": ["train", "export"]},
            r"run 'a' over .*: field `export.variant`.*\n  -> .*train.variants",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(unswept, runs, fields, message):
    path = write_sweep(unswept, runs, **fields)
    with pytest.raises(UserError, match=message):
        load_sweep(path)
    assert not (unswept.parent / "all").exists()


def test_two_runs_of_one_name_and_overrides_that_are_the_sweeps_are_refused(unswept):
    path = write_sweep(unswept, {"a": {"grid": {"train.lr": [0.1]}}})
    for override, message in {
        "run.seed=3": "`run.seed`",
        "train.lr=1": "`train.lr`.*grid",
        "lr": "lr",
    }.items():
        with pytest.raises(UserError, match=message):
            load_sweep(path, [override])
    path.write_text(path.read_text() + "  a: {}\n")
    with pytest.raises(UserError, match=r"sweep.yaml.*'a'"):
        load_sweep(path)


def test_every_shipped_sweep_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in (ROOT / "configs" / "sweeps").glob("*.yaml"):
        assert load_sweep(path).directory == Path(f"runs/sweep-{path.stem}")


def test_the_papers_choices_are_measured_as_they_are_shipped():
    """The sweep cannot start from `paper.yaml`, whose tables are the user's own, so it repeats its sections."""
    measured = load_sweep(ROOT / "configs" / "sweeps" / "beauty_paper.yaml").runs[0].config
    shipped = load_config(ROOT / "configs" / "runs" / "paper.yaml")
    for section in ("ids", "prompt", "shards", "alignment", "lora", "readout", "loss"):
        assert getattr(measured, section) == getattr(shipped, section), section
    assert (measured.train.variants, measured.train.epochs) == (shipped.train.variants, shipped.train.epochs)


@pytest.mark.slow
def test_each_run_is_made_in_its_directory_and_what_they_share_once(swept):
    path, ended = swept
    assert ended.returncode == 0, ended.stderr
    lines = ended.stderr.splitlines()
    assert [line.split()[0] for line in lines] == ["fast/seed-17", "slow/seed-17"]
    assert all(line.split()[1] == "evaluate" and line.endswith("s  done") for line in lines)
    shared = path.parent / "all" / "shared"
    kinds = sorted(file.parent.name.partition("-")[0] for file in shared.rglob(MANIFEST))
    assert kinds == ["ids", "neighbours", "prepare", "shards"]
    for name in ("slow", "fast"):
        run = path.parent / "all" / name / "seed-17"
        assert read_json(run / "evaluation" / "metrics.json")
        assert not (run / "prepare").exists()
        assert "$ rarec run " in (run / LOG).read_text()


def test_the_record_has_time_machine_and_commit_of_each_stage_that_the_run_built(swept):
    path, _ = swept
    records = (path.parent / "all" / name / "seed-17" / "record.json" for name in ("fast", "slow"))
    first, second = (read_sealed(record, "") for record in records)
    assert list(first) == ["prepare", "ids", "neighbours", "shards", "train", "evaluate"]
    assert list(second) == ["train", "evaluate"]
    for stage in (*first.values(), *second.values()):
        assert set(stage) == {"seconds", "hardware", "ranks", "version", "commit"}
        assert stage["seconds"] > 0
        assert "core" in stage["hardware"]


def test_a_second_sweep_builds_nothing_and_loads_nothing_heavy(swept):
    path, _ = swept
    before = stamps(path)
    again = sweep(path, PYTHONPROFILEIMPORTTIME="1")
    skipped = [line for line in again.stderr.splitlines() if "skipped, done before" in line]
    assert (again.returncode, len(skipped), stamps(path)) == (0, 2, before)
    assert not [line for line in again.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "transformers")]
    assert [state_of(run, ["train", "evaluate"]) for run in load_sweep(path).runs] == [("done", "evaluate")] * 2


@pytest.mark.slow
def test_seeds_rank_the_same_users_of_a_subset(world):
    users = []
    loaded = load_sweep(write_sweep(world, {"few": {"evaluate.users": 9}}, seeds=[17, 18]))
    for run in loaded.runs:
        opened = Run(run.config)
        opened.run(loaded.stages)
        users.append(set(pq.read_table(opened.directory("evaluate") / "ranks.parquet").column("user").to_pylist()))
    first, second = users
    assert (first, len(first)) == (second, 9)


def test_the_list_prints_states_and_runs_nothing(swept, unswept):
    path, _ = swept
    assert sweep(path, "--list").stdout.splitlines() == ["fast/seed-17  done", "slow/seed-17  done"]
    fresh = write_sweep(unswept, LEARN)
    listed = sweep(fresh, "--list", "--only", "s*")
    assert (listed.returncode, listed.stdout) == (0, "slow/seed-17  to do\n")
    assert not (unswept.parent / "all").exists()


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=0.3",
        "evaluate.resamples=51",
        "prepare.min_user_interactions=2",
        "llm.path=/elsewhere",
        "ids.sasrec.dim=4",
    ],
)
def test_a_run_is_not_done_by_other_settings(swept, override):
    path, _ = swept
    for run in load_sweep(path, [override]).runs:
        assert state_of(run, ["prepare", "ids", "neighbours", "shards", "train", "evaluate"])[0] == "begun"


def test_damage_is_something_to_do(swept, tmp_path):
    path, _ = swept
    run = load_sweep(path).runs[0]
    done = run.directory / "train" / "per_layer" / "manifest.json"
    whole = done.read_text()
    for harm in (whole[:20], json.dumps({**json.loads(whole), "made_from": {}}), None):
        done.unlink() if harm is None else done.write_text(harm)
        assert state_of(run, ["train", "evaluate"])[0] == "begun"
        done.write_text(whole)
    assert state_of(run, ["train", "evaluate"])[0] == "done"


@pytest.mark.slow
def test_a_run_that_fails_is_named_at_the_end_and_stops_no_other(world):
    none = str(world.parent / "none.npy")
    runs = {"a-bad": {"prepare.items.title": "none"}, "b-good": {}, "c-bad": {"sources.image.items": none}}
    path = write_sweep(world, runs, stages=["prepare", "ids"])
    ended = sweep(path)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["a-bad/seed-17", "b-good/seed-17", "c-bad/seed-17"]
    assert [line.split()[-1] for line in lines[:3]] == ["failed", "done", "failed"]
    assert [line.split()[1] for line in lines[:3]] == ["prepare", "ids", "ids"]
    assert lines[3].startswith("failed: a-bad/seed-17: exit code 2: error: ")
    assert "items.title" in lines[3]
    assert lines[4].startswith("failed: c-bad/seed-17: exit code 2: error: ")
    assert none in lines[4]
    assert " -> " in lines[4]
    mended = sweep(path, "--only", "a-*", "prepare.items.title=nothing")
    assert (mended.returncode, mended.stderr.count("failed: ")) == (1, 1)


@pytest.mark.slow
def test_a_sweep_that_compares_no_variants_needs_none_to_export(world):
    path = write_sweep(world, {"a": {"export.variant": "input"}}, stages=["prepare", "ids"])
    ended = sweep(path)
    assert ended.returncode == 0, ended.stderr
    assert [state_of(run, ["prepare", "ids"]) for run in load_sweep(path).runs] == [("done", "ids")]


@pytest.mark.slow
def test_a_sweep_that_is_killed_resumes(world):
    long = {"train.epochs": 20, "train.validate_every": 20, "train.patience": 1000}
    path = write_sweep(world, {"long": long, "short": None}, stages=["prepare", "ids", "shards", "train"])
    killed = begin(path)
    deadline = time.monotonic() + 120
    while steps(path, "long/seed-17") < 12 and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    before = stamps(path)
    listed = sweep(path, "--list").stdout
    assert "long/seed-17   begun, next: train" in listed
    assert "short/seed-17  to do" in listed
    ended = sweep(path, "train.max_steps=null")
    assert ended.returncode == 0, ended.stderr
    log = (path.parent / "all" / "long" / "seed-17" / LOG).read_text()
    assert log.count("$ rarec run") == 2
    assert "stopped by a signal at step" in log.split("$ rarec run")[1]  # the run ended with the sweep
    shared = [file for file in before if "shared" in file.parts and file.name == MANIFEST]
    assert {file: file.stat().st_mtime_ns for file in shared} == {file: before[file] for file in shared}
    found = path.parent / "all" / "long" / "seed-17" / "train" / "per_layer" / "log.jsonl"
    numbers = [json.loads(line)["step"] for line in found.read_text().splitlines() if '"loss"' in line]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.slow
def test_two_sweeps_at_once_wait_for_each_other(world):
    path = write_sweep(world, {"one": None}, stages=["prepare", "ids"])
    both = [begin(path), begin(path)]
    said = [each.communicate(timeout=300)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    (run,) = load_sweep(path).runs
    assert state_of(run, ["prepare", "ids"]) == ("done", "ids")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_sweep_that_is_stopped_has_its_run_save_first(world, number, code):
    path = write_sweep(world, {"long": {"train.epochs": 100000, "train.validate_every": 100000}})
    stopped = begin(path)
    deadline = time.monotonic() + 120
    while steps(path, "long/seed-17") < 3 and stopped.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(number)
    _, said = stopped.communicate(timeout=60)
    assert stopped.returncode == code
    assert "same command" in said.splitlines()[-1]
    run = path.parent / "all" / "long" / "seed-17"
    assert list((run / "train" / "per_layer" / "checkpoints").glob("step-*"))
    assert "stopped by a signal at step" in last_message(run / LOG)


def test_only_names_that_are_there(unswept):
    path = write_sweep(unswept, LEARN)
    ended = sweep(path, "--only", "quick*")
    assert ended.returncode == 2
    assert "'quick*'" in ended.stderr
    assert "fast, slow" in ended.stderr
    assert sweep(path, "--sbatch", "--time=1").returncode == 2
