"""The configuration: strict, errors name the field and the nearest valid name; every shipped file is valid."""

from pathlib import Path

import pytest
import yaml

from rarec.config import dump_config, load_config
from rarec.config.load import read_tree
from rarec.distributed.world import SINGLE
from rarec.errors import UserError
from rarec.training.accelerator import build_engine
from tests.ranks import ENGINES

ROOT = Path(__file__).parents[1]
SMALL = """
run: {dir: runs/x}
prepare:
  interactions: {path: a.csv, user: u, item: i, time: t}
  items: {path: b.csv, item: i, title: t}
llm: {path: x}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_what_is_dumped_reads_back_equal(small, tmp_path):
    config = load_config(small, ["train.lr=2e-3", "llm.revision='12345e67'"])
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_overrides_are_yaml(small):
    config = load_config(
        small, ["train.variants=[per_layer]", "train.lr=1e-3", "ids.sasrec.dim=32", "llm.revision=null"]
    )
    assert config.train.variants == ["per_layer"]
    assert config.train.lr == 0.001
    assert config.ids.sasrec.dim == 32


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", r"train\.epoch=3.*`train\.epoch`; did you mean `epochs`"),
        ("trian.epochs=3", r"`trian`; did you mean `train`"),
        ("ids.sasrec.dims=3", r"`ids\.sasrec\.dims`; did you mean `dim`"),
        ("train.epochs=three", r"field `train.epochs`: .*integer.*'three'"),
        ("train.epochs=2.5", r"field `train.epochs`"),
        ("train.variants=[perlayer]", r"field `train.variants.0`: .*per_layer"),
        ("shards.share=1.5", r"field `shards\.share`"),
        ("prepare.items.title=null", r"field `prepare.items.title`"),
        ("prepare.interactions.position=p", r"`time` and `position`"),
        ("ids.model=import", r"`imported`"),
        ("sources.größe.items=x.npy", r"field `sources.größe"),
        ("sources.id.items=x.npy", r"sources: `id`"),
        ("neighbours.models=[source:image]", r"neighbours\.models: `source:image`.*sources"),
        ("neighbours.models=[source:id]", r"field `neighbours\.models.*taken"),
        ("prompt.item={{title}}", r"prompt\.item"),
        ("train.epochs", r"section\.field=value"),
        ("run.dir.x=3", r"`run\.dir\.x`"),
    ],
)
def test_a_wrong_field_is_named(small, override, message):
    with pytest.raises(UserError, match=message):
        load_config(small, [override])


def test_missing_fields_are_all_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("run: {}\n")
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "empty.yaml")
    assert {"missing field `run.dir`", "missing field `prepare`", "missing field `llm`"} <= {
        line.partition(": ")[2] for line in str(error.value).splitlines()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"bad\.yaml"),
        ("- 1\n", r"bad\.yaml"),
        ("run: {dir: a}\nrun: {dir: b}\n", r"bad\.yaml.*'run'"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "bad.yaml")


def test_merged_fields_give_way_to_a_mappings_own(tmp_path):
    (tmp_path / "merged.yaml").write_text("a: &all {x: 1, y: 2}\nb: {<<: *all, y: 3}\n")
    assert read_tree(tmp_path / "merged.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_is_valid(path):
    assert load_config(path).run.dir == f"runs/{path.stem}"


PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_sets_what_its_file_says(small, path):
    config, plain = load_config(small, [f"preset={path.stem}"]).model_dump(), load_config(small).model_dump()
    for section, fields in read_tree(path).items():
        plain[section] |= fields
    assert config == plain


def test_a_preset_lies_under_the_fields_of_its_file_and_over_those_before_an_override(small, tmp_path):
    (tmp_path / "mine.yaml").write_text("prompt: {title: '{soft:id}', max_history: 3}\ntrain: {epochs: 9}\n")
    file = tmp_path / "named.yaml"
    file.write_text(f"preset: {tmp_path}/mine.yaml\n{small.read_text()}\nprompt: {{max_history: 4}}\n")
    config = load_config(file)
    assert (config.prompt.title, config.prompt.max_history, config.train.epochs) == ("{soft:id}", 4, 9)
    given = [f"preset={tmp_path}/mine.yaml", "train.epochs=2"]
    config = load_config(file, given)
    assert (config.prompt.max_history, config.train.epochs) == (3, 2)


@pytest.mark.parametrize("name", ["llara", "3", "[a]", "none.yaml"])
def test_a_preset_that_is_not_there_is_refused(small, name):
    with pytest.raises(UserError, match="none.yaml" if "yaml" in name else "preset"):
        load_config(small, [f"preset={name}"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_shipped_launch_file(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded, tree = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
    assert loaded.num_processes == tree["num_processes"]
    named = tree.get("deepspeed_config", {}).get("deepspeed_config_file")
    assert named is None or (ROOT / named).is_file()


@pytest.mark.parametrize(
    ("variable", "value", "setting"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend: INDUCTOR"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "use_megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "use_parallelism_config"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing"),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu", "offload_param_device: cpu"),
    ],
)
def test_a_launchers_setting_that_would_be_ignored_is_refused(small, monkeypatch, variable, value, setting):
    config = load_config(small)
    for off in ("NO", "false", "none"):  # as `accelerate launch` writes what is not set
        monkeypatch.setenv(variable, off)
        build_engine(SINGLE, config)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}, sets {setting}(.|\n)*-> "):
        build_engine(SINGLE, config)


def test_no_other_configuration_escapes_these_tests():
    """test_distributed.py trains with the DeepSpeed configurations."""
    folders = {path.parent.name for path in (ROOT / "configs").rglob("*.*") if path.is_file()}
    assert folders == {"runs", "accelerate", "deepspeed", "sweeps", "presets"}
    assert {path.stem for path in (ROOT / "configs" / "deepspeed").iterdir()} < {*ENGINES}


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("run: {dir: Müller}".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml.*\n.*UTF-8"):
        load_config(path)
