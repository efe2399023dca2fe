"""Parts of the user's own: the code of `docs/extend.md` as it stands, in a tiny world, and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import rarec
from rarec.cluster.definition import load_sweep
from rarec.config import RunConfig
from rarec.config.load import load_config
from rarec.config.registry import KINDS
from rarec.errors import UserError
from rarec.evaluation.results import part_title, variant_title
from rarec.export import write_targets
from rarec.ids.source import open_source
from rarec.ids.validation import Validation
from rarec.planning.setup import Cluster
from rarec.stages import STAGES
from rarec.stages.run import Run
from rarec.stages.stage import Stage
from rarec.stages.train import plan
from rarec.storage.artefacts import read_manifest
from tests.conftest import CONFIG, make_world
from tests.pages import BIN, DOCS, blocks, write_files
from tests.ranks import finish, losses
from tests.recommending import recommend

PAGE = DOCS / "extend.md"
SECTIONS = [yaml.safe_load(text) for text in blocks(PAGE, "yaml")]
DECAY, MAP = "my_package.models:Decay", "my_package.maps:ResidualMLP"
OWN_NEIGHBOURS = "neighbours={models: [my_package.neighbours:Conditional], "
AS_IN_PYTHON = ["ids.settings.decay=0.9"]
"""The override of the page's Python lines."""
SHORT = ["train.variants=[per_layer]", "train.max_steps=3", "train.validate_every=3"]


