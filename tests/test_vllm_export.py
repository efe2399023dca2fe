"""What is written for vLLM says what the model computes, or is refused; vLLM itself is in test_vllm.py."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

import rarec
from rarec.config.method import Readout
from rarec.errors import UserError
from rarec.export import write_targets
from rarec.export.prefix import Prefix, cached, write_program
from rarec.export.rarec_program import Program
from rarec.models.alignment import AlignmentModule, SlotShape
from rarec.models.backbone import FrozenBackbone
from rarec.models.towers import RaRec, ReadoutModule, Tower
from rarec.storage.files import read_json
from tests.recommending import exported
from tests.synthetic import tiny_model
from tests.vllm_server import Served, served


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Served:
    return served(tmp_path_factory.mktemp("llama"), "every block, mean")


@pytest.mark.slow
def test_the_folder_says_how_it_is_served(llama):
    files = {path.name for path in llama.folder.iterdir()}
    assert {"serve.sh", "rarec_connector.py", "rarec_program.py", "program.safetensors", "rarec_vllm.py"} <= files
    script = (llama.folder / "serve.sh").read_text()
    assert str(llama.recommender.parts.model.llm_path) in script
    for option in ("--no-enable-prefix-caching", "--kv-transfer-config", '"MEAN"'):
        assert option in script
    manifest = read_json(llama.folder / "manifest.json")
    assert max(manifest["query_difference"], manifest["prefix_difference"]) < 1e-5


@pytest.mark.slow
def test_the_script_finds_the_language_model_from_any_folder_and_with_spaces_in_its_path(llama, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "my models").mkdir()
    vllm = tmp_path / "bin" / "vllm"
    vllm.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    vllm.chmod(0o755)
    own = Path(llama.recommender.parts.model.llm_path).resolve()
    for given, expected in (("", own), ("my models", tmp_path / "my models")):
        environment = {"PATH": f"{vllm.parent}:{os.environ['PATH']}", "RAREC_LLM": given}
        script = [llama.folder / "serve.sh"]
        said = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert said.stdout.startswith(f"serve\n{expected}\n")
    bare = subprocess.run(script, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert (bare.returncode, bare.stderr.count("\n")) == (2, 1)
    assert "pip install vllm" in bare.stderr


def model_of(kind: str) -> RaRec:
    """Two towers around a tiny model, with slots of random maps in every block."""
    backbone = FrozenBackbone(tiny_model(kind), "mean", sink=True).eval()
    alignment = AlignmentModule({"id": SlotShape(2, 8)}, (0, 1), 32, instructions=1, projections=True)
    for _, source in alignment.named_sources():
        source.reset(torch.Generator().manual_seed(0), spread=1.0)
        source.standardise(3 * torch.randn(50, 8) + 1)
        source.unit_L.copy_(torch.tensor([0.5, 2.0]))
    user, item = (Tower(given, ReadoutModule(32, Readout(whiten=False))) for given in (alignment, None))
    return RaRec(backbone, user, item, scale=1.0, learn_scale=False)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_keys_and_values_are_those_of_the_model(tmp_path, kind):
    model, prefix = model_of(kind), Prefix([1, 7, 2, 2, 2], range(2, 5))
    vectors = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    vectors[1, 0] = 0  # is missing
    write_program(model, prefix, tmp_path / "program", torch.float32)
    prefixes = [Program(tmp_path / "program").prefix(vectors_KE.flatten()) for vectors_KE in vectors]
    for tables, whole in zip(zip(*prefixes, strict=True), cached(model, prefix, {"id": vectors}), strict=True):
        torch.testing.assert_close(torch.stack(tables, 1), whole, rtol=1e-4, atol=1e-5)


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(UserError, match="GPT2Model"):
        write_program(model_of("gpt2"), Prefix([1, 2, 2, 2], range(1, 4)), tmp_path / "program", torch.float32)
    assert not (tmp_path / "program").exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"before_slots": [], "empty_slots": [[0, 1]], "after_slots": [[0, 3]]},
        {"before_slots": [[0, 1], [1, 3]], "empty_slots": [[0, 1], [1, 3]]},
        {"before_slots": [[0, 0]], "empty_slots": [[0, 0]]},
        {"before_slots": [[0, 1]], "empty_slots": [[0, 2]]},
        {"before_slots": [[0, 2]], "empty_slots": [[0, 2]]},
        {"before_slots": [[0, 1]], "empty_slots": [[0, 1]], "empty": [1, 2]},
    ],
    ids=[
        "behind the text",
        "words between",
        "no token before",
        "elsewhere without history",
        "words before that the mean reads",
        "no text without history",
    ],
)
def test_slots_that_no_prefix_can_hold_are_refused(facts):
    prompt = {"before": [1, 2, 2, 2, 9], "empty": [1, 2, 2, 2, 9], "after_slots": [], "titles_first": [], **facts}
    with pytest.raises(UserError, match=r"prompt\.user"):
        Prefix.of(prompt, "mean")


def test_slots_at_titles_are_refused_by_their_own_field():
    prompt = {"before": [1, 2, 2, 2, 9], "before_slots": [[0, 1]], "after_slots": [], "titles_first": [1]}
    with pytest.raises(UserError, match=r"prompt\.title"):
        Prefix.of({**prompt, "empty": prompt["before"], "empty_slots": [[0, 1]]}, "mean")


def test_slots_in_some_blocks_are_refused(tmp_path):
    model = model_of("llama")
    model.user.alignment.blocks = (1,)
    with pytest.raises(UserError, match="1 of 2 blocks"):
        write_program(model, Prefix([1, 2, 2, 2], range(1, 4)), tmp_path / "program", torch.float32)


@pytest.mark.slow
def test_an_encoder_and_a_row_without_language_model_are_refused(recommender, run, tmp_path):
    refused(recommender, tmp_path, "encoder")
    alone = exported(run, tmp_path, "export.variant=id_only+cheap").directory("export")
    refused(rarec.load(alone), tmp_path, "no language model")


def refused(recommender, tmp_path, named: str) -> None:
    with pytest.raises(UserError, match=named):
        write_targets(recommender, ["vllm"], tmp_path / "served", say=lambda line: None)
    assert not (tmp_path / "served").exists()
