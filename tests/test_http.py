"""`rarec serve`: the same answers as in Python, limits, refusals, and bundles that are replaced while they serve."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import rarec
from rarec.bundle.parts import sample_histories
from rarec.errors import UserError
from rarec.serve import bundle_manager, schemas
from rarec.serve.app import PAGE, assemble
from rarec.serve.guard import Rates
from rarec.serve.settings import ServeSettings, read_settings, settings_of
from rarec.serve.telemetry import forget_ended_workers
from rarec.storage.artefacts import MANIFEST
from tests.batching import Slow, Timed
from tests.recommending import batch_of, histories, tied_log


@pytest.fixture(scope="module")
def bundle(run) -> Path:
    return run.directory("export")


def served(settings: ServeSettings) -> TestClient:
    """Return a client of a service that has loaded its bundles."""
    app, manager = assemble(lambda: settings)
    manager.load()
    return TestClient(app)


@pytest.fixture(scope="module")
def client(bundle) -> Iterator[TestClient]:
    with served(settings_of(bundle, device="cpu", max_users=50, max_history=100, max_k=60, max_body=20_000)) as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pairs(items: Any) -> list[tuple[Any, str, float]]:
    return [(one["item"], one["title"], pytest.approx(one["score"], rel=1e-4, abs=1e-4)) for one in items]


# ---- who may ask, by which name


@pytest.mark.parametrize(
    ("place", "hosts", "asked", "status"),
    [
        ("http://127.0.0.1:8000", None, "localhost:8000", 200),
        ("http://127.0.0.1:8000", None, "[::1]:8000", 200),
        ("http://127.0.0.1:8000", None, "evil.example", 421),
        ("http://127.0.0.1:8000", None, "localhost.evil.example", 421),
        ("http://127.0.0.1:8000", None, "[", 421),
        ("http://127.0.0.1:8000", None, "evil@localhost", 421),
        ("http://127.0.0.2:8000", None, "evil.example", 421),
        ("http://10.0.0.7:8000", None, "shop.example", 200),
        ("http://10.0.0.7:8000", ["shop.example"], "SHOP.example:443", 200),
        ("http://10.0.0.7:8000", ["shop.example"], "10.0.0.7", 421),
        ("http://127.0.0.1:8000", ["*"], "evil.example", 200),
    ],
)
def test_a_page_under_a_name_of_its_own_reads_nothing(place, hosts, asked, status):
    settings = ServeSettings(bundles={"a": {"path": "nowhere"}}, hosts=hosts)
    app, _ = assemble(lambda: settings)
    answer = TestClient(app, base_url=place).get("/health", headers={"Host": asked})
    assert answer.status_code == status
    assert status == 200 or "hosts" in answer.json()["remedy"]


def test_no_answer_leads_to_the_host_that_the_client_names(client):
    answer = client.get("/health/", headers={"Host": "evil.example"}, follow_redirects=False)
    assert (answer.status_code, "location" in answer.headers) == (404, False)


@pytest.mark.parametrize(("item", "written"), [(2**53, 2**53), (2**53 + 1, str(2**53 + 1)), (-(2**63), str(-(2**63)))])
def test_an_id_that_javascript_would_round_is_written_as_text(item, written):
    assert schemas.Found(item=item, title="").model_dump(mode="json")["item"] == written


# ---- what Python says


def test_recommendations_are_those_of_the_bundle(run, client, recommender):
    everyone = histories(run, list(map(str, run.dataset.user_ids)))
    everyone += [[recommender.items[row] for row in rows] for rows in sample_histories(recommender.parts, 150)]
    for start in range(0, len(everyone), 48):
        users = [*everyone[start : start + 48], [], ["unknown", "i001"]]
        found, expected = post(client, "recommend", histories=users), recommender.recommend(users)
        assert [pairs(one["items"]) for one in found["results"]] == [list(map(tuple, one)) for one in expected]
        assert [one["unknown"] for one in found["results"]] == expected.unknown
    assert (found["bundle"], found["version"]) == ("default", recommender.bundle.manifest["hash"][:12])


def test_users_of_a_log_full_of_ties_get_what_the_batch_gives_them(client, recommender, tmp_path):
    users = list(tied_log(tmp_path / "log", recommender.items).values())
    chunks = [post(client, "recommend", histories=users[start : start + 50]) for start in range(0, len(users), 50)]
    batch = batch_of(recommender, tmp_path / "log").values()
    found = [pairs(user["items"]) for chunk in chunks for user in chunk["results"]]
    assert found == [list(map(tuple, own)) for own in batch]


@pytest.mark.parametrize(
    "options",
    [
        {"k": 3},
        {"exclude_seen": False},
        {"allow": ["i002", "i005"]},
        {"deny": ["i002"]},
        {"fallback": "none"},
        {"diversify": 0.4, "k": 5},
    ],
)
def test_options_are_those_of_the_bundle(client, recommender, options):
    users = [recommender.items[:4], []]
    found, expected = post(client, "recommend", histories=users, **options), recommender.recommend(users, **options)
    assert [pairs(one["items"]) for one in found["results"]] == [list(map(tuple, one)) for one in expected]


def test_unknown_ids_in_rules_are_skipped_and_reported(client, recommender):
    users, rules = [recommender.items[:4], []], {"allow": ["i002", "no", "i009"], "deny": ["such", "i009", 10**17]}
    found = post(client, "recommend", histories=users, **rules)
    assert found["unknown_in_rules"] == ["no", "such", str(10**17)]
    assert [[one["item"] for one in user["items"]] for user in found["results"]] == [[], ["i002"]]


def test_the_other_answers_are_those_of_the_bundle(client, recommender):
    history, item = recommender.items[:4], recommender.items[9]
    assert pairs(post(client, "items/similar", item=item, k=3)["items"]) == recommender.similar(item, k=3)
    vectors = post(client, "users/vector", histories=[history])["vectors"]
    assert vectors == [pytest.approx(recommender.query_vectors([history])[0].tolist(), abs=1e-5)]
    found, expected = post(client, "explain", history=history, item=item), recommender.explain(history, item)
    assert found["parts"] == pytest.approx(expected.parts, abs=1e-5)
    assert pairs(found["nearest"]) == expected.nearest
    parts = post(client, "compare", history=history, k=4)["parts"]
    assert {title: pairs(items) for title, items in parts.items()} == recommender.compare(history, 4)
    place = post(client, "items/place", history=history, title="amber lamp", k=2)
    expected = recommender.place(history, "amber lamp", around=2)
    assert (place["rank"], place["of"], place["score"]) == (expected.rank, expected.of, pytest.approx(expected.score))
    assert pairs(place["above"]) == expected.above


def test_titles_are_searched_by_all_words_in_any_case(client, recommender):
    titles = dict(zip(recommender.items, recommender.bundle.catalogue.titles, strict=True))
    word, other = titles["i003"].split()[:2]
    items = client.get("/v1/items", params={"query": f"{other.upper()} {word}", "limit": 5}).json()["items"]
    assert items
    assert all(word in one["title"] and other in one["title"] for one in items)
    assert client.get("/v1/items", params={"query": "no such word"}).json()["items"] == []


def test_a_sample_user_has_different_items_of_the_catalogue(client, recommender):
    items = client.get("/v1/users/sample").json()["items"]
    assert len({one["item"] for one in items}) == len(items) > 1
    assert {one["item"] for one in items} <= set(recommender.items)


def test_it_says_what_it_serves(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["ready"] is True
    assert client.get("/v1/bundles").json()["bundles"]["default"]["row"] == "per_layer+id+cheap"
    post(client, "recommend", histories=[["i001"]])
    text = client.get("/metrics").text
    assert 'rarec_requests_total{method="POST",route="/v1/recommend",status="200"}' in text
    assert "rarec_batch_users_bucket" in text
    openapi = client.get("/openapi.json").json()
    assert set(openapi["paths"]) >= {"/v1/recommend", "/v1/explain", "/ready"}
    assert openapi["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert openapi["paths"]["/v1/recommend"]["post"]["security"] == [{"token": []}]
    assert "security" not in openapi["paths"]["/ready"]["get"]


# ---- what is refused


BAD: dict[str, tuple[str, bytes]] = {
    "nothing": ("recommend", b""),
    "no JSON": ("recommend", b"{"),
    "a list": ("recommend", b"[]"),
    "a number": ("recommend", b"3"),
    "UTF-16": ("recommend", '{"histories": []}'.encode("utf-16")),
    "bytes": ("recommend", b"\xff\xfe\x00"),
    "depth": ("recommend", b"[" * 9000 + b"]" * 9000),
    "depth in a field": ("recommend", b'{"histories": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    "an endless number": ("recommend", b'{"histories": [["i001"]], "k": ' + b"9" * 6000 + b"}"),
    "NaN": ("recommend", b'{"histories": [["i001"]], "k": NaN}'),
    "infinity": ("recommend", b'{"histories": [["i001"]], "k": 1e999}'),
    "k of zero": ("recommend", b'{"histories": [["i001"]], "k": 0}'),
    "negative k": ("recommend", b'{"histories": [["i001"]], "k": -5}'),
    "k of text": ("recommend", b'{"histories": [["i001"]], "k": "3"}'),
    "k of truth": ("recommend", b'{"histories": [["i001"]], "k": true}'),
    "k of a fraction": ("recommend", b'{"histories": [["i001"]], "k": 2.5}'),
    "k beyond the limit": ("recommend", b'{"histories": [["i001"]], "k": 61}'),
    "no histories": ("recommend", b"{}"),
    "no user": ("recommend", b'{"histories": []}'),
    "a flat history": ("recommend", b'{"histories": ["i001"]}'),
    "a history of null": ("recommend", b'{"histories": [[null]]}'),
    "a history of fractions": ("recommend", b'{"histories": [[1.5]]}'),
    "a history of truth": ("recommend", b'{"histories": [[true]]}'),
    "a history of objects": ("recommend", b'{"histories": [[{"a": 1}]]}'),
    "an id beyond 64 bits": ("recommend", b'{"histories": [[9223372036854775808]]}'),
    "a long id": ("recommend", b'{"histories": [["' + b"x" * 300 + b'"]]}'),
    "half a character": ("recommend", b'{"histories": [["\\ud800"]]}'),
    "too many users": ("recommend", json.dumps({"histories": [["i001"]] * 51}).encode()),
    "too long a history": ("recommend", json.dumps({"histories": [["i001"] * 101]}).encode()),
    "another field": ("recommend", b'{"histories": [["i001"]], "kk": 3}'),
    "too much diversity": ("recommend", b'{"histories": [["i001"]], "diversify": 2}'),
    "diversity of text": ("recommend", b'{"histories": [["i001"]], "diversify": "0.5"}'),
    "an unknown fallback": ("recommend", b'{"histories": [["i001"]], "fallback": "best"}'),
    "a fallback without dates": ("recommend", b'{"histories": [["i001"]], "fallback": "recent"}'),
    "an unknown column": ("recommend", b'{"histories": [["i001"]], "where": "colour = 1"}'),
    "code in a condition": ("recommend", b'{"histories": [["i001"]], "where": "1; drop table items"}'),
    "a long condition": ("recommend", json.dumps({"histories": [["i001"]], "where": "x" * 10_001}).encode()),
    "seen of text": ("recommend", b'{"histories": [["i001"]], "exclude_seen": "no"}'),
    "a bundle of a path": ("recommend", b'{"histories": [["i001"]], "bundle": "../../etc"}'),
    "a bundle of a number": ("recommend", b'{"histories": [["i001"]], "bundle": 3}'),
    "an unknown item": ("items/similar", b'{"item": "nothing"}'),
    "no item": ("items/similar", b"{}"),
    "an unknown item explained": ("explain", b'{"history": [], "item": "<script>alert(1)</script>"}'),
    "no title": ("items/place", b'{"history": []}'),
    "a long title": ("items/place", json.dumps({"history": [], "title": "x" * 1001}).encode()),
    "vectors of nobody": ("users/vector", b'{"histories": []}'),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_with_its_name_and_a_remedy(client, name):
    path, body = BAD[name]
    answer = client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422), answer.text
    assert set(answer.json()) == {"problem", "remedy"}
    assert len(answer.text) < 800


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/recommend", 405),
        ("POST", "/v1/nothing", 404),
        ("GET", "/page.js/../../settings.py", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/page/index.html", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/items?limit=0", 422),
        ("GET", "/v1/items?limit=many", 422),
        ("GET", f"/v1/items?query={'x' * 300}", 422),
        ("GET", "/v1/items?bundle=nothing", 404),
        ("GET", "/v1/items?bundle=a%20b", 422),
        ("DELETE", "/v1/bundles", 405),
    ],
)
def test_other_paths_and_methods_are_refused(client, method, path, status):
    assert client.request(method, path).status_code == status


def test_a_bundle_that_is_not_there_is_named(client):
    answer = client.post("/v1/recommend", json={"histories": [["i001"]], "bundle": "other"})
    assert (answer.status_code, "'other'" in answer.json()["problem"]) == (404, True)


def test_a_body_that_is_too_long_is_refused_before_it_is_read(client):
    assert client.post("/v1/recommend", content=b"x" * 20_001).status_code == 413
    parts = (b"x" * 1000 for _ in range(100))
    assert client.post("/v1/recommend", content=parts).status_code == 413


def test_answers_have_safe_headers_and_the_page_names_no_other_site(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    for file in PAGE.iterdir():
        text = file.read_text()
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text
        assert client.get("/" if file.name == "index.html" else f"/{file.name}").text == text


def test_the_log_has_no_history_item_or_user(client, capsys):
    post(client, "recommend", histories=[["i001", "i002"]], user="somebody", deny=["i003"])
    (line,) = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "/v1/recommend" in line]
    assert line["status"] == 200
    assert line["users"] == 1
    assert not {"i001", "i002", "i003", "somebody"} & set(map(str, line.values()))


def test_tokens(bundle, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token-of-24-characters\nanother-token-of-some-length\n")
    with served(settings_of(bundle, device="cpu", tokens=str(tokens))) as client:
        for given in (None, "Bearer wrong", "Basic a-token-of-24-characters", "Bearer ", "Bearer \xe9"):
            headers = {"authorization": given.encode("latin-1")} if given else {}
            answer = client.post("/v1/recommend", json={"histories": [["i001"]]}, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/metrics").status_code == 401
        assert [client.get(path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
        assert client.get("/ready").json() == {"ready": True, "overloaded": False}
        own = {"authorization": "bearer another-token-of-some-length"}
        assert client.post("/v1/recommend", json={"histories": [["i001"]]}, headers=own).status_code == 200
    tokens.write_text("short\n")
    with pytest.raises(UserError, match="tokens"):
        assemble(lambda: settings_of(bundle, tokens=str(tokens)))


def test_rates(bundle):
    with served(settings_of(bundle, device="cpu", rate=1.0)) as client:
        codes = [client.get("/v1/bundles").status_code for _ in range(4)]
        assert codes == [200, 200, 429, 429]
        assert int(client.get("/v1/bundles").headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
    rates = Rates()
    assert [rates.wait(str(client), 1000.0) for client in range(20_000)] == [0.0] * 20_000
    assert len(rates._left) <= 10_000


# ---- load


def wait_for(what: Any) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_failure_of_the_engine_is_answered_like_any_other_problem(bundle, monkeypatch, capsys):
    class Broken(Slow):
        def answer(self, requests: list[Any]) -> list[Any]:
            raise RuntimeError("secret")

    monkeypatch.setattr("rarec.serve.app.load_recommender", lambda settings, path: (Broken(), "1"))
    app, manager = assemble(lambda: settings_of(bundle))
    manager.load()
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/v1/recommend", json={"histories": [["a"]]})
    assert (answer.status_code, set(answer.json())) == (500, {"problem", "remedy"})
    assert answer.headers["x-request-id"] in answer.json()["remedy"]
    assert "secret" not in answer.text
    assert "secret" in capsys.readouterr().err


def test_a_full_service_refuses_early_says_when_to_come_again_and_recovers(bundle, monkeypatch):
    engine = Timed(0.05)
    monkeypatch.setattr("rarec.serve.app.load_recommender", lambda settings, path: (engine, "1"))
    with served(settings_of(bundle, timeout=1.0, window_ms=0)) as client:

        def ask(_: int = 0) -> Any:
            return client.post("/v1/recommend", json={"histories": [["a"]]})

        assert ask().status_code == 200  # now the pace is known
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, range(80)))
        counts = Counter(answer.status_code for answer in answers)
        assert set(counts) == {200, 503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 503)
        assert len({answer.headers["x-request-id"] for answer in answers if answer.status_code == 200}) == counts[200]
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("rarec_refused_total{")]
        assert sum(float(line.split()[-1]) for line in lines) == counts[503]
        wait_for(lambda: not client.get("/ready").json()["overloaded"])
        assert ask().status_code == 200


def test_a_request_whose_client_has_left_is_not_computed(bundle, monkeypatch):
    engine = Timed(0.2)
    monkeypatch.setattr("rarec.serve.app.load_recommender", lambda settings, path: (engine, "1"))
    app, manager = assemble(lambda: settings_of(bundle, window_ms=0))
    manager.load()
    statuses = asyncio.run(_ask_and_leave(app, manager.pick(None, "").batcher))
    manager._loaded["default"].batcher.close()
    assert (statuses, engine.passes) == ([499, 200], [[["first"]]])


async def _ask_and_leave(app: Any, batcher: Any) -> list[int]:
    """Ask twice; the second client leaves while the first request is computed."""
    left, statuses = asyncio.Event(), list[int]()

    async def ask(item: str, leaves: asyncio.Event) -> None:
        body = iter([{"type": "http.request", "body": json.dumps({"histories": [[item]]}).encode()}])

        async def receive() -> dict[str, Any]:
            if (part := next(body, None)) is not None:
                return part
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "query_string": b"", "headers": headers}
        await app(scope, receive, send)

    first = asyncio.create_task(ask("first", asyncio.Event()))
    while batcher.idle or batcher.waiting:
        await asyncio.sleep(0.01)
    second = asyncio.create_task(ask("second", left))
    while not batcher.waiting:
        await asyncio.sleep(0.01)
    left.set()
    await second
    assert batcher.waiting == 0
    await first
    return statuses


# ---- bundles


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(bundle_manager, "LOOK_EVERY", 0.05)


@pytest.fixture
def versions(bundle, tmp_path) -> dict[str, Path]:
    """Two bundles, and a link to the first; the second lacks an item."""
    from rarec.bundle.bundle import Bundle
    from rarec.bundle.items import remove_items

    shutil.copytree(bundle, tmp_path / "one")
    remove_items(Bundle.open(bundle), ["i003"], tmp_path / "two")
    (tmp_path / "current").symlink_to("one")
    return {name: tmp_path / name for name in ("one", "two", "current")}


def point(link: Path, to: str) -> None:
    aside = link.with_name("aside")
    aside.symlink_to(to)
    aside.rename(link)


def test_bundles_are_swapped_and_rolled_back_while_they_serve(versions, quick):
    items = {name: set(rarec.load(versions[name], device="cpu").items) for name in ("one", "two")}
    hashes = {json.loads((versions[name] / MANIFEST).read_text())["hash"][:12]: name for name in ("one", "two")}
    with served(settings_of(versions["current"], device="cpu")) as client:
        end, seen = threading.Event(), Counter[str]()

        def load() -> None:
            while not end.is_set():
                found = post(client, "recommend", histories=[["i001"], ["i002"]], k=1000)
                name = hashes[found["version"]]
                for one, seen_item in zip(found["results"], ("i001", "i002"), strict=True):
                    assert {item["item"] for item in one["items"]} == items[name] - {seen_item}
                seen[name] += 1

        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(load) for _ in range(3)]
            for name in ("two", "one", "two", "one"):
                before = seen[name]
                point(versions["current"], name)
                wait_for(lambda name=name, before=before: seen[name] > before + 5 or any(one.done() for one in asked))
            end.set()
            for one in asked:
                one.result()


def test_a_bundle_that_cannot_be_loaded_changes_nothing_and_ready_tells_the_truth(versions, quick):
    with served(settings_of(versions["current"], device="cpu")) as client:
        (versions["two"] / "vectors.safetensors").write_bytes(b"damaged")
        point(versions["current"], "two")
        wait_for(lambda: client.get("/ready").json()["bundles"]["default"]["trouble"])
        ready = client.get("/ready").json()
        assert ready["ready"] is True
        assert "vectors.safetensors" in ready["bundles"]["default"]["trouble"]
        post(client, "recommend", histories=[["i001"]])
        shutil.rmtree(versions["two"])
        wait_for(lambda: "no manifest.json" in client.get("/ready").json()["bundles"]["default"]["trouble"])
        post(client, "recommend", histories=[["i001"]])
        point(versions["current"], "one")
        wait_for(lambda: client.get("/ready").json()["bundles"]["default"]["trouble"] is None)


def test_users_are_shared_between_bundles_and_keep_theirs(versions, tmp_path):
    (tmp_path / "serve.yaml").write_text(
        "bundles: {a: {path: one, share: 3}, b: {path: two}, c: {path: two, share: 0}}"
    )
    with served(read_settings(tmp_path / "serve.yaml")) as client:
        first = [post(client, "recommend", histories=[["i001"]], user=f"user {at}")["bundle"] for at in range(60)]
        again = [post(client, "recommend", histories=[["i001"]], user=f"user {at}")["bundle"] for at in range(60)]
        assert first == again
        assert set(first) == {"a", "b"}
        assert first.count("a") > first.count("b")
        assert post(client, "recommend", histories=[["i001"]], bundle="c")["bundle"] == "c"


def test_bundles_that_are_added_or_renamed_take_no_users_before_they_are_loaded(versions, quick, tmp_path):
    settings = tmp_path / "serve.yaml"
    settings.write_text("bundles: {a: {path: one}}")
    app, manager = assemble(lambda: read_settings(settings))
    manager.load()

    def names() -> set[str]:
        return {post(client, "recommend", histories=[["i001"]], user=f"user {at}")["bundle"] for at in range(20)}

    with TestClient(app) as client:
        settings.write_text("bundles: {a: {path: one}, b: {path: nowhere}}")
        wait_for(lambda: client.get("/ready").json()["bundles"].get("b", {}).get("trouble"))
        assert names() == {"a"}
        assert client.get("/ready").status_code == 200
        settings.write_text("bundles: {b: {path: nowhere}}")
        wait_for(lambda: "a" not in client.get("/ready").json()["bundles"])
        assert names() == {"a"}, "until the other is there"
        settings.write_text("bundles: {b: {path: two}}")
        wait_for(lambda: names() == {"b"})


def test_whatever_goes_wrong_while_settings_are_read_again_they_are_read_again(bundle, quick, tmp_path):
    tokens, wrong = tmp_path / "tokens", threading.Event()
    tokens.write_text("a-token-of-24-characters\n")

    def read() -> ServeSettings:
        if wrong.is_set():
            raise OSError(24, "Too many open files")
        return settings_of(bundle, device="cpu", tokens=str(tokens))

    app, manager = assemble(read)
    manager.load()
    with TestClient(app) as client:

        def status(token: str) -> int:
            return client.get("/metrics", headers={"authorization": f"bearer {token}"}).status_code

        wrong.set()
        wait_for(lambda: "settings" in manager._troubles)
        wrong.clear()
        tokens.write_text("short\n")
        wait_for(lambda: str(tokens) in manager._troubles.get("settings", ""))
        assert status("a-token-of-24-characters") == 200, "as before"
        tokens.write_text("another-token-of-some-length\n")
        wait_for(lambda: status("another-token-of-some-length") == 200)
        assert status("a-token-of-24-characters") == 401
        assert client.get("/ready").json()["ready"]


def test_the_end_does_not_wait_for_a_bundle_that_is_being_loaded(bundle, quick, monkeypatch):
    loads = threading.Event()
    monkeypatch.setattr("rarec.serve.app.load_recommender", lambda *_: loads.set() or time.sleep(20) or (Slow(), "1"))
    app, _ = assemble(lambda: settings_of(bundle))
    with TestClient(app):
        assert loads.wait(10)
        started = time.monotonic()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bundles: {}", "bundles"),
        ("bundles: {a: {path: one}}\nbackend: jax", "backend"),
        ("bundles: {a: {path: one, share: -1}}", "share"),
        ("bundles: {a/b: {path: one}}", "bundles"),
        ("bundles: {a: {path: one}}\nmax_bach: 3", "max_bach"),
        ("bundles: [", "serve.yaml"),
        ("3", "serve.yaml"),
    ],
)
def test_settings_that_are_wrong_are_named(tmp_path, text, named):
    (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(UserError, match=named):
        read_settings(tmp_path / "serve.yaml")


def test_nobody_waits_in_a_worker_that_has_ended(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, gone = (tmp_path / f"gauge_livesum_{process}.db" for process in (os.getpid(), ended.pid))
    for file in (here, gone):
        file.touch()
    forget_ended_workers(tmp_path)
    assert list(tmp_path.iterdir()) == [here]