def section(name: str) -> dict:
    """Return a section of the page's YAML."""
    return next(tree[name] for tree in SECTIONS if name in tree)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with the page's files and a `mine.yaml` that names its ID model, and run its Python lines."""
    directory = tmp_path_factory.mktemp("extend")
    make_world(directory)
    write_files(PAGE, directory)
    tree = yaml.safe_load(CONFIG.format(root=directory))
    (directory / "mine.yaml").write_text(yaml.safe_dump({**tree, "ids": section("ids")}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(blocks(PAGE, "python")[-1], {})
    return directory


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


def opened(*overrides: str, say=lambda line: None) -> Run:
    return Run("mine.yaml", [*AS_IN_PYTHON, *overrides], say=say)


def copied(directory: Path, *overrides: str) -> Run:
    """Return a run in another directory, with what was prepared before training."""
    run = opened(f"run.dir={directory}", *overrides)
    for name in ("prepare", "ids", "neighbours", "shards"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(opened().root / name)
    return run


# -- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "most"), [("models", 30), ("maps", 20)])
def test_the_examples_are_short(tmp_path, file, most):
    text = write_files(PAGE, tmp_path)[f"my_package/{file}.py"]
    assert len(text.splitlines()) - 1 <= most  # without the line of its name


def test_the_table_has_every_kind_of_part():
    text = PAGE.read_text()
    for name, kind in KINDS.items():
        assert f"`{kind.field}`" in text
        assert f"`rarec.{name}`" in text
        assert all(f"`{built_in}`" in text for built_in in kind.built_in)


# -- an ID model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_id_model_of_ones_own_goes_through_every_stage(here):
    run, lines = opened(), []
    assert {"id_only", "per_layer", "per_layer+id"} <= set(run.metrics()["variant"])
    users = read_manifest(run.directory("ids", "id"), "ids")["settings"]["users"]
    assert (users["kind"], users["decay"], users["dim"], users["patience"]) == (DECAY, 0.9, 16, 10)
    assert yaml.safe_load(run.config_file.read_text())["ids"]["settings"]["dropout"] == 0.2
    assert run.sources["id"].vectors_per_user == 1
    assert len(recommend(run, "u001", 5, trusted=[DECAY])) == 5
    opened(say=lines.append).run(["prepare", "ids", "neighbours", "shards", "train", "evaluate", "export"])
    assert sum("is up to date" in line for line in lines) == 17


@pytest.mark.slow
def test_the_command_finds_modules_in_the_current_directory(here):
    """Which Python's own path of an installed command lacks."""
    bundle = str(opened().directory("export"))
    command = [str(BIN / "rarec"), "recommend", bundle, "--history", "i001,i002", "-k", "3", "--trust", DECAY]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_other_settings_of_it_are_refused_by_name(here):
    with pytest.raises(UserError, match=r"users\.decay: 0\.9 -> 0\.5.*\n.*rarec ids CONFIG --fresh"):
        opened("ids.settings.decay=0.5").make("ids")


def test_its_states_are_means_with_weights_that_fall(here):
    run = opened()
    model = run.sources["id"].users.model
    torch.nn.init.eye_(model.out.weight)
    torch.nn.init.zeros_(model.out.bias)
    items_NE = np.eye(3, 16, dtype=np.float32)
    expected = np.array([0.81, 0.9, 1]) / 2.71
    assert model.encode(items_NE, [np.array([0, 1, 2])])[0, 0, :3] == pytest.approx(expected, abs=1e-6)


def test_its_training_resumes_to_the_same_weights(here, tmp_path, monkeypatch):
    run = opened(f"run.dir={tmp_path / 'run'}", "ids.settings.epochs=4", "ids.holdout=0")
    run.make("prepare")
    validate, epochs = Validation.of_training, iter(range(4))

    def interrupted(validation, *arguments):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return validate(validation, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "of_training", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.make("ids")
    run.make("ids")
    resumed = read_manifest(run.directory("ids", "id"), "ids")
    run.make("ids", fresh=True)
    assert read_manifest(run.directory("ids", "id"), "ids")["files"] == resumed["files"]


def test_what_a_manifest_alone_names_is_not_imported(here):
    with pytest.raises(UserError, match=rf"{re.escape(DECAY)}.*\n.*ids\.model"):
        open_source(opened().directory("ids", "id"))


def test_it_is_planned_and_swept_over(here):
    run = opened()
    planned = plan(run, Cluster.of(1, 1, "80GB", "H100"), None)
    trained = read_manifest(run.directory("train", "per_layer"), "train")["trainable_parameters"]
    assert sum(weight.numel for weight in planned.calculator.meta_model("per_layer", False).trainable) == trained
    grid = {"dir": "runs", "base": "mine.yaml", "runs": {"a": {"grid": {"ids.settings.decay": [0.5, 1.0]}}}}
    Path("sweep.yaml").write_text(yaml.safe_dump(grid))
    runs = load_sweep(Path("sweep.yaml")).runs
    assert [each.config.ids.recipe.decay for each in runs] == [0.5, 1.0]
    assert len({Run(each.config).directory("ids", "id") for each in runs}) == 2


def test_an_installed_package_offers_a_short_name(here, tmp_path, monkeypatch):
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[rarec.id_models]\ndecay = {DECAY}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = load_config("mine.yaml", ["ids.model=decay"])
    assert type(config.ids.recipe).__qualname__ == "Decay.Config"
    with pytest.raises(UserError, match=r"did you mean `decay`"):
        load_config("mine.yaml", ["ids.model=decays"])
    run = opened(
        f"run.dir={tmp_path / 'run'}", *SHORT, "ids.model=decay", "ids.settings.epochs=1", "export.variant=id_only"
    )
    run.run([stage for stage in STAGES if stage != "report"])
    bundle = run.directory("export")
    with pytest.raises(UserError, match=r"names decay.*\n.*trusted"):
        rarec.load(bundle)
    assert len(rarec.load(bundle, trusted=["decay"]).recommend([["i001"]], 3)[0]) == 3


# -- a neighbour model ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_neighbour_model_of_ones_own_is_counted_ranked_titled_and_served(here, tmp_path):
    run = copied(tmp_path / "run", *SHORT, "evaluate.sanity_checks=false", *parts("neighbours"))
    (run.root / "neighbours").unlink()
    run.run(["neighbours", "train", "evaluate", "export"])
    assert {"Conditional", "per_layer+id+cheap/without_Conditional"} <= set(run.metrics()["variant"])
    assert part_title("Conditional") == "also bought"
    settings = read_manifest(run.directory("neighbours", "Conditional"), "neighbours")["settings"]
    assert settings == {"model": "my_package.neighbours:Conditional", "top": 200, "popularity": 0.3}
    dataset, table_NN = run.dataset, run.neighbours["Conditional"].table_NN
    seen = [set(dataset.sequence(user)[:end].tolist()) for user, end in enumerate(dataset.train_length_U)]
    first, other, both = (sum(items <= each for each in seen) for items in ({0}, {1}, {0, 1}))
    assert table_NN[0, 1] == pytest.approx(both / first / other**0.3)
    loaded = rarec.load(run.directory("export"), trusted=[DECAY])
    assert "Conditional" in loaded.parts.rankers
    assert len(loaded.recommend([["i001"]], 5)[0]) == 5


# -- the other parts ------------------------------------------------------------------------------------------------


def parts(name: str) -> list[str]:
    """Return the overrides of a section of the page's YAML."""
    return [f"{name}.{field}={json.dumps(value)}" for field, value in section(name).items()]


@pytest.mark.parametrize("name", ["alignment", "readout", "loss"])
def test_a_part_of_ones_own_is_trained_exported_and_reloaded(here, tmp_path, name):
    run = copied(tmp_path / "run", *SHORT, "evaluate.sanity_checks=false", *parts(name))
    run.run(["train", "evaluate", "export"])
    manifest = read_manifest(run.directory("train", "per_layer"), "train")
    usual = read_manifest(opened().directory("train", "per_layer"), "train")
    (field, value), added = next(iter(section(name).items())), manifest["trainable_parameters"]
    added -= usual["trainable_parameters"]
    blocks_, hidden, dim = 2, 32, 16
    more = 2 * (2 * dim * (dim + 1) + blocks_ * hidden * 2 * dim)  # sides times inner map and outer maps
    assert manifest["settings"][name][field] == value
    assert added == {"alignment": more, "readout": 6, "loss": 0}[name]
    planned = plan(run, Cluster.of(1, 1, "80GB", "H100"), None).calculator.meta_model("per_layer", False)
    assert sum(weight.numel for weight in planned.trainable) == manifest["trainable_parameters"]
    assert len(recommend(run, "u001", 3, trusted=[DECAY, value])) == 3
    with pytest.raises(UserError, match=re.escape(value)):
        recommend(run, "u001", 3, trusted=[DECAY])


def test_an_alignment_map_starts_at_the_ridge_regression_and_leaves_it(here, tmp_path):
    """Its addition is zero before the first step, so the first loss is that of the linear map."""
    first, weights = [], []
    for number, overrides in enumerate(([], parts("alignment"))):
        run = copied(tmp_path / str(number), *SHORT, *overrides)
        run.make("train")
        line = (run.directory("train", "per_layer") / "log.jsonl").read_text().splitlines()[0]
        first.append(json.loads(line)["loss"])
        weights.append(run.stage("train", "per_layer").best_model().state_dict())
    assert first[0] == pytest.approx(first[1], rel=1e-6)
    assert weights[1]["user.alignment.sources.id.outer_LDF"].abs().max() > 0


def test_random_first_values_of_a_part_come_from_the_seed(here, tmp_path):
    runs = [copied(tmp_path / str(number), *SHORT, *parts("alignment")) for number in range(2)]
    for number, run in enumerate(runs):
        torch.manual_seed(number)
        run.make("train")
    files = [read_manifest(run.directory("train", "per_layer"), "train")["files"] for run in runs]
    weights = [{name: sha for name, sha in each.items() if name.endswith(".safetensors")} for each in files]
    assert weights[0] == weights[1]


@pytest.mark.multiprocess
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_parts_of_ones_own_train_alike_on_two_ranks(here, tmp_path, engine):
    """Sharded by the engine like the others; each rank computes its rows of the loss."""
    overrides = [*SHORT, *(override for name in ("alignment", "readout", "loss") for override in parts(name))]
    alone = copied(tmp_path / "alone", *overrides)
    alone.make("train")
    together = copied(tmp_path / "together", *overrides)
    fields = [f"run.dir={together.root}", *AS_IN_PYTHON, *overrides]
    finish("train", here / "mine.yaml", fields, engine=engine, scratch=tmp_path)
    assert losses(together.root, "per_layer") == pytest.approx(losses(alone.root, "per_layer"), rel=1e-4)


@pytest.mark.slow
def test_a_variant_of_ones_own_has_its_name_in_rows_and_its_title_in_tables(here, tmp_path):
    run = copied(tmp_path / "run", *parts("train"), *parts("export"), "train.max_steps=3", "train.validate_every=3")
    run.run(["train", "evaluate", "export", "report"])
    assert {"no_instructions", "no_instructions+id"} <= set(run.metrics()["variant"])
    assert variant_title("no_instructions+id") == "RA-Rec without instructions + ID"
    assert "RA-Rec without instructions" in (run.directory("report") / "report.html").read_text()
    settings = read_manifest(run.directory("train", "no_instructions"), "train")["settings"]["variant"]
    assert (settings["name"], settings["blocks"], settings["instructions"]) == ("no_instructions", "all", False)
    assert len(recommend(run, "u001", 3, trusted=[DECAY])) == 3


# -- an export target ------------------------------------------------------------------------------------------------


def test_a_target_of_ones_own_is_written_beside_what_it_needs(recommender, here, tmp_path):
    said = []
    write_targets(recommender, ["my_package.targets:Array"], tmp_path / "served", said.append)
    assert np.array_equal(np.load(tmp_path / "served" / "items.npy"), recommender.parts.dense.items_NF)
    assert (tmp_path / "served" / "client.json").exists()
    assert said[0].startswith("largest: ")


# -- what is refused ------------------------------------------------------------------------------------------------

WRONG = """
from rarec.config import Variant
from rarec.config.ids import Recipe
from rarec.ids.models import SequenceModel
from rarec.neighbours.base import NeighbourModel

class Unfinished(SequenceModel):
    pass

class Shapeless(SequenceModel):
    def __init__(self, dim, max_history, dropout):
        super().__init__(max_history)
        self.scale = __import__("torch").nn.Parameter(__import__("torch").ones(1))

    def forward(self, items_BTE, lengths_B):
        return items_BTE * self.scale

class NoSuchSetting(Shapeless):
    class Config(Recipe):
        width: int = 3

class id(NeighbourModel):
    title = "taken"

    def fit(self, dataset):
        return None

TAKEN = Variant("per_layer", "another", "input")
UNFIT = Variant("a/b", "title", "input")

def nothing(scores_bB, masked_bB, own_b, log_q_B):
    return scores_bB.sum()
"""


@pytest.fixture
def wrong(here, tmp_path, monkeypatch) -> Path:
    """Make a directory with modules that have mistakes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((here / "mine.yaml").read_text())
    write_files(PAGE, tmp_path)
    (tmp_path / "wrong_parts.py").write_text(WRONG)
    (tmp_path / "broken_part.py").write_text("\nlamp = chair\n")
    (tmp_path / "leaving_part.py").write_text("raise SystemExit(3)\n")
    yield tmp_path
    for name in ("wrong_parts", "broken_part"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ids.model=sasrce", r"field `ids.model`: .*did you mean `sasrec`\?.*package\.module:Name"),
        ("alignment.map=liner", r"field `alignment.map`: .*did you mean `linear`\?"),
        ("readout.module=som", r"field `readout.module`: .*did you mean `sum`\?"),
        ("loss.recommendation=softmx", r"field `loss.recommendation`: .*did you mean `softmax`\?"),
        ("train.variants=[per_layr]", r"field `train.variants.0`: .*did you mean `per_layer`\?"),
        ("ids.model=no_such_package:A", r"field `ids.model`: cannot import no_such_package: .*current directory"),
        ("ids.model=broken_part:A", r"`ids.model`: cannot import broken_part: NameError.*broken_part\.py, line 2"),
        ("ids.model=leaving_part:A", r"`ids.model`: cannot import leaving_part: SystemExit"),
        ("loss.recommendation=time:lapse", r"`loss.recommendation`: time \(part of Python\) has no 'lapse'"),
        ("ids.model=my_package.models:Decoy", r"`ids.model`: my_package\.models \(.*\) .*did you mean `Decay`\?"),
        ("ids.model=my_package.losses:hinge", r"`ids.model`: .*function.*SequenceModel.*docs/extend\.md"),
        ("ids.model=wrong_parts:Unfinished", r"`ids.model`: .*Unfinished lacks forward"),
        ("alignment.map=my_package.models:Decay", r"`alignment.map`: .*Decay.*SourceAlignment"),
        ("readout.module=my_package.maps:ResidualMLP", r"`readout.module`: .*ReadoutModule"),
        (
            "loss.recommendation=my_package.maps:ResidualMLP",
            r"`loss.recommendation`: .*ResidualMLP.*rarec\.models\.losses",
        ),
        ("train.variants=[my_package.losses:hinge]", r"`train.variants.0`: .*rarec\.config\.Variant"),
        ("train.variants=[wrong_parts:TAKEN]", r"`train.variants.0`: .*'per_layer', which is taken"),
        ("train.variants=[wrong_parts:UNFIT]", r"`train.variants.0`: .*'a/b'"),
        ("neighbours.models=[eas]", r"`neighbours.models.0`: .*did you mean `ease`\?"),
        ("neighbours.models=[ease, ease]", r"`neighbours.models`: .*twice"),
        ("neighbours.models=[my_package.models:Decay]", r"`neighbours.models.0`: .*Decay.*NeighbourModel"),
        ("neighbours.models=[wrong_parts:id]", r"`neighbours.models.0`: .*'id', which is taken"),
        ("neighbours.settings.popularity=1", r"`neighbours.settings`: unknown field `popularity`"),
        (OWN_NEIGHBOURS + "settings: {popularty: 0}}", r"`neighbours.settings`: .*did you mean `popularity`"),
        (OWN_NEIGHBOURS + "settings: {popularity: 2}}", r"`neighbours.settings.popularity`: .*less than 1"),
        ("ids.settings.decoy=1", r"field `ids.settings`: .*`decoy`; did you mean `decay`\?.*known here: dim"),
        ("ids.settings.decay=2", r"field `ids.settings.decay`: .*less than or equal to 1"),
        ("ids.settings.decay=much", r"field `ids.settings.decay`: .*number.*'much'"),
    ],
)
def test_a_wrong_part_is_refused_with_field_and_remedy(wrong, override, message):
    with pytest.raises(UserError) as error:
        load_config("mine.yaml", [override])
    line, _ = str(error.value).splitlines()
    assert line.startswith(("override", "mine.yaml"))
    assert re.search(message, line), line


def test_settings_without_a_model_of_ones_own_are_refused(wrong):
    with pytest.raises(UserError, match=r"`ids.settings`: .*ids\.sasrec"):
        load_config("mine.yaml", ["ids.model=sasrec"])


def test_a_wrong_part_ends_the_command_with_code_2(wrong):
    command = [str(BIN / "rarec"), "prepare", "mine.yaml", "ids.settings.decoy=1"]
    environment = {**os.environ, "COLUMNS": "400"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2
    assert "`ids.settings`: unknown field `decoy`" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_shows_only_when_it_runs_names_the_field_too(wrong):
    def run(*overrides: str) -> Run:
        return Run("mine.yaml", [f"run.dir={wrong / 'run'}", "ids.holdout=0", *overrides], say=lambda line: None)

    run().make("prepare")
    model = ["ids.model=wrong_parts:Shapeless", "ids.settings={epochs: 1}"]
    with pytest.raises(UserError, match=r"`ids.model`: Shapeless\.forward returns states of shape.*\n.*\(B, T, K, E\)"):
        run(*model).make("ids")
    with pytest.raises(UserError, match=r"`ids.model`: .*NoSuchSetting.*width.*\n.*docs/extend\.md"):
        run("ids.model=wrong_parts:NoSuchSetting", "ids.settings={}").make("ids")


def test_a_loss_that_returns_no_partial_mean_is_named(wrong, place, tmp_path):
    run = Run(
        "mine.yaml", [f"run.dir={wrong / 'run'}", *AS_IN_PYTHON, *SHORT, "loss.recommendation=wrong_parts:nothing"]
    )
    run.root.mkdir()
    for name in ("prepare", "ids", "shards"):
        (run.root / name).symlink_to(place / "run" / name)
    with pytest.raises(UserError, match=r"`loss.recommendation`: .*nothing returns Tensor.*\n.*PartialMean"):
        run.make("train")


def test_a_config_that_belongs_to_another_model_is_refused():
    from rarec.ids.models import GRU4Rec, SequenceModel

    with pytest.raises(TypeError, match=r"GRU4Rec"):
        type("Mine", (SequenceModel,), {"Config": GRU4Rec.Config})
    assert GRU4Rec.Config.builds is GRU4Rec
    inherits = type("Mine", (GRU4Rec,), {})
    assert inherits.Config.builds is inherits
    assert GRU4Rec.Config.builds is GRU4Rec


def test_a_configuration_without_parts_of_ones_own_imports_none(tmp_path):
    """`rarec --help`, `plan` and sweeps stay fast."""
    config = make_world(tmp_path)
    code = f"from rarec.config import load_config; load_config({str(config)!r})"
    code += "; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- ranks of another system ----------------------------------------------------------------------------------------


def test_scores_of_another_system_become_ranks_of_the_report(here, tmp_path):
    script = (here / "next_item.py").read_text().replace("runs/mine", str(opened().root))
    opened().run(["prepare"])
    exec(script, {})
    found = copied(tmp_path, *SHORT, "evaluate.external.next_item=next_item.parquet")
    found.run(["ids", "neighbours", "shards", "train", "evaluate"])
    ranks = found.ranks()
    own = ranks[ranks.variant == "external:next_item"].set_index("user")["rank"]
    dataset = found.dataset
    for user, row in zip(list(dataset.user_ids)[:5], range(5), strict=True):
        sequence = dataset.sequence(row)
        followed = np.zeros(dataset.n_items)
        for other, length in enumerate(dataset.train_length_U):
            trained = dataset.sequence(other)[:length]
            np.add.at(followed, trained[1:][trained[:-1] == sequence[-2]], 1)
        competes = np.ones(dataset.n_items, bool)
        competes[sequence[:-1]] = False
        target = sequence[-1]
        competes[target] = True
        listed = followed[target] > 0
        assert own[user] == ((followed >= followed[target]) & competes).sum() if listed else dataset.n_items


# -- a stage --------------------------------------------------------------------------------------------------------


def test_a_stage_of_ones_own_is_a_file_and_a_line(here, monkeypatch):
    names: dict = {}
    exec(blocks(PAGE, "python")[-2], names)
    stage: type[Stage] = names["PopularStage"]
    monkeypatch.setitem(STAGES, stage.name, stage)
    run, lines = opened(), []
    run.run(["popular"])
    popular = json.loads((run.directory("popular") / "popular.json").read_text())
    counts = run.dataset.train_counts_N
    assert [counts[run.dataset.titles.index(title)] for title in popular] == sorted(counts, reverse=True)[:10]
    assert read_manifest(run.directory("popular"), "popular")["count"] == 10
    opened(say=lines.append).run(["popular"])
    assert any("is up to date" in line for line in lines)


def test_the_run_of_the_page_is_the_public_one():
    assert rarec.Run is Run
    assert RunConfig.model_fields["ids"].default.model == "sasrec"
