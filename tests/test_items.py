"""New and removed items without training: a new version of a bundle, in which no other item's score changes."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rarec
from rarec import cli_bundle
from rarec.bundle.bundle import Bundle
from rarec.bundle.items import columns_of, read_columns, remove_items
from rarec.bundle.parts import unknown_users
from rarec.bundle.write import next_version
from rarec.config.schema import Prepare
from rarec.data.preparation.inputs import table_location
from rarec.entry import open_run
from rarec.errors import UserError
from tests.recommending import exported, with_items, without_items

NEW = """item,title,brand
n1,"amber lamp, large",acme
n2,[SEP] lamp,
n3,,
"""


@pytest.fixture
def bundle(run, tmp_path) -> Path:
    """The bundle alone, elsewhere."""
    return shutil.copytree(run.directory("export"), tmp_path / "bundle")


def add(bundle: Path, text: str = NEW, **options) -> Path:
    table = bundle.parent / "new.csv"
    table.write_text(text)
    return with_items(bundle, table, **options)


def scores(bundle: Path, histories) -> dict[str, list[float]]:
    """Return the score of every item after some histories."""
    served = rarec.load(bundle)
    lists = served.recommend(histories, k=10**6, exclude_seen=False, fallback="none")
    by_item = [{entry.item: entry.score for entry in items} for items in lists]
    return {item: [result[item] for result in by_item] for item in served.items}


def test_added_items_are_recommended_and_no_other_score_changes(bundle):
    histories = [rarec.load(bundle).items[:4], rarec.load(bundle).items[7:9], []]
    before = scores(bundle, histories)
    added = add(bundle)
    assert added == bundle.with_name("bundle-2")
    after = scores(added, histories)
    assert after.keys() - before.keys() == {"n1", "n2", "n3"}
    for item, result in before.items():
        assert after[item] == pytest.approx(result, abs=1e-5)
    assert all(np.isfinite(after[item]).all() for item in after)
    assert after["n1"] != after["n2"]
    served = rarec.load(added)
    assert served.recommend([["n1", "n2"]], k=3).unknown == [0]


def test_an_added_item_is_what_the_same_item_was_before_it_was_removed(run, bundle, tmp_path):
    """Its text alone says what the text alone said: the vectors of a row without ID vectors are equal."""
    text_only = exported(run, tmp_path, "export.variant=text_only").directory("export")
    known = rarec.load(text_only)
    item, title = known.items[5], known.bundle.catalogue.titles[5]
    brand = known.bundle.catalogue.texts[5]
    fewer = without_items(text_only, [item])
    again = add(fewer, f'item,title,brand\n{item},"{title}","{brand}"\n')
    assert again.name == "bundle-3"
    assert rarec.load(again).item_vectors([item]) == pytest.approx(known.item_vectors([item]), abs=1e-5)


def test_in_a_row_without_a_model_an_added_item_has_its_words_and_what_new_items_have(run, tmp_path):
    """Its words have a weight of their own; what the parts that know no new item say adds nothing."""
    known = exported(run, tmp_path, "export.variant=id_only+cheap").directory("export")
    old, history = rarec.load(known), rarec.load(known).items[:4]
    title = old.bundle.catalogue.titles[1]
    added = rarec.load(add(known, f'item,title,brand\nalike,"{title}",\nother,zyzzyva,\n'))
    result = {entry.item: entry.score for entry in added.recommend([history], k=10**6, exclude_seen=False)[0]}
    parts = old.bundle.facts["parts"]
    assert result["other"] == pytest.approx(parts["new"]["new_weight"], abs=1e-5)
    words = parts["lexical"]["new_weight"] * added.parts.rankers["lexical"].scores(unknown_users([np.arange(4)]))[0]
    assert result["alike"] == pytest.approx(result["other"] + words[-2], abs=1e-5)
    alike, other = (added.explain(history, item).parts for item in ("alike", "other"))
    assert {title for title in alike if alike[title] != other[title]} == {"similar words (TF-IDF)"}


def test_an_evaluation_takes_the_vectors_for_new_items_that_an_added_item_gets(bundle):
    """So the weights that are fitted there fit here."""
    parts = rarec.load(bundle).parts
    catalogue, rows = parts.bundle.catalogue, np.array([3, 0, 7])
    titles, texts = ([column[row] for row in rows] for column in (catalogue.titles, catalogue.texts))
    nothing = {name: np.zeros((len(rows), source.dim), np.float32) for name, source in parts.encoder.sources.items()}
    added = parts.model.encode_new(titles, texts, nothing)
    assert parts.encoder.ranker().unmet(rows) == pytest.approx(added, abs=1e-5)
    assert np.abs(parts.encoder.items(rows) - added).max() > 1e-3


def test_a_given_id_vector_is_taken(bundle, tmp_path):
    served = rarec.load(bundle)
    vectors = served.bundle.vectors["ids/id"]
    pq.write_table(pa.table({"id": ["n1"], "vector": [vectors[3].tolist()]}), tmp_path / "v.parquet")
    added = rarec.load(add(bundle, vectors=[f"id={tmp_path / 'v.parquet'}"]))
    assert added.bundle.vectors["ids/id"][-3:] == pytest.approx(np.stack([vectors[3], 0 * vectors[3], 0 * vectors[3]]))
    plain = rarec.load(add(bundle, out=tmp_path / "plain"))
    assert not np.allclose(added.item_vectors(["n1"]), plain.item_vectors(["n1"]))
    assert np.allclose(added.item_vectors(["n2"]), plain.item_vectors(["n2"]))


def test_removed_items_are_gone_and_the_others_keep_their_vectors(bundle):
    known = rarec.load(bundle)
    gone = known.items[2:5]
    fewer = rarec.load(without_items(bundle, gone))
    kept = [item for item in known.items if item not in gone]
    assert fewer.items == kept
    assert np.array_equal(fewer.item_vectors(), known.item_vectors(kept))
    result = fewer.recommend([known.items[:8]], k=10**6, exclude_seen=False)
    assert result.unknown == [3]
    assert {entry.item for entry in result[0]} == set(kept)


def test_every_version_is_whole_and_says_what_it_was_made_from(bundle):
    first = rarec.load(bundle).bundle.manifest
    second = rarec.load(add(bundle)).bundle.manifest
    assert second["made_from"]["bundle"] == first["hash"]
    assert second["versions"] == [{"added": 3, "of": first["hash"]}]
    assert second["metrics"] == first["metrics"]
    assert rarec.load(bundle).bundle.manifest["hash"] == first["hash"]


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("item,title,brand\nKNOWN,known,\n", {}, "is in .* already"),
        ("item,title,brand\nn1,a,\nn1,b,\n", {}, "repeat"),
        ("item,title,brand\n", {}, "no rows"),
        ("item,name,brand\nn1,a,\n", {}, "title"),
        (NEW, {"columns": "name=title"}, "--columns"),
        (NEW, {"vectors": ["id"]}, "NAME=FILE"),
        (NEW, {"vectors": ["id=nowhere.parquet"]}, "nowhere.parquet"),
        (NEW, {"vectors": ["other=VECTORS"]}, "'other'"),
        (NEW, {"vectors": ["id=VECTORS"]}, "shape"),
    ],
)
def test_what_cannot_be_added_is_named_and_nothing_is_left(bundle, tmp_path, text, options, named):
    pq.write_table(pa.table({"id": ["n1"], "vector": [[1.0, 2.0]]}), tmp_path / "v.parquet")
    options = {
        key: [entry.replace("VECTORS", str(tmp_path / "v.parquet")) for entry in value] if key == "vectors" else value
        for key, value in options.items()
    }
    with pytest.raises(UserError, match=named):
        add(bundle, text.replace("KNOWN", str(rarec.load(bundle).items[3])), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "new.csv", "v.parquet"}


def test_a_folder_that_is_there_is_never_replaced(bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine"):
        add(bundle, out=tmp_path / "mine")
    with pytest.raises(UserError, match="mine"):
        without_items(bundle, rarec.load(bundle).items[:1], tmp_path / "mine")
    assert not any((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("gone", ["README.md", ""])
def test_a_bundle_that_is_removed_while_a_version_is_written_is_named(bundle, gone):
    opened = Bundle.open(bundle)
    shutil.move(bundle / gone, bundle.parent / "elsewhere")
    with pytest.raises(UserError, match=f"{bundle}.* was removed") as error:
        remove_items(opened, [opened.catalogue.ids[0].as_py()])
    assert error.value.remedy
    assert {path.name for path in bundle.parent.iterdir()} <= {bundle.name, "elsewhere"}


def test_two_writers_at_once_lose_nothing(bundle, tmp_path):
    """Each gets a version of its own; where both name the folder, one is refused, and the other's stays."""
    removed = rarec.load(bundle).items[:6]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: cli_bundle.remove(bundle, [item]), removed[:3]))
        versions = [set(rarec.load(tmp_path / f"bundle-{number}").items) for number in (2, 3, 4)]
        assert {item for version in versions for item in removed[:3] if item not in version} == set(removed[:3])
        runs = [pool.submit(cli_bundle.remove, bundle, [item], tmp_path / "new") for item in removed[3:]]
    refused = [run.exception() for run in runs if run.exception()]
    assert [type(error) for error in refused] == [UserError] * 2
    assert all("new is there already" in str(error) for error in refused)
    assert len(rarec.load(tmp_path / "new").items) == len(rarec.load(bundle).items) - 1


