"""Vectors of pictures and texts: by hand, killed and resumed, imported as a source, and faults on purpose."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from rarec.cli_bundle import vectors
from rarec.config.ids import Import
from rarec.config.method import Llm
from rarec.errors import UserError
from rarec.models.encode import text_vectors
from rarec.models.language_model import load_model
from rarec.vectors import encoders, make
from tests.datasets import by_hand
from tests.sources import make_source
from tests.synthetic import write_llm

IDS = ["a", "b.c", "d e", "f", "é"]
NAMES = ["a.png", "b.c.JPG", "d e.gif", "f.webp", "é.png"]
MODES = ["RGB", "L", "P", "RGBA", "1"]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def write_vit(directory: Path, pooler: bool = True) -> Path:
    torch.manual_seed(1)
    ViTModel(ViTConfig(**TINY, image_size=16, patch_size=8), add_pooling_layer=pooler).save_pretrained(directory)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory


def write_clip(directory: Path) -> Path:
    vision = {**TINY, "image_size": 16, "patch_size": 8}
    text = {**TINY, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of tiny models, each as its maker saves it."""
    root = tmp_path_factory.mktemp("models")
    write_vit(root / "vit")
    write_vit(root / "headless", pooler=False)
    write_clip(root / "clip")
    timm.models.save_for_hf(
        timm.create_model("test_vit", pretrained=False), str(root / "timm"), safe_serialization=True
    )
    write_llm(root / "bert")
    return root


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A current directory with pictures and a catalogue."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, mode in zip(NAMES, MODES, strict=True):
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no picture")
    (tmp_path / "images" / ".hidden.png").write_text("no picture")
    rows = [
        "sku,title,brand",
        "7,river lamp,RIVER",
        "8,,STONE",
        "9,,",
        "7,again,CLOUD",
        ",no id,EMBER",
        "10,ember bag,",
    ]
    (tmp_path / "items.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def expected(model: Path, name: str) -> np.ndarray:
    """The vector of one picture, by itself."""
    with Image.open(Path("images", name)) as picture:
        pixels = AutoImageProcessor.from_pretrained(model)(images=picture.convert("RGB"), return_tensors="pt")
    loaded = AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        if model.name == "clip":
            return loaded.get_image_features(**pixels).pooler_output[0].numpy()
        states = loaded(**pixels)
    return (states.pooler_output if model.name == "vit" else states.last_hidden_state.mean(1))[0].numpy()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", ["vit", "headless", "clip"])
def test_pictures_are_read_as_the_model_reads_each_alone(models, name, monkeypatch):
    monkeypatch.setattr(make, "CHUNK", 2)
    vectors("images", str(models / name), Path("poster.npy"))
    assert Path("poster.ids.txt").read_text() == "\n".join(IDS) + "\n"
    made = np.load("poster.npy")
    assert made.dtype == np.float32
    assert made == pytest.approx(np.stack([expected(models / name, picture) for picture in NAMES]), abs=1e-5)


def test_a_model_of_timm_gives_what_timm_gives(models, place):
    vectors("images", str(models / "timm"), Path("poster.npy"))
    weights = load_file(models / "timm" / "model.safetensors")
    own = timm.create_model("test_vit", pretrained=False, num_classes=0).eval()
    own.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("head.")})
    turn = timm.data.create_transform(**timm.data.resolve_model_data_config(own), is_training=False)
    with torch.no_grad(), Image.open("images/a.png") as picture:
        assert np.load("poster.npy")[0] == pytest.approx(own(turn(picture)[None])[0].numpy(), abs=1e-5)


@pytest.mark.usefixtures("place")
def test_a_picture_is_turned_as_its_camera_was_held():
    picture = Image.open("images/a.png")
    facts = Image.Exif()
    facts[0x0112] = 6  # a quarter to the right
    picture.rotate(90, expand=True).save("turned.png", exif=facts)
    assert (np.asarray(encoders.open_picture(Path("turned.png"))) == np.asarray(picture)).all()


