"""The loop with the shop is closed: what was shown is noted, clicks are joined with it, a shadow is compared."""

import json
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarec.bundle.recommended import Recommended
from rarec.errors import UserError
from rarec.report.clicks import click_rate, count_clicks, difference, lines
from rarec.serve.batcher import Answer
from rarec.serve.bundle_manager import overlap_of
from rarec.serve.impressions import Impressions
from rarec.serve.settings import ImpressionSettings, ServeSettings, read_settings
from rarec.serve.telemetry import Metrics
from rarec.storage.files import hash_user, read_key
from tests.commands import Command, run_command
from tests.serving import service
from tests.test_http import post, served, wait_for


def answer(*items: Any) -> Answer:
    return Answer([Recommended(item, "", 1.0 / rank) for rank, item in enumerate(items, 1)], 0)


def shown(folder: Path, lists: Sequence[tuple[str, str, str | None, str]], kind: str = "parquet") -> None:
    """Write lists: id, bundle, user and items of one letter each."""
    impressions = Impressions(ImpressionSettings(path=str(folder), format=kind), Metrics())
    impressions.start()
    for name, bundle, user, items in lists:
        impressions.add({"id": name, "bundle": bundle, "version": "1"}, user, [answer(*items)], {})
    impressions.close()


LISTS = [("1", "old", "u", "abc"), ("2", "old", "u", "abd"), ("3", "old", "v", "abc"), ("4", "new", "w", "cab")]