def test_a_name_that_only_looks_like_a_number_is_a_name(bundle):
    odd = bundle.rename(bundle.with_name("b-²"))
    assert next_version(odd).name == "b-²-2"


def test_a_version_of_the_folder_that_one_stands_in_is_beside_it(bundle, monkeypatch):
    monkeypatch.chdir(bundle)
    assert next_version(Path()) == bundle.with_name("bundle-2")
    assert next_version(Path("../bundle")).resolve() == bundle.with_name("bundle-2")
    (bundle / "inside").mkdir()
    monkeypatch.chdir(bundle / "inside")
    assert next_version(Path("..")) == bundle.with_name("bundle-2")


def test_what_cannot_be_removed_is_named(bundle):
    everything = rarec.load(bundle).items
    for items, named in ((["nothing"], "'nothing'"), (everything, "no item")):
        with pytest.raises(UserError, match=named):
            without_items(bundle, items)


def test_a_bundle_of_a_table_of_vectors_alone_takes_new_items(run, tmp_path):
    """The ID model knows nothing of them: they score as the mean item."""
    ids = exported(run, tmp_path, "export.variant=id_only").directory("export")
    added = add(ids)
    assert len(rarec.load(added).recommend([rarec.load(ids).items[:3]], k=10**6)[0]) == len(rarec.load(added).items) - 3