def test_texts_are_the_columns_joined_and_items_without_are_left_out(models, place, capsys):
    model = str(models / "bert")
    vectors("items.csv", model, Path("words.npy"), texts="title, brand", item="sku")
    assert Path("words.ids.txt").read_text() == "7\n8\n10\n"
    by_hand = text_vectors(load_model(Llm(path=model), Path("none")), ["river lamp RIVER", "STONE", "ember bag"])
    assert np.load("words.npy") == pytest.approx(by_hand, abs=1e-5)
    assert "items.csv: 3 items have a text, of 6 rows" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_the_printed_section_imports_them_and_items_without_a_picture_are_masked(models, capsys):
    vectors("images", str(models / "vit"), Path("poster of 7.npy"))
    printed = capsys.readouterr().out
    assert "{soft:poster_of_7}" in printed
    ((name, section),) = yaml.safe_load(printed)["sources"].items()
    dataset = by_hand([[0, 1, 2]], pa.array(["f", "no picture", "a"]), pa.array(["u"]))
    said: list[str] = []
    source = make_source(name, Import(**section), dataset, Path("out"), say=said.append, fresh=True)
    made = np.load("poster of 7.npy")
    assert (source.items_NE == np.stack([made[3], np.zeros(16), made[0]])).all()
    assert "poster of 7.npy: no vector for 1 of 3 items" in said[0]


# -- interruptions --------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes a text as its length and its first letter; ends with an error at a call."""

    def __init__(self, fails: int | None = None) -> None:
        self.read: list[list[str]] = []
        self.fails = fails

    def __call__(self, texts):
        if len(self.read) == self.fails:
            raise KeyboardInterrupt
        self.read.append([*texts])
        return np.array([[len(text), ord(text[0])] for text in texts], np.float32)

    def load(self):
        return self, "identity"


TEXTS = {f"i{number}": "x" * (number + 1) for number in range(7)}


