"""A language model's folder is what it seems, or is refused by file; nothing is made up, unpickled or fetched."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rarec.config.method import Llm
from rarec.errors import UserError
from rarec.models.language_model import LoadedModel, load_model
from tests.synthetic import write_llm

Harm = Callable[[Path], object]
WEIGHTS, SECOND = "model.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in ("bert", "llama"):
        write_llm(root / kind, kind)
    return root


@pytest.fixture(params=["bert", "llama"])
def folder(request: pytest.FixtureRequest, saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / request.param, tmp_path / "llm"))


def load(folder: Path, **settings: Any) -> LoadedModel:
    return load_model(Llm(path=str(folder), **settings), folder.parent / "converted")


def refuse(folder: Path, *parts: str, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(folder, **settings)
    said = str(caught.value)
    assert all(part in said for part in ("llm.path", str(folder), *parts)), said
    assert caught.value.remedy
    assert len(caught.value.problem) < 450
    assert "\n" not in caught.value.problem
    assert not any(advice in said for advice in ("weights_only", "trust_remote_code", "allow_pickle="))
    return caught.value


def settings_of(**changes: object) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def text_of(name: str, text: str | bytes) -> Harm:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def weights_of(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    def harm(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file({name: each.contiguous() for name, each in weights.items()}, folder / WEIGHTS, {"format": "pt"})

    return harm


def without(*patterns: str) -> Harm:
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def sharded(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {name: f"model-0000{1 + place % 2}-of-00002.safetensors" for place, name in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in shards if shards[name] == shard}, folder / shard, {"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def then(*harms: Harm) -> Harm:
    return lambda folder: [harm(folder) for harm in harms]


def index_of(change: Callable[[Any], object]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / f"{WEIGHTS}.index.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return then(sharded, harm)


def first_matrix(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(weights[name] for name in sorted(weights) if "layer" in name and weights[name].ndim == 2)


def without_a_matrix(weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in sorted(weights) if "layer" in name and weights[name].ndim == 2)]


def fewer_words(weights: dict[str, torch.Tensor]) -> None:
    for name in ("embeddings.word_embeddings.weight", "model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:20].clone()


HARMS: dict[str, tuple[Harm, tuple[str, ...]]] = {
    "nothing": (shutil.rmtree, ()),
    "a weight missing": (weights_of(without_a_matrix), ("missing",)),
    "no tokenizer": (without("tokenizer*", "special*", "vocab*"), ("tokenizer",)),
    "no words": (without("tokenizer.json"), ("tokenizer",)),
    "a cut tokenizer": (text_of("tokenizer.json", "{"), ("tokenizer.json",)),
    "fewer vectors than words": (then(weights_of(fewer_words), settings_of(vocab_size=20)), ("tokenizer", "20")),
    "another width": (settings_of(hidden_size=64), ("config.json", "32", "64")),
    "another inner width": (settings_of(intermediate_size=11), ("config.json", "11")),
    "more words": (settings_of(vocab_size=300), ("config.json", "(300, 32)")),
    "fewer words": (settings_of(vocab_size=100), ("config.json", "(100, 32)")),
    "a layer less": (settings_of(num_hidden_layers=1), ("config.json", "1.")),
    "a layer more": (settings_of(num_hidden_layers=3), ("2.",)),
    "no layer": (settings_of(num_hidden_layers=0), ("config.json", "layers")),
    "a million layers": (settings_of(num_hidden_layers=10**6), ("config.json", "num_hidden_layers")),
    "a huge width": (settings_of(hidden_size=10**12), ("config.json", "hidden_size")),
    "many positions": (settings_of(max_position_embeddings=10**12), ("config.json", "max_position_embeddings")),
    "a negative width": (settings_of(hidden_size=-8), ("config.json", "hidden_size")),
    "a width that is text": (settings_of(hidden_size="x"), ("hidden_size",)),
    "no width": (settings_of(hidden_size=0), ()),
    "heads that do not divide": (settings_of(num_attention_heads=5), ()),
    "a list as configuration": (text_of("config.json", "[]"), ("config.json",)),
    "a cut configuration": (text_of("config.json", '{"model_type": '), ("config.json",)),
    "an empty configuration": (text_of("config.json", ""), ("config.json",)),
    "deep brackets": (text_of("config.json", "[" * 200_000), ("config.json",)),
    "bytes as configuration": (text_of("config.json", b"\xff\xfe\x00"), ("config.json",)),
    "no configuration": (without("config.json"), ("config.json",)),
    "an unknown architecture": (settings_of(model_type="nothing"), ()),
    "an architecture of ten thousand characters": (settings_of(model_type="x" * 10_000), ()),
    "code": (settings_of(auto_map={"AutoConfig": "m.C", "AutoModel": "m.M"}, model_type="mine"), ()),
    "a kernel of a hub": (
        settings_of(_attn_implementation="kernels-community/flash-attn"),
        ("config.json", "_attn_implementation"),
    ),
    "a kernel for a part": (
        settings_of(text_config={"attn_implementation": {"": "someone/kernel@main:attend"}}),
        ("config.json", "attn_implementation"),
    ),
    "NaN": (weights_of(lambda weights: first_matrix(weights)[0].fill_(torch.nan)), ("NaN",)),
    "infinity": (weights_of(lambda weights: first_matrix(weights)[-1].fill_(-torch.inf)), ("infinity",)),
    "no weights": (without("*.safetensors"), ("safetensors",)),
    "cut weights": (lambda folder: os.truncate(folder / WEIGHTS, 3_000), (WEIGHTS,)),
    "an empty file": (text_of(WEIGHTS, ""), (WEIGHTS,)),
    "a page of the web": (text_of(WEIGHTS, "<html>"), (WEIGHTS,)),
    "a pointer of Git LFS": (text_of(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), (WEIGHTS,)),
    "a shard missing": (then(sharded, without(SECOND)), (SECOND,)),
    "a cut shard": (then(sharded, lambda folder: os.truncate(folder / SECOND, 500)), (SECOND,)),
    "a cut index": (then(sharded, text_of(f"{WEIGHTS}.index.json", "{")), ("index.json",)),
    "a list as index": (index_of(lambda index: []), ("index.json",)),
    "an index of nothing": (index_of(lambda index: {}), ("index.json",)),
    "an index of an empty map": (index_of(lambda index: {"weight_map": {}}), ("index.json",)),
    "an index of numbers": (index_of(lambda index: {"weight_map": {"a": 1}}), ("index.json",)),
    "an index that leads out": (index_of(lambda index: {"weight_map": {"a": "../b.safetensors"}}), ("index.json",)),
    "an index of pickles": (index_of(lambda index: {"weight_map": {"a": "pytorch_model.bin"}}), ("index.json",)),
    "an index that names the wrong shard": (
        index_of(lambda index: index | {"weight_map": dict.fromkeys(index["weight_map"], SECOND)}),
        (),
    ),
    "an adapter of another model": (
        text_of("adapter_config.json", '{"base_model_name_or_path": "other/model", "peft_type": "LORA"}'),
        ("adapter_config.json",),
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_folder_that_is_not_what_it_seems_is_refused(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    harm, parts = HARMS[name]
    harm(folder)
    refuse(folder, *parts)
    assert not [record for record in caplog.records if record.name.startswith("transformers.modeling")]


def test_weights_in_shards_are_the_same_model(folder: Path, saved: Path) -> None:
    whole = load(folder).identity["fingerprint"]
    sharded(folder)
    assert load(folder).identity["fingerprint"] == whole


def test_weights_that_no_block_has_are_left_alone(folder: Path) -> None:
    whole = load(folder).identity["fingerprint"]
    weights_of(lambda weights: weights.update({"score.weight": torch.full((2, 32), torch.nan)}))(folder)
    assert load(folder).identity["fingerprint"] == whole


class Payload:
    """Create a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_read_only_where_the_user_says_so(folder: Path) -> None:
    whole = load(folder).identity["fingerprint"]
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "llm.allow_pickle_weights: true" in refuse(folder, "pytorch_model.bin").remedy
    assert load(folder, allow_pickle_weights=True).identity["fingerprint"] == whole


