"""Load `rarec serve` on this machine: rate, waiting, memory, swaps of bundles; or overload it.

    python -m tools.bench.serve BUNDLE [--onnx SERVED] [--seconds 300] [--swaps 100] [--clients 32]
    python -m tools.bench.serve BUNDLE overload [--onnx SERVED] [--seconds 30] [--timeout 10] [--loads 3 10] [--even]

| row | what |
| --- | --- |
| users/s | answered at saturation, by requests of 1 to 8 users, 1 to 20 items each, over the rate of one call for 512 |
| p50, p99 | milliseconds of these requests |
| memory | of the service at the end, and over that after a fifth of the time |
| swaps | requests that failed, or whose answer was not of one bundle, while a link was turned between two bundles |

`overload`: requests of one user at .5 to 10 times the capacity; see `tools/bench/overload.py`. With --onnx, all but the
swaps by ONNX Runtime, and SERVED is the folder of `rarec export BUNDLE --to onnx --to faiss`.
Clients share the cores with the service.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

import rarec
from rarec.bundle.bundle import Bundle
from rarec.bundle.items import remove_items
from rarec.export.rarec_client import Client
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json
from tools.bench.measuring import Figure, add_option, at_least, at_most, print_table
from tools.bench.measuring import seconds as seconds_of
from tools.bench.overload import LOADS, overloaded
from tools.bench.recommend import sample_users

K = 10
HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@dataclass
class Seen:
    """What clients have seen.

    Attributes:
        users: answered.
        seconds: of each answered request.
        statuses: number of answers by status; -1 for a connection that broke.
        mixed: number of answers with a short list, or with an item that their version lacks.
        without: a version, and an item that it lacks.
    """

    users: int = 0
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    mixed: int = 0
    without: tuple[str, Any] = ("", None)

    @property
    def failed(self) -> int:
        """The number of requests that were not answered with status 200."""
        return self.statuses.total() - self.statuses[200]

    async def send(self, port: int, bodies: list[tuple[int, bytes]], end: float) -> None:
        """Send prepared requests over one connection, one after the other, until a time."""
        reader: asyncio.StreamReader | None = None
        while time.monotonic() < end:
            users, body = random.choice(bodies)
            try:
                if reader is None:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                started = time.monotonic()
                writer.write(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                status, _, answer = await read_answer(reader)
            except (OSError, asyncio.IncompleteReadError):
                self.statuses[-1] += 1
                reader = None
                continue
            self.statuses[status] += 1
            if status == 200:
                self.users += users
                self.seconds.append(time.monotonic() - started)
                self.mixed += self._is_mixed(json.loads(answer))

    def _is_mixed(self, answer: dict[str, Any]) -> bool:
        version, lacks = self.without
        lists = [[item["item"] for item in user["items"]] for user in answer["results"]]
        return any(len(items) < K or (answer["version"] == version and lacks in items) for items in lists)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, str, bytes]:
    """Read the status, the head and the body of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    return int(head.split(" ")[1]), head, await reader.readexactly(length)


def load(port: int, clients: int, bodies: list[tuple[int, bytes]], seconds: float) -> Seen:
    """Send requests for some seconds."""
    seen, end = Seen(), time.monotonic() + seconds

    async def send() -> None:
        await asyncio.gather(*(seen.send(port, bodies, end) for _ in range(clients)))

    asyncio.run(send())
    return seen


def requests(histories: list[list[Any]], users: tuple[int, int], count: int = 500) -> list[tuple[int, bytes]]:
    """Return bodies of requests of a random number of users."""
    sizes = [random.randint(*users) for _ in range(count)]
    return [(size, json.dumps({"histories": random.choices(histories, k=size), "k": K}).encode()) for size in sizes]


