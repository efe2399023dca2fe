"""`rarec serve` as a process: how it starts and ends, killed workers, clients that are slow, idle or gone."""

import gc
import json
import os
import resource
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from rarec.serve.bundle_manager import BundleManager
from rarec.serve.guard import PATIENCE
from rarec.serve.server import simple_length
from rarec.serve.settings import settings_of
from rarec.serve.telemetry import Metrics
from rarec.storage.artefacts import MANIFEST
from tests.recommending import exported
from tests.serving import Service, command, own, service

HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ASKED = {"histories": [["i001", "i002"]], "k": 3}


@pytest.fixture(scope="module")
def bundle(run) -> Path:
    return run.directory("export")


@pytest.fixture(scope="module")
def serving(bundle) -> Iterator[Service]:
    with service(bundle, "--device", "cpu") as started:
        yield started


def ask(url: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/recommend", json=ASKED, timeout=30)


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


@pytest.mark.slow
def test_it_serves_and_a_thousand_idle_connections_do_not_matter(serving):
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096) if most > 0 else 4096, most))
    idle = [connected(serving.url) for _ in range(1000)]
    assert ask(serving.url).status_code == 200
    for one in idle:
        one.close()
    assert ask(serving.url).status_code == 200


@pytest.mark.slow
def test_a_client_that_sends_its_body_slowly_is_sent_away_and_others_are_served(serving):
    with connected(serving.url) as slow:
        slow.sendall(HEAD + b"Content-Length: 99\r\n\r\n{")
        assert ask(serving.url).status_code == 200
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def seconds_until_closed(url: str, first: bytes, answered: bytes) -> float:
    """Send a request, then a byte every half second; return how long the service bears it after its answer."""
    with connected(url) as client:
        client.sendall(first)
        assert client.recv(20).startswith(answered)
        start = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - start < 60:
                client.sendall(b"x")
                time.sleep(0.5)
                client.settimeout(0.01)
                with suppress(TimeoutError):
                    if client.recv(1 << 16) == b"":
                        break
        return time.monotonic() - start