@pytest.mark.parametrize("allowed", [False, True])
def test_a_pickle_of_code_is_not_run(folder: Path, tmp_path: Path, allowed: bool) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    refuse(folder, allow_pickle_weights=allowed)
    assert not (tmp_path / "ran").exists()


def test_safetensors_are_read_where_a_pickle_lies_beside_them(folder: Path, tmp_path: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "ran")}))
    load(folder, allow_pickle_weights=True)
    load(folder)
    assert not (tmp_path / "ran").exists()


AS_NOBODY = """
import os, sys, torch
from pathlib import Path
from rarec.config.method import Llm
from rarec.errors import UserError
from rarec.models.language_model import load_model
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for folder in map(Path, sys.argv[1:]):
    try:
        load_model(Llm(path=str(folder)), folder.parent / "converted")
    except UserError as error:
        print("refused:", str(error).replace("\\n", " "))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_file_of_another_user_may_not_be_read_which_is_what_is_said(saved: Path) -> None:
    root = Path("/tmp") / f"rarec-test-{os.getpid()}"  # pytest's own folders are closed to others
    try:
        closed = [root / name.replace(".", "-") / name for name in ("config.json", WEIGHTS, "tokenizer.json")]
        for file in closed:
            shutil.copytree(saved / "bert", file.parent)
            file.chmod(0o600)
        command = [sys.executable, "-c", AS_NOBODY, *(str(file.parent) for file in closed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for file, line in zip(closed, done.stdout.splitlines(), strict=True):
            assert line.startswith(f"refused: llm.path: {file} may not be read")
    finally:
        shutil.rmtree(root)


WATCHED = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append(args) if event in ("socket.connect", "socket.getaddrinfo") else None)
from pathlib import Path
import torch
from rarec.config.method import Llm
from rarec.models.language_model import load_model
folder = Path(sys.argv[1])
ids = torch.tensor([[2, 9, 13, 3]])
for quantize in sys.argv[2:]:
    loaded = load_model(Llm(path=str(folder), quantize=quantize, dtype="bfloat16"), folder.parent / "converted")
    assert loaded.backbone(ids, torch.ones_like(ids)).isfinite().all()
    assert not calls, (quantize, calls)
"""
KERNELS = """
from pathlib import Path
Path({mark!r}).touch()
def __getattr__(name):
    def call(*args, **keywords):
        raise RuntimeError("asked a hub")
    return call
"""


@pytest.mark.slow
def test_no_hub_is_asked_and_no_kernel_of_one_is_loaded(folder: Path, tmp_path: Path) -> None:
    """With a package `kernels` installed, which leaves a mark when it is imported, and without the offline switch."""
    kinds = ["none", "nf4"] if find_spec("bitsandbytes") else ["none"]
    site, mark = tmp_path / "site", tmp_path / "imported"
    for each in (site / "kernels", site / "kernels-0.18.2.dist-info"):
        each.mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(KERNELS.format(mark=str(mark)))
    (site / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(site)])
    command = [sys.executable, "-c", WATCHED, str(folder), *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()