def test_where_a_new_item_would_stand_is_where_it_stands_when_it_is_added(bundle):
    table = bundle.parent / "new.jsonl"
    table.write_text('{"item": "new", "title": "amber lamp", "brand": "river"}')
    before = rarec.load(bundle, device="cpu")
    after = rarec.load(with_items(bundle, table), device="cpu")
    for history in ([], before.items[:1], before.items[3:9]):
        place = before.place(history, "amber lamp", "river", around=2)
        ranking = after.recommend([history], k=10**6, fallback="none")[0]
        at = [entry.item for entry in ranking].index("new")
        assert (place.rank, place.of) == (at + 1, len(ranking))
        assert place.score == pytest.approx(ranking[at].score, rel=1e-4, abs=1e-5)
        for beside, expected in ((place.above, ranking[max(0, at - 2) : at]), (place.below, ranking[at + 1 : at + 3])):
            assert [entry.score for entry in beside] == pytest.approx(
                [entry.score for entry in expected], rel=1e-4, abs=1e-5
            )


# ---- columns that rules may name


STOCK = """sku,in_stock,price,kind,released,note
i002,true,9.5,lamp,2024-03-01,
i005,FALSE,20,chair,2023-01-01T10:00:00,
i009,True,,lamp,,
new,true,1,lamp,2020-01-01,
"""