def clicks(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_clicks_by_id_are_counted_by_bundle_and_by_place(tmp_path, kind):
    shown(tmp_path / "shown", LISTS, kind)
    table = clicks(tmp_path / "clicks.parquet", id=["1", "1", "1", "4", "9", "2"], item=["a", "a", "c", "b", "a", "z"])
    new, old = count_clicks(tmp_path / "shown", table, {})
    assert (old.bundle, old.lists, old.rate.mean) == ("old 1", 3, pytest.approx(1 / 3)), "two clicks on a are one"
    assert old.by_rank == {1: pytest.approx(1 / 3), 2: 0.0, 3: pytest.approx(1 / 3)}
    assert (new.bundle, new.lists, new.rate.mean, new.by_rank) == ("new 1", 1, 1.0, {1: 0.0, 2: 0.0, 3: 1.0})
    first, *_ = lines([new, old])
    assert first.startswith("new 1: 100.00% [")
    assert "beside old 1" in first


def test_clicks_by_user_are_on_the_newest_list_that_the_user_saw_before(tmp_path):
    shown(tmp_path / "shown", LISTS)
    now = time.time()
    table = clicks(
        tmp_path / "clicks.parquet",
        customer=["u", "u", "v", "w", "w", None],
        item=["a", "c", "a", "a", "a", "a"],
        time=[now + 60, now + 60, now - 3600, now + 60, now + 7 * 86_400, now],
    )
    new, old = count_clicks(tmp_path / "shown", table, {"user": "customer"})
    assert old.rate.mean == pytest.approx(2 / 3), "a in the second list of u, c in the first; v clicked before"
    assert old.by_rank[1] == pytest.approx(1 / 3)
    assert new.rate.mean == 1.0


@pytest.mark.parametrize(
    ("columns", "given", "named"),
    [
        ({"id": ["9"], "item": ["a"]}, {}, "none of 1 clicks"),
        ({"user": ["x"], "item": ["a"], "time": [0.0]}, {}, "none of 1 clicks"),
        ({"item": ["a"]}, {}, "user"),
        ({"id": ["1"], "item": ["a"]}, {"id": "answer"}, "answer"),
    ],
)
def test_a_table_that_is_on_no_list_is_refused_by_name(tmp_path, columns, given, named):
    shown(tmp_path / "shown", LISTS)
    with pytest.raises(UserError, match=named) as caught:
        count_clicks(tmp_path / "shown", clicks(tmp_path / "clicks.parquet", **columns), given)
    assert "clicks.parquet" in caught.value.problem


def test_without_the_key_users_cannot_be_joined_and_ids_can(tmp_path):
    shown(tmp_path / "shown", LISTS)
    (tmp_path / "shown" / "user.key").unlink()
    with pytest.raises(UserError, match="user"):
        count_clicks(tmp_path / "shown", clicks(tmp_path / "c.parquet", user=["u"], item=["a"], time=[0.0]), {})
    assert count_clicks(tmp_path / "shown", clicks(tmp_path / "c.parquet", id=["1"], item=["a"]), {})


def test_the_command_prints_rates_or_one_error(tmp_path):
    shown(tmp_path / "shown", LISTS)
    table = clicks(tmp_path / "clicks.parquet", answer=["4"], sku=["b"])
    words = ["clicks", "shown", table, "--columns", "id=answer,item=sku"]
    for name in (words, ["report", *words]):
        told = run_command(Command(name, str(tmp_path)))
        assert told.code == 0, told.stderr
        assert "new 1: 100.00%" in told.stdout
    for words in (["clicks", "one"], ["clicks", "nowhere", table], ["report", "mine.yaml", "--columns", "id=x"]):
        refused = run_command(Command(words, str(tmp_path)))
        assert (refused.code, refused.stderr.count("error: ")) == (2, 1), refused.stderr


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_lists_of_different_users_have_wilsons_interval(clicked):
    """Where each cluster is one list, it is Wilson's but for the n - 1 of the variance."""
    rate = click_rate(np.array(clicked, np.int64), np.ones(len(clicked), np.int64))
    n, p, z = len(clicked), sum(clicked) / len(clicked), 1.959964
    number = n - 1 if 0 < p < 1 else n
    middle, spread = p + z**2 / (2 * number), z * (p * (1 - p) / number + (z / (2 * number)) ** 2) ** 0.5
    expected = (middle - spread) / (1 + z**2 / number), (middle + spread) / (1 + z**2 / number)
    assert (rate.low, rate.high) == pytest.approx(expected, abs=1e-6)
    assert 0 <= rate.low <= rate.mean <= rate.high <= 1


def test_lists_of_one_user_are_worth_less_than_those_of_many():
    many = click_rate(np.tile([1, 0], 50), np.ones(100, np.int64))
    few = click_rate(np.tile([10, 0], 5), np.full(10, 10))
    assert many.mean == few.mean == 0.5
    assert few.high - few.low > 2 * (many.high - many.low)
    apart = difference(many, few)
    assert apart.low < 0 < apart.high


# ---- what is written


@pytest.fixture(scope="module")
def bundle(run) -> Path:
    return run.directory("export")


def settings(bundle: Path, folder: Path, **fields: Any) -> ServeSettings:
    impressions = {"path": str(folder), "seconds": 0.1, **fields}
    return ServeSettings(bundles={"a": {"path": str(bundle)}}, device="cpu", impressions=impressions)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_each_answer_is_noted_with_its_id_and_a_hash_of_the_user(bundle, tmp_path, kind):
    with served(settings(bundle, tmp_path, format=kind)) as client:
        said = post(client, "recommend", histories=[["i001"], ["i002"]], k=3, user="somebody", deny=["i003"])
        wait_for(lambda: list(tmp_path.glob(f"*.{kind}")))
        assert 'rarec_impressions_total{outcome="written"} 2.0' in client.get("/metrics").text
    (file,) = tmp_path.glob(f"*.{kind}")
    rows = pq.read_table(file).to_pylist() if kind == "parquet" else list(map(json.loads, file.open()))
    assert [row["id"] for row in rows] == [said["id"]] * 2
    assert [row["items"] for row in rows] == [[one["item"] for one in each["items"]] for each in said["results"]]
    assert rows[1]["scores"] == pytest.approx([one["score"] for one in said["results"][1]["items"]], rel=1e-5)
    assert {row["user"] for row in rows} == {hash_user(read_key(tmp_path), "somebody")}
    assert {(row["bundle"], row["version"]) for row in rows} == {(said["bundle"], said["version"])}
    assert set(json.loads(rows[0]["rules"])) == {"k", "deny"}
    assert [row["place"] for row in rows] == [0, 1]
    assert (tmp_path / "user.key").stat().st_mode & 0o077 == 0
    assert "somebody" not in file.read_bytes().decode("latin-1")


@pytest.mark.slow
def test_a_full_disk_stops_no_answer_and_what_is_lost_is_counted_and_said_once(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")  # what Python compiles would be cut off, too
    (tmp_path / "serve.yaml").write_text(
        f"bundles: {{a: {{path: {bundle}}}}}\ndevice: cpu\n"
        "impressions: {path: shown, format: jsonl, seconds: 0.1, max_rows: 5}\n"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # bytes of a file, which is what a full disk says, too
    try:
        with service("--settings", tmp_path / "serve.yaml") as started:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

            def count(outcome: str) -> float:
                text = httpx.get(f"{started.url}/metrics").text.splitlines()
                found = [line for line in text if line.startswith(f'rarec_impressions_total{{outcome="{outcome}"')]
                return float(found[0].split()[1]) if found else 0.0

            for _ in range(20):
                asked = {"histories": [["i001"]], "k": 10}
                assert httpx.post(f"{started.url}/v1/recommend", json=asked, timeout=30).status_code == 200
            assert count("lost") == 10
            assert len(started.events("impressions")) == 1
            resource.prlimit(started.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
            wait_for(lambda: count("written") == 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in (tmp_path / "shown").iterdir() if path.name.startswith(".")]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_served(bundle, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="impressions"), served(settings(bundle, tmp_path / "file")):
        pass


# ---- the shadow


def test_lists_are_compared_by_the_share_of_common_items():
    assert overlap_of(answer("a", "b"), answer("b", "c")) == 0.5
    assert overlap_of(answer("a"), answer("a", "b", "c", "d")) == 0.25
    assert overlap_of(answer(), answer()) == 1.0


def test_the_shadow_is_asked_beside_and_its_agreement_is_a_metric(bundle, tmp_path):
    (tmp_path / "serve.yaml").write_text(
        f"bundles: {{a: {{path: {bundle}}}, b: {{path: {bundle}, share: 0}}}}\ndevice: cpu\n"
        "shadow: {bundle: b, share: 1}\n"
    )
    with served(read_settings(tmp_path / "serve.yaml")) as client:

        def count(line: str) -> float:
            found = [each for each in client.get("/metrics").text.splitlines() if each.startswith(line)]
            return sum(float(each.split()[-1]) for each in found)

        assert post(client, "recommend", histories=[["i001"], ["i002"]])["bundle"] == "a"
        wait_for(lambda: count("rarec_shadow_overlap_count") == 2 or count('rarec_shadow_total{outcome="dropped"}'))
        if count("rarec_shadow_overlap_count"):
            assert count("rarec_shadow_overlap_sum") == 2.0, "it is the same bundle"
        post(client, "recommend", histories=[["i001"]], bundle="b")
        assert count("rarec_shadow_total") == 1, "the shadow does not ask itself"


def test_a_shadow_that_is_no_bundle_is_refused(tmp_path):
    (tmp_path / "serve.yaml").write_text("bundles: {a: {path: one}}\nshadow: {bundle: b}\n")
    with pytest.raises(UserError, match="shadow"):
        read_settings(tmp_path / "serve.yaml")