@contextmanager
def service(
    path: Path, backend: str = "torch", timeout: float = 60.0, **others: Any
) -> Iterator[tuple[int, psutil.Process]]:
    """Start a service of a bundle, or of a folder for ONNX Runtime, with other settings; yield its port and process."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"bundles": {"a": {"path": str(path.absolute())}}, "backend": backend, "timeout": timeout, **others}
        Path(scratch, "serve.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "rarec", "serve", "--settings", f"{scratch}/serve.yaml", "--port", "0"]
        with Path(scratch, "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
            try:
                yield _port(Path(scratch, "log"), process), psutil.Process(process.pid)
            finally:
                process.terminate()


def _port(log: Path, process: "subprocess.Popen[bytes]") -> int:
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                return int(json.loads(line)["text"].rstrip("/").rpartition(":")[2])
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def offline_rate(path: Path, backend: str, histories: list[list[Any]]) -> float:
    """Return the users a second of one call for all histories."""
    recommend = Client(path).recommend if backend == "onnx" else rarec.load(path, device="cpu").recommend
    recommend(histories[:64], K)
    return len(histories) / seconds_of(partial(recommend, histories, K))


def saturated(path: Path, backend: str, histories: list[list[Any]], seconds: float, clients: int) -> list[Figure]:
    """Measure the rate, waiting and memory at saturation."""
    offline = offline_rate(path, backend, histories)
    with service(path, backend) as (port, process):
        bodies = requests(histories, (1, 8))
        first = load(port, clients, bodies, seconds / 5)
        before = process.memory_info().rss
        seen = load(port, clients, bodies, seconds * 4 / 5)
        after = process.memory_info().rss
    rate, cuts = seen.users / (seconds * 4 / 5), statistics.quantiles(seen.seconds, n=100)
    return [
        at_least("users/s over offline", rate / offline, 0.8),
        Figure("users/s, offline", f"{rate:.0f}, {offline:.0f}"),
        at_most("failed requests", first.failed + seen.failed, 0),
        Figure("p50, p99", f"{1000 * cuts[49]:.0f} ms, {1000 * cuts[98]:.0f} ms"),
        Figure("memory", f"{after / 1e6:.0f} MB"),
        at_most("memory at the end", after / before, 1.05),
    ]


def swapped(bundle: Path, histories: list[list[Any]], swaps: int, clients: int) -> list[Figure]:
    """Turn a link between two bundles under load."""
    with tempfile.TemporaryDirectory() as scratch:
        opened = Bundle.open(bundle)
        removed = opened.catalogue.ids[int(opened.catalogue.counts_N.argmax())].as_py()
        shutil.copytree(bundle, Path(scratch, "one"))
        remove_items(opened, [removed], Path(scratch, "two"))
        without = read_json(Path(scratch, "two", MANIFEST))["hash"][:12]
        link = Path(scratch, "current")
        link.symlink_to("one")
        with service(link) as (port, _):
            seen = Seen(without=(without, removed))
            loaded = asyncio.run(_swap(port, link, seen, requests(histories, (1, 8)), swaps, clients))
    return [
        at_most(f"failed or mixed in {seen.statuses.total():,} requests", seen.failed + seen.mixed, 0),
        at_least("swaps done", loaded, swaps),
    ]


async def _swap(port: int, link: Path, seen: Seen, bodies: list[tuple[int, bytes]], swaps: int, clients: int) -> int:
    """Turn the link, and wait until the service has loaded the other bundle; return how often it did."""
    loaded = 0.0
    tasks = [asyncio.create_task(seen.send(port, bodies, float("inf"))) for _ in range(clients)]
    for turn in range(swaps):
        temporary = link.with_name("temporary")
        temporary.symlink_to("two" if turn % 2 == 0 else "one")
        before = await _loaded(port)
        temporary.rename(link)
        while (now := await _loaded(port)) == before:
            await asyncio.sleep(0.1)
        loaded += now - before
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return int(loaded)


async def _loaded(port: int) -> float:
    """Return how many bundles the service has loaded."""
    return (await read_metrics(port))['rarec_bundles_total{event="loaded"}']


async def read_metrics(port: int) -> dict[str, float]:
    """Return what `/metrics` says, by name and labels."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    _, _, text = await read_answer(reader)
    writer.close()
    lines = [line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("part", nargs="?", choices=["overload"])
    defaults = {
        "onnx": Path,
        "seconds": float,
        "swaps": 100,
        "clients": 32,
        "timeout": 10.0,
        "even": False,
        "loads": list(LOADS),
    }
    for name, default in defaults.items():
        add_option(parser, name, default)
    arguments = parser.parse_args()
    _, histories = sample_users(rarec.load(arguments.bundle, device="cpu"), 512)
    path, backend = (arguments.onnx, "onnx") if arguments.onnx else (arguments.bundle, "torch")
    if arguments.part:
        bodies = [body for _, body in requests(histories, (1, 1))]
        with service(path, backend, arguments.timeout) as (port, process):
            seconds = arguments.seconds or 30.0
            figures = overloaded(port, process, bodies, arguments.timeout, seconds, arguments.even, arguments.loads)
    else:
        figures = saturated(path, backend, histories, arguments.seconds or 300.0, arguments.clients)
        if backend == "torch":
            figures += swapped(arguments.bundle, histories, arguments.swaps, arguments.clients // 4)
    print_table(figures)


if __name__ == "__main__":
    main()