def update(bundle: Path, text: str, names: list[str], **options) -> Path:
    table, made = bundle.parent / "stock.csv", next_version(bundle)
    table.write_text(text)
    cli_bundle.update(bundle, str(table), names, columns="item=sku", **options)
    return made


def test_columns_of_a_table_choose_items_and_nothing_else_changes(bundle, capsys):
    made = update(bundle, STOCK, ["in_stock", "price", "kind", "note"], date="released")
    assert "1 items of" in capsys.readouterr().err
    served, before = rarec.load(made), rarec.load(bundle)
    columns = served.bundle.catalogue.columns
    assert [str(column.type) for column in columns.values()] == ["bool", "double", "string", "string", "timestamp[us]"]
    history = [before.items[0]]
    for condition, items in {
        "in_stock = true": ["i002", "i009"],
        "price > 9.5": ["i005"],
        "kind = 'lamp' and price is null": ["i009"],
        "released >= '2023-01-01 10:00:00'": ["i002", "i005"],
        "note is not null": [],
    }.items():
        assert {entry.item for entry in served.recommend([history], where=condition)[0]} == set(items)
    assert [entry.item for entry in served.recommend([[]], k=2, fallback="recent")[0]] == ["i002", "i005"]
    assert served.recommend([history], k=50)[0] == before.recommend([history], k=50)[0]
    assert served.bundle.manifest["versions"][-1]["updated"] == ["in_stock", "price", "kind", "note", "released"]


def test_an_update_keeps_what_the_table_does_not_say(bundle):
    first = update(bundle, STOCK, ["in_stock", "price"], date="released")
    second = update(first, "sku,in_stock\ni005,true\ni002,false\n", ["in_stock"])
    columns = rarec.load(second).bundle.catalogue.columns
    assert {name: [columns[name][row].as_py() for row in (2, 5, 9, 0)] for name in ("in_stock", "price")} == {
        "in_stock": [False, True, True, None],
        "price": [9.5, 20, None, None],
    }
    assert rarec.load(second).bundle.date == "released"


def test_added_items_bring_their_columns_and_removed_ones_take_them(bundle):
    known = update(bundle, STOCK, ["in_stock", "price"])
    with pytest.raises(UserError, match="no column 'in_stock'"):
        add(known)
    added = add(known, "item,title,brand,in_stock,price\nn1,lamp,,true,3\nn2,lamp,,,4.5\n")
    catalogue = rarec.load(added).bundle.catalogue
    assert catalogue.columns["in_stock"][-2:].to_pylist() == [True, None]
    assert catalogue.columns["price"][-2:].to_pylist() == [3, 4.5]
    with pytest.raises(UserError, match="column 'in_stock' does not hold true or false in every row: 'maybe'"):
        add(known, "item,title,brand,in_stock,price\nn1,lamp,,maybe,3\n", out=bundle.parent / "no")
    fewer = rarec.load(without_items(added, ["i002", "n2"])).bundle.catalogue
    assert fewer.columns["in_stock"].drop_null().to_pylist() == [False, True, True]