@given(chunk=st.integers(1, 8), fails=st.integers(0, 7))
def test_what_was_made_before_an_interruption_is_kept(tmp_path_factory, chunk, fails):
    out, encoder, again = tmp_path_factory.mktemp("out") / "words.npy", Encoder(fails), Encoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "CHUNK", chunk)
        chunks = -(-len(TEXTS) // chunk)
        if fails < chunks:
            with pytest.raises(KeyboardInterrupt):
                make.make_vectors(TEXTS, encoder.load, out)
            assert not [path for path in out.parent.iterdir() if not path.name.startswith(".")]
            make.make_vectors(TEXTS, again.load, out)
        else:
            make.make_vectors(TEXTS, encoder.load, out)
    assert len(encoder.read) + len(again.read) == chunks
    assert np.load(out).tolist() == [[number + 1, ord("x")] for number in range(7)]
    assert sorted(path.name for path in out.parent.iterdir()) == ["words.ids.txt", "words.npy"]


def test_a_list_of_ids_that_a_killed_process_left_is_its_own(tmp_path):
    out = tmp_path / "words.npy"
    (tmp_path / "words.ids.txt").write_text("".join(f"{item}\n" for item in TEXTS))
    make.make_vectors(TEXTS, Encoder().load, out)
    assert len(np.load(out)) == 7


def test_a_corrupt_picture_is_named_and_the_same_command_resumes_when_it_is_replaced(models, place, monkeypatch):
    monkeypatch.setattr(make, "CHUNK", 2)
    whole = Path("images/f.webp").read_bytes()
    Path("images/f.webp").write_bytes(whole[: len(whole) // 2])
    read: list[str] = []
    open_picture = encoders.open_picture
    monkeypatch.setattr(encoders, "open_picture", lambda path: read.append(path.name) or open_picture(path))
    with pytest.raises(UserError, match=r"images/f\.webp .*\n.*same command"):
        vectors("images", str(models / "vit"), Path("poster.npy"))
    assert not Path("poster.npy").exists()
    assert {"a.png", "b.c.JPG", "f.webp"} <= set(read)
    read.clear()
    Path("images/f.webp").write_bytes(whole)
    vectors("images", str(models / "vit"), Path("poster.npy"))
    assert sorted(read) == ["d e.gif", "f.webp", "é.png"]
    vectors("images", str(models / "vit"), Path("fresh.npy"))
    assert Path("fresh.npy").read_bytes() == Path("poster.npy").read_bytes()


# -- faults ---------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def twin() -> None:
    Path("images/a.jpg").write_bytes(Path("images/a.png").read_bytes())


def settings(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(folder: Path) -> None:
    settings(folder, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, model_type="evil")
    (folder / "evil.py").write_text("raise SystemExit")


WORDS = {"source": "items.csv", "model": "bert", "texts": "title", "item": "sku"}
FAULTS = {
    "a folder of nothing": (lambda: Path("empty").mkdir(), r"empty .*pictures", {"source": "empty"}),
    "no folder": (None, r"nowhere is not a folder.*\n.*--texts", {"source": "nowhere"}),
    "a table without --texts": (None, r"items\.csv is not a folder.*\n.*--texts", {"source": "items.csv"}),
    "two pictures of an item": (twin, r"images/a\.jpg and images/a\.png .*'a'.*\n.*one picture", {}),
    "an id of two lines": (lambda: Path("images/a.png").rename("images/a\nb.png"), r"'a\\nb'.*\n.*rename", {}),
    "no model": (None, r"--model: \./nothing is not a directory", {"model": "./nothing"}),
    "a folder that is no model": (None, r"--model: images/config\.json is missing", {"model": "images"}),
    "a model of texts for pictures": (None, r"--model: .*bert", {"model": "bert"}),
    "a model of pictures for texts": (None, r"--model: .*vit.*\n.*take another model", {**WORDS, "model": "vit"}),
    "cut weights": (lambda: cut(Path("own/model.safetensors")), r"--model: own/model\.safetensors", {"model": "own"}),
    "a pickle": (lambda: pickled(Path("own")), r"own/pytorch_model\.bin .*\n.*safetensors", {"model": "own"}),
    "code": (lambda: with_code(Path("own")), r"--model: .*own", {"model": "own"}),
    "no table": (None, r"nowhere\.csv does not exist", {**WORDS, "source": "nowhere.csv"}),
    "no column of texts": (None, r"items\.csv .*no column 'colour' \(--texts\)", {**WORDS, "texts": "title,colour"}),
    "no column of ids": (None, r"items\.csv .*no column 'item' \(--item\)", {**WORDS, "item": "item"}),
    "no text at all": (lambda: Path("empty.csv").write_text("sku,title\n1,\n"), r"empty\.csv: .*title.*\n.*--texts",
                       {**WORDS, "source": "empty.csv"}),
    "another ending": (None, r"--out poster\.txt .*\.npy", {"out": Path("poster.txt")}),
    "a file in its place": (lambda: Path("poster.npy").write_text("mine"), r"poster\.npy is there .*\n.*--out", {}),
    "a list in its place": (lambda: Path("poster.ids.txt").write_text("mine"), r"poster\.ids\.txt is there .*\n", {}),
    "no such device": (None, r"--device is 'tpu'", {"device": "tpu"}),
}  # fmt: skip


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_or_written_is_refused_and_nothing_is_lost(models, fault):
    harm, match, given = FAULTS[fault]
    Path("vit").symlink_to(models / "vit")
    Path("bert").symlink_to(models / "bert")
    write_vit(Path("own"))
    if harm:
        harm()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=match) as caught:
        vectors(**{"source": "images", "model": "vit", "out": Path("poster.npy"), **given})
    assert "prepare." not in str(caught.value)
    assert "llm." not in str(caught.value)
    assert caught.value.remedy
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_vectors_that_are_not_finite_are_refused(models, place):
    folder = write_vit(place / "own")
    weights = load_file(folder / "model.safetensors")
    huge = {name: tensor * 3e38 if name == "embeddings.cls_token" else tensor for name, tensor in weights.items()}
    huge["layernorm.weight"] = torch.full((16,), 3e38)
    huge["layernorm.bias"] = torch.full((16,), 3e38)
    save_file(huge, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"--model: .*'a' .*NaN.*\n.*another model"):
        vectors("images", str(folder), Path("poster.npy"))
    assert not Path("poster.npy").exists()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("package", ["PIL", "timm", "torchvision"])
def test_the_extra_is_named_where_it_is_missing(models, package, monkeypatch):
    found = encoders.importlib.util.find_spec
    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(UserError, match=rf"{package}.*\n.*pip install 'rarec\[vectors\]'"):
        vectors("images", str(models / "vit"), Path("poster.npy"))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_no_other_file_that_a_model_of_timm_names_is_read(models, place):
    own = place / "own"
    timm.models.save_for_hf(timm.create_model("test_vit", pretrained=False), str(own), safe_serialization=True)
    (place / "evil.pth").write_bytes(pickle.dumps(Evil()))
    settings(own, model_args={"checkpoint_path": "evil.pth"})
    vectors("images", str(own), Path("poster.npy"))
    assert not Path("touched").exists()