@pytest.mark.slow
def test_a_byte_now_and_then_keeps_no_connection(serving):
    body = b"Content-Length: 900000\r\n\r\n{"
    ways = [
        (HEAD + body, b"HTTP/1.1 408"),
        (HEAD + b"Content-Length: 900000000\r\n\r\n{", b"HTTP/1.1 413"),
        (HEAD.replace(b"/v1/recommend", b"/nothing") + body, b"HTTP/1.1 404"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 200"),
    ]
    with ThreadPoolExecutor(len(ways)) as pool:
        borne = list(pool.map(lambda way: seconds_until_closed(serving.url, *way), ways))
    assert max(borne) < 2 * PATIENCE, borne


@pytest.mark.slow
def test_clients_that_leave_and_send_nonsense_do_not_matter(serving):
    for data in (b"", b"GET", b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", HEAD, b"G" * 200_000):
        with connected(serving.url) as one, suppress(OSError):
            one.sendall(data)
    for _ in range(20):
        with connected(serving.url) as one:
            one.sendall(HEAD + b"Content-Length: 9\r\n\r\n{}")
    assert ask(serving.url).status_code == 200
    assert not serving.events("crash")
    assert "Traceback" not in "".join(serving.lines)


@pytest.mark.slow
def test_what_is_no_http_is_refused_like_everything_else(serving):
    with connected(serving.url) as one:
        one.sendall(b"NONSENSE\r\n\r\n")
        answer = b"".join(iter(lambda: one.recv(4096), b""))  # until it is closed
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert set(json.loads(body)) == {"problem", "remedy"}


def requested(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("head", "length"),
    [
        (HEAD + b"Content-Length: 12", 12),
        (HEAD + b"content-length:12\r\nX: y", 12),
        (HEAD + b"Content-Length: 12\r\nContent-Length: 13", None),
        (HEAD + b"Content-Length: 12\r\nConnection: close", None),
        (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 12", None),
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 12", None),
        (HEAD + b"Content-Length: 1 2", None),
        (HEAD + b"Content-Length: -1", None),
        (HEAD + b"X-Content-Length: 12", None),
        (HEAD + b"Content-Length : 12", None),
        (HEAD.replace(b"1.1", b"1.0") + b"Content-Length: 12", None),
        (HEAD.replace(b"/v1/recommend", b"/health") + b"Content-Length: 12", None),
        (HEAD.replace(b"POST", b"GET") + b"Content-Length: 12", None),
        (b"", None),
    ],
)
def test_only_the_simplest_requests_are_refused_unparsed(head, length):
    assert simple_length(head) == length


@pytest.mark.slow
def test_an_overload_is_refused_on_a_connection_that_stays_and_what_was_taken_is_answered_in_time(bundle, tmp_path):
    (tmp_path / "serve.yaml").write_text(f"bundles: {{a: {{path: {bundle}}}}}\ndevice: cpu\ntimeout: 3\n")
    many, one = (json.dumps({"histories": [["i001"]] * users}).encode() for users in (200, 1))
    with service("--settings", tmp_path / "serve.yaml") as started, ExitStack() as stack:
        ask(started.url)
        clients = [stack.enter_context(connected(started.url)) for _ in range(200)]
        begun = time.monotonic()
        for client in clients:
            client.sendall(requested(many))
        statuses = [int(client.recv(1 << 16)[9:12]) for client in clients]
        assert time.monotonic() - begun < 6
        assert {200, 503} >= set(statuses) >= {503}
        _wait(lambda: not httpx.get(f"{started.url}/ready").json()["overloaded"])
        refused = [client for client, status in zip(clients, statuses, strict=True) if status == 503][-5:]
        for client in refused:
            client.sendall(requested(one))
            answer = b""
            while b"results" not in answer:
                answer += client.recv(1 << 16)
            assert b"HTTP/1.1 200" in answer
        assert not started.events("crash")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_answer_what_was_asked_and_end(bundle, tmp_path, number):
    (tmp_path / "serve.yaml").write_text(f"bundles: {{a: {{path: {bundle}}}}}\ndevice: cpu\nwindow_ms: 1000\n")
    with service("--settings", tmp_path / "serve.yaml") as started:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, started.url)
            while "rarec_waiting_users 1.0" not in httpx.get(f"{started.url}/metrics").text:
                asked = pool.submit(ask, started.url) if asked.done() else asked
            started.process.send_signal(number)
            assert asked.result().status_code == 200
        assert started.process.wait(30) == 0
        assert started.events("ended")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(bundle):
    with service(bundle, "--device", "cpu", "--workers", "2") as started:
        _wait(lambda: _status(started.url, "ready") == 200)
        workers = psutil.Process(started.process.pid).children()
        victim = max(workers, key=lambda one: one.memory_info().rss)
        os.kill(victim.pid, signal.SIGKILL)
        _wait(
            lambda: (
                len([one for one in psutil.Process(started.process.pid).children() if one.is_running()]) >= len(workers)
            )
        )
        _wait(lambda: _status(started.url, "ready") == 200)
        assert ask(started.url).status_code == 200
        assert "rarec_requests_total" in httpx.get(f"{started.url}/metrics").text


@pytest.mark.slow
def test_a_bundle_whose_files_are_cut_short_under_it_goes_on_serving_from_memory(run, tmp_path):
    bundle = exported(run, tmp_path, "export.with_llm=true").directory("export")
    with service(bundle, "--device", "cpu") as started:
        before = ask(started.url).json()
        for file in bundle.rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
        _wait(lambda: httpx.get(f"{started.url}/ready").json()["bundles"]["default"]["trouble"])
        assert ask(started.url).json()["results"] == before["results"]
        asked = {"history": ["i001"], "item": "i004"}
        assert httpx.post(f"{started.url}/v1/explain", json=asked, timeout=30).status_code == 200


def _status(url: str, path: str) -> int:
    try:
        return httpx.get(f"{url}/{path}", timeout=5).status_code
    except httpx.HTTPError:
        return 0


def _wait(what) -> None:
    end = time.monotonic() + 90
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "BUNDLE"),
        (["nowhere"], "nowhere"),
        (["BUNDLE", "--port", "TAKEN"], "Address already in use"),
        (["BUNDLE", "--host", "203.0.113.9"], "203.0.113.9"),
        (["BUNDLE", "--tokens", "nowhere"], "nowhere"),
        (["BUNDLE", "--backend", "onnx"], "onnx"),
        (["BUNDLE", "--settings", "serve.yaml"], "--settings"),
        (["BUNDLE", "--device", "tpu"], "tpu"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_nothing_listens(bundle, tmp_path, arguments, named):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"BUNDLE": str(bundle), "TAKEN": str(taken.getsockname()[1])}
        arguments = [words.get(word, word) for word in arguments]
        port = [] if "--port" in arguments else ["--port", "0"]
        ended = subprocess.run(
            command(*arguments, *port), env=own(), cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in ended.stderr
    assert '"listening"' not in ended.stderr


class _Weights:
    """What a bundle that cannot be loaded has in memory by then."""


def test_what_a_failed_load_had_in_memory_is_let_go(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    held: list[weakref.ref] = []

    def load(settings, path):
        weights = _Weights()
        held.append(weakref.ref(weights))
        raise RuntimeError("out of memory")

    manager = BundleManager(lambda: settings_of(tmp_path), load, Metrics())
    for _ in range(2):  # the second time it is not tried again so soon
        with pytest.raises(RuntimeError, match="out of memory"):
            manager.load()
    gc.collect()
    assert [weights() for weights in held] == [None]
    assert "out of memory" in str(manager.state()["default"]["trouble"])


def test_a_bundle_that_was_replaced_is_let_go(tmp_path):
    """At once, and not when Python next looks for objects that refer to each other."""
    held: list[weakref.ref] = []

    def load(settings, path):
        weights = _Weights()
        held.append(weakref.ref(weights))
        return SimpleNamespace(catalogue=SimpleNamespace(titles=[]), row="text", weights=weights), path.name

    current = tmp_path / "current"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(name)
    current.symlink_to("one")
    manager = BundleManager(lambda: settings_of(current), load, Metrics())
    manager.load()
    gc.disable()
    try:
        manager.start()
        current.unlink()
        current.symlink_to("two")
        end = time.monotonic() + 30
        while (len(held) < 2 or held[0]() is not None) and time.monotonic() < end:
            time.sleep(0.05)
        assert [weights() is None for weights in held] == [True, False]
    finally:
        gc.enable()
        manager.close()