@pytest.mark.parametrize(
    ("text", "names", "options", "problem"),
    [
        ("sku,a\nx,1\n", ["a"], {}, "no item is in"),
        ("sku,a\ni001,1\n", ["b"], {}, "no column 'b'"),
        ("sku,a\ni001,1\n", [], {}, "no column is named"),
        ("sku,a\ni001,1\n", ["title"], {}, "a bundle has 'title' of its own"),
        ("sku,a\ni001,soon\n", [], {"date": "a"}, "holds text"),
    ],
)
def test_columns_that_cannot_be_taken_are_refused(bundle, text, names, options, problem):
    with pytest.raises(UserError, match=problem) as refused:
        update(bundle, text, names, **options)
    assert refused.value.remedy
    assert not bundle.with_name("bundle-2").exists()


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        (["1", "-20", ""], "int64", [1, -20, None]),
        (["1", "2.5", "1e3"], "double", [1, 2.5, 1000]),
        (["007", "1", "2"], "string", ["007", "1", "2"]),
        (["true", "False", ""], "bool", [True, False, None]),
        (["0", "1", "1"], "int64", [0, 1, 1]),
        (["", "", ""], "string", [None, None, None]),
        (
            ["2024-01-31", "2024-01-31 10:00", ""],
            "timestamp[us]",
            [datetime(2024, 1, 31), datetime(2024, 1, 31, 10), None],
        ),
        (
            ["2024-01-31T10:00:00+02:00", "2024-01-31T10:00Z", ""],
            "timestamp[us]",
            [datetime(2024, 1, 31, 8), datetime(2024, 1, 31, 10), None],
        ),
        (["2024-13-31", "2024-01-31", ""], "string", ["2024-13-31", "2024-01-31", None]),
        (["99999999999999999999", "1", "2"], "double", None),
    ],
)
def test_the_type_of_a_column_of_text_is_found(tmp_path, bundle, values, kind, read):
    ids = rarec.load(bundle).items[:3]
    (tmp_path / "t.csv").write_text(
        "item,a\n" + "".join(f"{item},{value}\n" for item, value in zip(ids, values, strict=True))
    )
    opened = Bundle.open(bundle)
    prepare = opened.prepare(items={"path": str(tmp_path / "t.csv")})
    location = table_location(prepare.items, "prepare.items")
    columns, rows, unknown = read_columns(prepare, location, ["a"], opened.catalogue.ids, {})
    assert (str(columns["a"].type), unknown) == (kind, [])
    assert rows.to_pylist()[:4] == [0, 1, 2, None]
    if read is not None:
        assert columns["a"][:3].to_pylist() == read


def test_columns_of_a_table_with_types_keep_them(tmp_path):
    days = pa.array(["2024-01-02", None, "2024-01-03"]).cast(pa.date32())
    given = {"item": [7, 8, 7], "n": pa.array([1, None, 3], pa.int32()), "x": [0.5, float("nan"), 1.0], "day": days}
    pq.write_table(pa.table({**given, "ok": [True, False, None], "parts": [[1], [2], [3]]}), tmp_path / "t.parquet")
    items = {"path": str(tmp_path / "t.parquet"), "item": "item", "title": "-", "columns": ["n", "x", "ok"]}
    log = {"path": "-", "user": "-", "item": "-", "time": "-"}
    columns = columns_of(Prepare(interactions=log, items={**items, "date": "day"}), pa.array([8, 9, 7]))
    assert {name: column.to_pylist() for name, column in columns.items()} == {
        "n": [None, None, 1],
        "x": [None, None, 0.5],
        "ok": [False, None, True],
        "day": [None, None, datetime(2024, 1, 2)],
    }
    for field, problem in ({"columns": ["parts"]}, "'parts'.*holds"), ({"date": "ok"}, "holds true or false"):
        with pytest.raises(UserError, match=problem):
            columns_of(Prepare(interactions=log, items={**items, **field}), pa.array([8]))


@pytest.mark.slow
def test_columns_of_the_configuration_are_in_the_bundle_and_shape_nothing_else(tiny_runs, tmp_path, monkeypatch):
    """No stage before the export is made again, and a bundle without columns is as it was."""
    monkeypatch.chdir(tiny_runs.copy("finished", tmp_path / "world"))
    table, config = Path("log/items.csv"), Path("config.yaml")
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([f"{header},stock", *(f"{line},{row}" for row, line in enumerate(lines))]) + "\n")
    assert open_run(config).stage("export").is_done()
    run = open_run(config, ["prepare.items.columns=[stock]", "prepare.items.date=stock"])
    run.make("export", fresh=True)
    served = rarec.load(run.directory("export"))
    assert served.bundle.catalogue.columns["stock"].to_pylist() == list(range(len(lines)))
    assert {entry.item for entry in served.recommend([["i020"]], where="stock < 2")[0]} == {"i000", "i001"}
    assert served.recommend([[]], 1, fallback="recent")[0][0].item == served.items[-1]
    with pytest.raises(UserError, match=r"no column 'stok'.*did you mean `stock`"):
        open_run(config, ["prepare.items.columns=[stok]"]).make("export", fresh=True)
