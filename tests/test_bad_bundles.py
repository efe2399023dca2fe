"""What is wrong with a bundle, a history or a table of items is one clear error, and nothing is half-written."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import rarec
from rarec import cli_bundle
from rarec.bundle.bundle import FACTS, VECTORS
from rarec.entry import open_run
from rarec.errors import UserError
from rarec.storage.artefacts import MANIFEST, read_manifest, sha256_json
from rarec.storage.files import read_json, sha256_file, write_json
from tests.recommending import sealed, with_items
from tests.synthetic import write_llm


@pytest.fixture
def bundle(finished, tmp_path) -> Path:
    return shutil.copytree(open_run(finished).directory("export"), tmp_path / "bundle")


def flip(name: str, place: float):
    def harm(bundle: Path) -> None:
        data = bytearray((bundle / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 0x10
        (bundle / name).write_bytes(data)

    return harm


def without(name: str):
    return lambda bundle: (bundle / name).unlink()


def cut(name: str):
    return lambda bundle: (bundle / name).write_bytes((bundle / name).read_bytes()[:-7])


def rewritten(name: str, change):
    """Change a file and seal the bundle again, as somebody who edits it would."""

    def harm(bundle: Path) -> None:
        change(bundle / name)
        sealed(bundle)

    return harm


def manifest(**changes):
    def harm(bundle: Path) -> None:
        fields = {**json.loads((bundle / MANIFEST).read_text()), **changes}
        fields.pop("seal")
        write_json(bundle / MANIFEST, {**fields, "seal": sha256_json(fields)})

    return harm


def listed(name: str):
    """List a file in the manifest that is outside of the bundle."""

    def harm(bundle: Path) -> None:
        (bundle.parent / "outside").write_text("secret")
        files = read_manifest(bundle, "bundle")["files"]
        manifest(files={**files, name: sha256_file(bundle / name)})(bundle)

    return harm


def nested(depth: int) -> dict[str, object]:
    return {"kind": "mapped", "inner": nested(depth - 1)} if depth else {"kind": "sasrec"}


def hidden(bundle: Path) -> None:
    (bundle / ".hidden").touch()
    listed(".hidden")(bundle)


def tensors(change):
    def harm(path: Path) -> None:
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return harm


def facts(**changes):
    return lambda bundle: sealed(bundle, **changes)


def model(change):
    """Change what the facts say of the variant and its language model."""

    def harm(bundle: Path) -> None:
        fields = read_json(bundle / FACTS)["model"]
        change(fields)
        sealed(bundle, model=fields)

    return harm


def users(**changes):
    """Change the settings of an ID model."""

    def harm(bundle: Path) -> None:
        sources = read_json(bundle / FACTS)["sources"]
        sources["id"]["users"].update(changes)
        sealed(bundle, sources=sources)

    return harm


def more_vectors_per_user(bundle: Path) -> None:
    sources = read_json(bundle / FACTS)["sources"]
    sources["id"]["vectors_per_user"] = 3
    sealed(bundle, sources=sources)


def neighbours(**changes):
    return lambda bundle: sealed(bundle, neighbours={**read_json(bundle / FACTS)["neighbours"], **changes})


def unlisted(name: str):
    """Leave a file out of the manifest, and alter it."""

    def harm(bundle: Path) -> None:
        data = (bundle / name).read_bytes()
        (bundle / name).unlink()
        sealed(bundle)
        (bundle / name).write_bytes(data)

    return harm


def linked(bundle: Path) -> None:
    path = bundle / VECTORS
    target = bundle.parent / "elsewhere.safetensors"
    path.rename(target)
    target.write_bytes(target.read_bytes()[:-1] + b"\0\0")
    path.symlink_to(target)


def a_pipe(bundle: Path) -> None:
    (bundle / VECTORS).unlink()
    os.mkfifo(bundle / VECTORS)


def a_pickle(bundle: Path) -> None:
    (bundle / "alignment.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    sealed(bundle)


HARMS = {
    "no manifest": (without(MANIFEST), MANIFEST),
    "no facts": (without(FACTS), FACTS),
    "no vectors": (without(VECTORS), VECTORS),
    "no items": (without("items.parquet"), "items.parquet"),
    "no alignment": (without("alignment.safetensors"), "alignment.safetensors"),
    "no neighbours": (without("neighbours/ease.parquet"), "ease.parquet"),
    "no encoders": (without("encoders.safetensors"), "encoders.safetensors"),
    "flipped neighbours": (flip("neighbours/ease.parquet", 0.5), "ease.parquet"),
    "flipped alignment": (flip("alignment.safetensors", 0.5), "alignment.safetensors"),
    "a manifest without facts": (rewritten(FACTS, Path.unlink), FACTS),
    "facts are a list": (rewritten(FACTS, lambda path: path.write_text("[]")), FACTS),
    "an unknown fact": (facts(scheme=1), "`schema`"),
    "flipped manifest": (flip(MANIFEST, 0.3), MANIFEST),
    "flipped facts": (flip(FACTS, 0.5), FACTS),
    "flipped vectors": (flip(VECTORS, 0.9), VECTORS),
    "flipped header": (flip(VECTORS, 0.0), VECTORS),
    "flipped items": (flip("items.parquet", 0.5), "items.parquet"),
    "flipped card": (flip("README.md", 0.5), "README.md"),
    "cut vectors": (cut(VECTORS), VECTORS),
    "cut items": (cut("items.parquet"), "items.parquet"),
    "cut manifest": (cut(MANIFEST), MANIFEST),
    "link": (linked, VECTORS),
    "pipe": (a_pipe, VECTORS),
    "pickle": (a_pickle, "alignment.safetensors"),
    "path out": (listed("../outside"), "../outside"),
    "absolute path": (listed("/etc/passwd"), "/etc/passwd"),
    "LoRA beyond all memory": (model(lambda fields: fields["settings"]["lora"].update(rank=50_000)), "lora.rank"),
    "newer schema": (facts(schema=99), "`schema`"),
    "no schema": (facts(schema=None), "`schema`"),
    "other kind": (manifest(kind="shards"), "shards"),
    "newer manifest": (manifest(schema=99), "schema 99"),
    "code": (
        facts(sources={"id": {"users": {"kind": "evil:Model"}, "dim": 16, "vectors_per_user": 1, "hash": ""}}),
        f"{FACTS} names evil:Model",
    ),
    "vectors of another size": (
        rewritten(VECTORS, tensors(lambda t: t.update({"ids/id": t["ids/id"][:, :3].contiguous()}))),
        VECTORS,
    ),
    "fewer vectors": (rewritten(VECTORS, tensors(lambda t: t.update({"model": t["model"][:5].contiguous()}))), VECTORS),
    "vectors that are not finite": (rewritten(VECTORS, tensors(lambda t: t["model"].fill_(float("nan")))), VECTORS),
    "vectors of another type": (rewritten(VECTORS, tensors(lambda t: t.update({"model": t["model"].int()}))), VECTORS),
    "vectors of a type that numpy lacks": (
        rewritten(VECTORS, tensors(lambda t: t.update({"model": t["model"].bfloat16()}))),
        VECTORS,
    ),
    "vectors lacking": (rewritten(VECTORS, tensors(lambda t: t.pop("model"))), VECTORS),
    "edited weights": (rewritten("alignment.safetensors", tensors(lambda t: t.pop(min(t)))), "alignment.safetensors"),
    "unknown part": (facts(parts={"mystery": {"weight": 1.0, "new_weight": 0.0}}), "mystery"),
    "weight that is no number": (facts(parts={"popularity": {"weight": "a lot", "new_weight": 0.0}}), "weight"),
    "no variant": (model(lambda m: m.pop("variant")), "model.variant"),
    "variant of another form": (model(lambda m: m["variant"].update(blocks="some")), "model.variant.blocks"),
    "no language model": (model(lambda m: m.pop("llm")), "model.llm"),
    "settings without a section": (model(lambda m: m["settings"].pop("readout")), "readout.module"),
    "setting of another type": (model(lambda m: m["settings"]["prompt"].update(max_history="many")), "max_history"),
    "prompts that are too short": (model(lambda m: m["settings"]["prompt"].update(max_tokens=3)), f"{FACTS}: prompt."),
    "tables without the catalogue": (
        facts(tables={"interactions": {}, "duplicates": "drop", "repeats": "first"}),
        "items",
    ),
    "neighbours that are not listed": (unlisted("neighbours/ease.parquet"), "neighbours/ease.parquet"),
    "vectors of a user that are more": (more_vectors_per_user, "sources.id.vectors_per_user"),
    "a file that is not listed": (unlisted("alignment.safetensors"), "alignment.safetensors"),
    "files that are not those of the hash": (manifest(files={}), "hash"),
    "an ID model without a size": (users(dim=None), "sources.id.users"),
    "an ID model of another size than its vectors": (users(dim=100_000), "sources.id"),
    "an ID model of other settings than its weights": (users(max_history=7), FACTS),
    "an ID model beyond all sizes": (users(max_history=10**12), "sources.id.users"),
    "a table of users": (users(kind="table"), "sources.id.users"),
    "a rule that is none": (users(kind="rule", rule="newest", half_life=1.0, max_history=3), "sources.id.users"),
    "a negative decay": (neighbours(decay=-0.5), "neighbours.decay"),
    "a decay that is no number": (neighbours(decay=float("nan")), "neighbours.decay"),
    "a fact of the language model that is not finite": (model(lambda m: m["llm"].update(kind=float("nan"))), FACTS),
    "a weight that is not finite": (facts(parts={"popularity": {"weight": 1e999, "new_weight": 0.0}}), "weight"),
    "columns of the log that are none": (
        lambda bundle: sealed(bundle, tables={**read_json(bundle / FACTS)["tables"], "interactions": {"user": 7}}),
        "interactions.user",
    ),
    "encoders that are not finite": (
        rewritten("encoders.safetensors", tensors(lambda t: t[min(t)].fill_(float("inf")))),
        "encoders.safetensors",
    ),
    "alignment that is not finite": (
        rewritten("alignment.safetensors", tensors(lambda t: t[min(t)].fill_(float("nan")))),
        "alignment.safetensors",
    ),
    "neighbours without a score": (
        rewritten("neighbours/ease.parquet", lambda path: pq.write_table(_unscored(pq.read_table(path)), path)),
        "ease.parquet",
    ),
    "counts of another type": (
        rewritten("items.parquet", lambda path: pq.write_table(_halved(pq.read_table(path)), path)),
        "items.parquet",
    ),
    "a table that belongs to nothing": (
        rewritten(VECTORS, tensors(lambda t: t.update({"ids/ghost": t["ids/id"].clone()}))),
        "ids/ghost",
    ),
    "vectors whose products overflow": (rewritten(VECTORS, tensors(lambda t: t["model"].fill_(3e38))), VECTORS),
    "neighbours whose sums overflow": (
        rewritten("neighbours/ease.parquet", lambda path: pq.write_table(_scored(pq.read_table(path), 3e38), path)),
        "ease.parquet",
    ),
    "neighbours of another type": (
        rewritten("neighbours/ease.parquet", lambda path: pq.write_table(_halves(pq.read_table(path)), path)),
        "ease.parquet",
    ),
    "ids that are no text": (
        rewritten("items.parquet", lambda path: pq.write_table(_not_utf8(pq.read_table(path)), path)),
        "items.parquet",
    ),
    "a hidden file": (hidden, ".hidden"),
    "a name in another form": (listed("./items.parquet"), "./items.parquet"),
    "maps of maps without end": (users(kind="mapped", inner=nested(500)), FACTS),
    "code that is a list": (model(lambda m: m["settings"]["alignment"].update(map=[])), "alignment.map"),
    "an ID model that is no source": (facts(id_model="other"), "'id'"),
    "no word for untitled items": (
        lambda bundle: sealed(bundle, tables={**read_json(bundle / FACTS)["tables"], "items": {"item": "item"}}),
        "untitled",
    ),
    "users of no kind": (
        facts(sources={"id": {"users": {}, "dim": 16, "vectors_per_user": 1, "hash": ""}}),
        "sources.id.users.kind",
    ),
    "repeated ids": (
        rewritten("items.parquet", lambda path: pq.write_table(_doubled(pq.read_table(path)), path)),
        "items.parquet",
    ),
    "columns lacking": (
        rewritten("items.parquet", lambda path: pq.write_table(pq.read_table(path).drop(["title"]), path)),
        "items.parquet",
    ),
    "neighbours beyond": (
        rewritten("neighbours/ease.parquet", lambda path: pq.write_table(_beyond(pq.read_table(path)), path)),
        "ease.parquet",
    ),
}


def _doubled(table: pa.Table) -> pa.Table:
    ids = table["item_id"].to_pylist()
    return table.set_column(0, "item_id", pa.array([ids[0], *ids[:1], *ids[2:]]))


def _unscored(table: pa.Table) -> pa.Table:
    return _scored(table, float("nan"))


def _scored(table: pa.Table, score: float) -> pa.Table:
    return table.set_column(2, "score", pa.array([score] * len(table), pa.float32()))


def _halves(table: pa.Table) -> pa.Table:
    return table.set_column(1, "neighbour_row", pa.array([3.5] * len(table)))


def _not_utf8(table: pa.Table) -> pa.Table:
    ids = pa.array([b"\xff%d" % row for row in range(len(table))]).view(pa.string())
    return table.set_column(0, "item_id", ids)


def _halved(table: pa.Table) -> pa.Table:
    return table.set_column(3, "train_count", pa.array([0.5] * len(table)))


def _beyond(table: pa.Table) -> pa.Table:
    return table.set_column(1, "neighbour_row", pa.array([10_000] * len(table), pa.int32()))


@pytest.mark.parametrize("name", HARMS)
def test_a_harmed_bundle_is_refused_by_name(bundle, tmp_path, monkeypatch, name):
    harm, named = HARMS[name]
    monkeypatch.chdir(tmp_path)
    harm(bundle)
    with pytest.raises(UserError) as error:
        rarec.load(bundle).recommend([["i001", "i002", "i003"]])
    assert named in str(error.value)
    assert error.value.remedy
    assert "docs/configuration.md" not in error.value.remedy  # whoever edits a bundle's file breaks its hash
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("histories", "named"),
    [
        ("i001", "list"),
        ([["i001"], "i002"], "list"),
        ([[1.5]], "1.5"),
        ([[None]], "None"),
        ([[["i001"]]], "i001"),
        ({"a": ["i001"]}, "list"),
        (None, "list"),
    ],
)
def test_what_is_no_list_of_histories_is_named(recommender, histories, named):
    with pytest.raises(UserError, match=named):
        recommender.recommend(histories)


def test_what_is_odd_and_means_something_is_served(recommender):
    known = recommender.items
    long = (known * 100_000)[:100_000]
    best = recommender.recommend([long, [known[0]] * 1000, [], [np.str_(known[1])]], k=10**9)
    assert [len(items) for items in best] == [0, len(known) - 1, len(known), len(known) - 1]
    assert len(recommender.recommend([], k=3)) == 0
    assert recommender.recommend([["nothing", ""]], k=2).unknown == [2]


def test_odd_titles_are_items_like_others(bundle):
    odd = [
        ("[SEP] [CLS] [PAD]", ""),
        ("x" * 100_000, "y" * 100_000),
        ("", ""),
        ("\x1b[31mred\x00", ""),
        ("😀", "ä\u202e"),
    ]
    items = [{"item": f"odd{row}", "title": title, "brand": text} for row, (title, text) in enumerate(odd)]
    table = bundle.parent / "new.jsonl"
    table.write_text("\n".join(map(json.dumps, items)))
    added = rarec.load(with_items(bundle, table))
    ids = [item["item"] for item in items]
    assert np.isfinite(added.item_vectors(ids)).all()
    assert set(ids) <= {item.item for item in added.recommend([added.items[:2]], k=10**6)[0]}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "tpu"}, "tpu"),
        ({"device": "cuda"}, "cuda"),
        ({"llm": "/nowhere/model"}, "/nowhere/model"),
        ({"llm": "OTHER"}, "another language model"),
    ],
)
def test_a_language_model_or_device_that_does_not_fit_is_named(bundle, tmp_path, options, named):
    if options.get("llm") == "OTHER":
        options = {"llm": str(write_llm(tmp_path / "other", "bert", hidden=64))}
    with pytest.raises(UserError, match=named) as error:
        rarec.load(bundle, **options).recommend([["i001", "i002"]])
    assert error.value.remedy


@pytest.mark.parametrize(
    ("log", "columns", "named"),
    [
        (None, None, "nowhere.csv"),
        ("user,item,time\n", None, "no rows"),
        ("user,thing,time\nu,i001,1\n", None, "item"),
        ("user,item,time\nu,i001,yesterday\n", None, "yesterday"),
        ("user,item,time\nu,i001,1\n", "item", "--columns"),
        ("user,item,time\nu,i001,1\n", "price=item", "--columns"),
        ("user,item,time\nu,i001,1\n", "item=nothing", r"log\.csv .*nothing.*--columns item"),
    ],
)
def test_a_log_that_cannot_be_read_is_named_and_nothing_is_written(bundle, tmp_path, log, columns, named):
    path = tmp_path / "nowhere.csv"
    if log is not None:
        path = tmp_path / "log.csv"
        path.write_text(log)
    before = set(tmp_path.rglob("*"))
    for options in ({"everyone": True, "out": tmp_path / "top.csv"}, {"user": "u"}):
        with pytest.raises(UserError, match=named):
            cli_bundle.recommend(bundle, log=str(path), columns=columns, **options)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused_for_all_users_too(bundle, tmp_path, device):
    with pytest.raises(UserError, match=f"--device is '{device}'"):
        cli_bundle.recommend(bundle, everyone=True, log="log.csv", out=tmp_path / "top.csv", device=device)


def test_a_log_of_unknown_items_is_refused_by_the_ids_of_both(bundle, tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item,time\nu,1.0,1\n")
    for options in ({"everyone": True, "out": tmp_path / "top.csv"}, {"user": "u"}):
        with pytest.raises(UserError, match=r"log\.csv.*catalogue(.|\n)*'1\.0'.*'i000'"):
            cli_bundle.recommend(bundle, log=str(log), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "log.csv"}


def test_the_ids_of_a_log_that_match_nothing_are_said(bundle, tmp_path, capsys):
    log = tmp_path / "log.csv"
    log.write_text("user,item,time\nu,i001,1\nu,nothing,2\nv,neither,1\n")
    cli_bundle.recommend(bundle, log=str(log), everyone=True, out=tmp_path / "top.csv")
    said = capsys.readouterr().err
    assert "2 of 3 items are not in the catalogue" in said
    assert "1 of 2 users" in said


def test_the_command_says_what_was_skipped(bundle, tmp_path, capsys):
    cli_bundle.recommend(bundle, history="nothing, i001,,", k=2)
    said = capsys.readouterr()
    assert "1 of 2 items are not in the catalogue: skipped" in said.err
    assert len(said.out.splitlines()) == 2
