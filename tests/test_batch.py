"""Recommendations for users of any log: their histories, one file for all, kills, ranks."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rarec import cli_bundle
from rarec.bundle import users
from rarec.bundle.users import open_log, recommend_all
from rarec.errors import UserError
from rarec.storage import parts
from tests.ranks import ROOT, free_port
from tests.recommending import batch_of, tied_log


@pytest.fixture(scope="module")
def log(run) -> str:
    return str(run.config.prepare.interactions.path)


def histories(recommender, log: str, **columns: str) -> dict[str, list[str]]:
    with open_log(recommender.bundle, log, print, columns) as (count, users_of_log):
        items = {user: [recommender.items[row] for row in rows] for user, rows in users_of_log}
        assert count == len(items)
    return items


def test_histories_are_those_of_the_prepared_dataset(run, recommender, log):
    result, dataset = histories(recommender, log), run.dataset
    ids = np.array(list(dataset.item_ids))
    for row, user in enumerate(dataset.user_ids):
        assert result[user] == ids[dataset.sequence(row)].tolist()


def test_every_user_is_served_however_few_the_purchases(recommender, tmp_path):
    known = recommender.items
    rows = [("b", known[1], 2), ("b", known[0], 1), ("a", known[2], 1), ("a", known[2], 1), ("c", "nothing", 1)]
    pd.DataFrame(rows, columns=["customer", "item", "time"]).to_csv(tmp_path / "log.csv", index=False)
    result = histories(recommender, str(tmp_path / "log.csv"), user="customer")
    assert result == {"a": [known[2]], "b": [known[0], known[1]]}


def renamed(path: Path, items: list[str], *names: str) -> str:
    """Write a log of one user with columns of these names; return its path."""
    rows = [("b", items[1], 2, "x"), ("b", items[0], 1, "y")]
    pd.DataFrame([row[: len(names)] for row in rows], columns=names).to_csv(path, index=False)
    return str(path)


def test_usual_columns_need_no_name(recommender, tmp_path, capsys):
    log = renamed(tmp_path / "log.csv", recommender.items, "Customer_ID", "sku", "timestamp", "country")
    assert histories(recommender, log) == {"b": recommender.items[:2]}
    said = "the user is in column 'Customer_ID', the item is in column 'sku', the time is in column 'timestamp'"
    assert said in capsys.readouterr().out
    assert histories(recommender, log, item="sku") == {"b": recommender.items[:2]}


@pytest.mark.parametrize(
    ("names", "given", "missing"),
    [
        (("user", "sku", "time", "product_id"), {}, "'item'"),  # either may be the item
        (("user", "title", "time"), {}, "'item'"),
        (("user_id", "item", "time"), {"user": "visitor"}, "'visitor'"),
        (("user", "item", "position"), {}, "'time'"),
    ],
)
def test_a_column_that_may_be_another_or_was_named_is_not_guessed(recommender, tmp_path, names, given, missing):
    log = renamed(tmp_path / "log.csv", recommender.items, *names)
    with pytest.raises(UserError, match=f"has no column {missing}"):
        histories(recommender, log, **given)


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet", "jsonl"])
def test_users_of_a_log_full_of_ties_get_what_a_client_gets_that_keeps_its_order(recommender, tmp_path, suffix, capsys):
    expected = tied_log(tmp_path / "log", recommender.items, suffix)
    assert histories(recommender, str(tmp_path / "log")) == expected
    batch = batch_of(recommender, tmp_path / "log")
    online = recommender.recommend(list(expected.values()), 10)
    assert list(batch) == list(expected)
    assert [[item.item for item in own] for own in batch.values()] == [[item.item for item in own] for own in online]
    cli_bundle.recommend(recommender.bundle.directory, user="t007", log=str(tmp_path / "log"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [item.item for item in batch["t007"]]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_file_for_all_users(run, recommender, log, tmp_path, ending):
    out = tmp_path / f"top.{ending}"
    rows = recommend_all(recommender, log, out, 3)
    read = {"parquet": pd.read_parquet, "csv": pd.read_csv, "jsonl": lambda path: pd.read_json(path, lines=True)}
    result = read[ending](out)
    assert len(result) == rows == 3 * run.dataset.n_users
    assert list(result.columns) == ["user", "rank", "item", "title", "score"]
    everyone = histories(recommender, log)
    first = result[result.user == "u001"]
    expected = recommender.recommend([everyone["u001"]], 3)[0]
    assert first["item"].tolist() == [entry.item for entry in expected]
    assert first["rank"].tolist() == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_one_user_of_a_log(recommender, log, capsys):
    cli_bundle.recommend(recommender.bundle.directory, user="u001", log=log, k=2)
    lines = capsys.readouterr().out.splitlines()
    expected = recommender.recommend([histories(recommender, log)["u001"]], 2)[0]
    assert [line.split("\t")[0] for line in lines] == [entry.item for entry in expected]
    with pytest.raises(UserError, match="'nobody'"):
        cli_bundle.recommend(recommender.bundle.directory, user="nobody", log=log, k=2)


def test_rules_of_the_command_are_those_of_python(recommender, log, tmp_path, capsys):
    directory, denied = recommender.bundle.directory, recommender.items[:6]
    options = {"k": 3, "deny": ",".join([*denied, "nothing"]), "diversify": 0.3}
    cli_bundle.recommend(directory, everyone=True, log=log, out=tmp_path / "top.parquet", **options)
    assert "not in the catalogue, skipped: nothing" in capsys.readouterr().err
    lists = pd.read_parquet(tmp_path / "top.parquet").groupby("user")["item"].apply(list)
    for user, history in histories(recommender, log).items():
        expected = recommender.recommend([history], 3, deny=denied, diversify=0.3)[0]
        assert lists[user] == [entry.item for entry in expected]
    for chosen in ({"user": "u001", "log": log}, {"history": ",".join(histories(recommender, log)["u001"])}):
        cli_bundle.recommend(directory, **chosen, **options)
        assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == lists["u001"]
    with pytest.raises(UserError, match="no column 'price'"):
        cli_bundle.recommend(directory, everyone=True, log=log, out=tmp_path / "no.parquet", where="price < 3")
    assert {path.name for path in tmp_path.iterdir()} == {"top.parquet"}


class Interrupted:
    """A recommender that is interrupted before its third chunk, or never; notes the users that it was asked for."""

    def __init__(self, recommender, chunks: int | None = None) -> None:
        self.bundle, self._recommender, self._chunks, self.served = recommender.bundle, recommender, chunks, []

    def recommend_to(self, histories, k):
        if len(self.served) == self._chunks:
            raise KeyboardInterrupt
        self.served.append([history.tolist() for history in histories])
        return self._recommender.recommend_to(histories, k)


def test_what_was_interrupted_goes_on_to_the_same_bytes(recommender, log, tmp_path, monkeypatch):
    monkeypatch.setattr(users, "USERS_AT_A_TIME", 10)
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    recommend_all(recommender, log, whole, 3)
    first, second = Interrupted(recommender, 2), Interrupted(recommender)
    with pytest.raises(KeyboardInterrupt):
        recommend_all(first, log, resumed, 3)
    assert not resumed.exists()
    recommend_all(second, log, resumed, 3)
    assert resumed.read_bytes() == whole.read_bytes()
    assert not [histories for histories in first.served if histories in second.served]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "resumed.parquet"}


def test_a_part_that_was_damaged_meanwhile_is_made_anew(recommender, log, tmp_path, monkeypatch):
    monkeypatch.setattr(users, "USERS_AT_A_TIME", 10)
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    recommend_all(recommender, log, whole, 3)
    with pytest.raises(KeyboardInterrupt):
        recommend_all(Interrupted(recommender, 2), log, resumed, 3)
    for number, part in enumerate(sorted(tmp_path.glob(".resumed*/parts/*"))):
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= number  # the first stays as it is
        part.write_bytes(data)
    again = Interrupted(recommender)
    recommend_all(again, log, resumed, 3)
    assert resumed.read_bytes() == whole.read_bytes()
    assert len(list(filter(None, again.served))) == -(-len(histories(recommender, log)) // 10) - 1


def test_parts_of_another_request_are_never_joined(recommender, log, tmp_path, monkeypatch):
    """Nor do a file of somebody else's among them, or half a folder that was being removed, stand in the way."""
    monkeypatch.setattr(users, "USERS_AT_A_TIME", 10)
    out = tmp_path / "top.parquet"
    with pytest.raises(KeyboardInterrupt):
        recommend_all(Interrupted(recommender, 2), log, out, 5)
    (begun,) = tmp_path.glob(".top*")
    (begun / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        recommend_all(Interrupted(recommender, 2), log, out, 6)
    (other,) = set(tmp_path.glob(".top*")) - {begun}
    shutil.rmtree(other / "parts")
    rows = recommend_all(recommender, log, out, 6)
    assert set(pd.read_parquet(out).groupby("user").size()) == {6}
    assert rows == 6 * len(histories(recommender, log))
    assert {path.name for path in tmp_path.iterdir()} == {"top.parquet", begun.name}


def test_a_file_is_written_by_one_process_at_a_time(recommender, log, tmp_path):
    out = tmp_path / "top.parquet"

    class Meanwhile(Interrupted):
        def recommend_to(self, histories, k):
            with pytest.raises(UserError, match="another process"):
                recommend_all(recommender, log, out, 3)
            return super().recommend_to(histories, k)

    rows = recommend_all(Meanwhile(recommender), log, out, 3)
    assert len(pd.read_parquet(out)) == rows


def test_a_file_that_came_meanwhile_is_not_replaced(recommender, log, tmp_path):
    out = tmp_path / "top.parquet"

    class Meanwhile(Interrupted):
        def recommend_to(self, histories, k):
            out.write_text("mine")
            return super().recommend_to(histories, k)

    with pytest.raises(UserError, match=r"top\.parquet is there"):
        recommend_all(Meanwhile(recommender), log, out, 3)
    assert out.read_text() == "mine"


def test_what_was_begun_from_another_log_is_begun_anew(recommender, log, tmp_path, monkeypatch):
    monkeypatch.setattr(users, "USERS_AT_A_TIME", 10)
    out, other = tmp_path / "top.parquet", tmp_path / "log.csv"
    with pytest.raises(KeyboardInterrupt):
        recommend_all(Interrupted(recommender, 2), log, out, 3)
    lines = Path(log).read_text().splitlines()
    other.write_text("\n".join([lines[0], *(line for line in lines[1:] if line.startswith("u00"))]) + "\n")
    recommend_all(recommender, str(other), out, 3)
    assert set(pd.read_parquet(out).user) == {line.split(",")[0] for line in lines if line.startswith("u00")}


def test_what_a_kill_leaves_beside_a_result_that_is_whole_is_removed_by_the_next_command(
    recommender, log, tmp_path, monkeypatch
):
    out = tmp_path / "top.parquet"
    with monkeypatch.context() as killed:
        killed.setattr(parts, "discard", lambda begun: None)
        recommend_all(recommender, log, out, 3)
    whole = out.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match=r"top\.parquet is there"):
        recommend_all(recommender, log, out, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["top.parquet"]
    assert out.read_bytes() == whole


@pytest.mark.parametrize("name", ["top.txt", "there.parquet"])
def test_a_result_that_cannot_be_written_is_named_before_anything_is_done(recommender, log, tmp_path, name):
    (tmp_path / "there.parquet").write_text("mine")
    with pytest.raises(UserError, match=name):
        recommend_all(recommender, log, tmp_path / name, 3)
    assert (tmp_path / "there.parquet").read_text() == "mine"


@pytest.mark.multiprocess
def test_two_ranks_write_the_bytes_of_one(run, recommender, log, tmp_path):
    entry, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    recommend_all(recommender, log, entry, 3)
    bundle = shutil.copytree(run.directory("export"), tmp_path / "bundle")
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "launch" / "recommend.py"), str(bundle), "--all", "--log", log]
    options = ["--out", str(two), "-k", "3", "--device", "cpu"]
    ranks = [
        subprocess.Popen(
            [*command, *options],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert two.read_bytes() == entry.read_bytes()
    assert json.dumps(said).count("rows") == 1
