"""Keep a service at twice its capacity while everything else happens to it, and count what goes wrong.

    python -m tools.bench.soak BUNDLE [--minutes 60] [--load 2] [--timeout 10]

Beside the requests of `tools/bench/overload.py`: every minute another version of the bundle takes over; clients leave
in the middle of a request or before its answer; the disk under the impressions is full, but for a moment now and then.
Each answer is compared with that of the version it names. Root alone may mount the small disk.
"""

import asyncio
import json
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

import rarec
from rarec.bundle.bundle import Bundle
from rarec.bundle.items import remove_items
from rarec.storage.artefacts import MANIFEST
from rarec.storage.files import read_json
from tools.bench.measuring import Figure, at_most, options, print_table
from tools.bench.overload import CLIENTS, HEAD, Answers, Clients, in_turn
from tools.bench.recommend import sample_users
from tools.bench.serve import K, read_metrics, service

HISTORIES = 200
REMOVED = 20
"""Popular items that the second version lacks, so that the lists of the two differ."""
TOLERANCE = 1e-3
"""Of a score: the size of a batch changes its rounding, and by that the order of two items that are nearly equal."""
MEASURE, MEASURE_EVERY = 10.0, 290.0
"""Seconds of a measurement of the capacity, and between two."""
SWAP_EVERY = 60.0
DISK = "256k"
EMPTY_EVERY = 300.0
"""Seconds after which the disk is emptied; it is full again within about one minute."""
LEAVING = 4
"""Clients that ask, and leave."""
IMPRESSIONS = {"seconds": 5, "max_rows": 500}
Lists = list[dict[Any, float]]
"""Of each request, the scores of the best items by their ids, the best first; more than are asked for."""


@dataclass
class Checker:
    """Compares answers with those that versions of a bundle give to one client.

    Attributes:
        lists: by version.
        numbers: place in `lists` of each request.
        answered: number of answers by version.
        last: the version of the last answer.
        wrong: answers of none of the versions.
        mixed: answers of one version that name another one.
    """

    lists: dict[str, Lists]
    numbers: dict[bytes, int]
    answered: Counter[str] = field(default_factory=Counter)
    last: str = ""
    wrong: int = 0
    mixed: int = 0

    def __call__(self, request: bytes, answer: bytes) -> None:
        """Check the answer to a request."""
        content = json.loads(answer)
        self.last = content["version"]
        self.answered[self.last] += 1
        number, items = self.numbers[request], content["results"][0]["items"]
        fitting = [version for version, lists in self.lists.items() if _fits(lists[number], items)]
        if self.last not in fitting:
            self.mixed += bool(fitting)
            self.wrong += not fitting


def _fits(expected: dict[Any, float], items: list[dict[str, Any]]) -> bool:
    pairs = zip(items, expected.values(), strict=False)
    return len(items) == K and all(
        abs(item["score"] - score) < TOLERANCE and abs(item["score"] - expected.get(item["item"], 1e9)) < TOLERANCE
        for item, score in pairs
    )


def two_versions(bundle: Path, place: Path, histories: list[list[Any]]) -> dict[str, Lists]:
    """Write the bundle as `one`, and as `two` without some items; return the lists of both."""
    opened = Bundle.open(bundle)
    popular = opened.catalogue.counts_N.argsort()[::-1][:REMOVED]
    shutil.copytree(bundle, place / "one")
    remove_items(opened, [opened.catalogue.ids[int(row)].as_py() for row in popular], place / "two")
    lists = {}
    for name in ("one", "two"):
        best = rarec.load(place / name, device="cpu").recommend(histories, 2 * K)
        version = read_json(place / name / MANIFEST)["hash"][:12]
        lists[version] = [{item.item: item.score for item in items} for items in best]
    return lists


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """Mount a disk of little room."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@dataclass
class Events:
    """What happens to a service beside its requests.

    Attributes:
        port: of the service.
        link: the path that it serves.
        disk: where it writes impressions.
        end: moment at which they end.
    """

    port: int
    link: Path
    disk: Path
    end: float
    swaps: int = 0
    missed: int = 0
    left: int = 0
    written: int = 0

    async def swap(self, checker: Checker) -> None:
        """Turn the link each minute, and wait for an answer of the other version."""
        names = ["one", "two"]
        versions = list(checker.lists)
        while time.monotonic() + SWAP_EVERY < self.end:
            await asyncio.sleep(SWAP_EVERY / 2)
            names.reverse()
            versions.reverse()
            temporary = self.link.with_name("temporary")
            temporary.symlink_to(names[0])
            temporary.rename(self.link)
            turned = time.monotonic()
            while checker.last != versions[0] and time.monotonic() < turned + SWAP_EVERY / 2:
                await asyncio.sleep(0.1)
            self.swaps += 1
            self.missed += checker.last != versions[0]
            await asyncio.sleep(max(0.0, turned + SWAP_EVERY / 2 - time.monotonic()))

    async def leave(self, bodies: Sequence[bytes]) -> None:
        """Send a request or its beginning, and leave without reading, again and again."""
        while time.monotonic() < self.end:
            body = random.choice(bodies)
            request = HEAD + str(len(body)).encode() + b"\r\n\r\n" + body
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(random.choice([request, request[: random.randrange(1, len(request))]]))
                await asyncio.sleep(random.uniform(0, 2))
                writer.transport.abort()
                self.left += 1

    async def empty(self) -> None:
        """Make room on the disk from time to time."""
        while (left := self.end - time.monotonic()) > 0:
            await asyncio.sleep(min(EMPTY_EVERY, left))
            self.count_written()

    def count_written(self) -> None:
        """Count the lists in the files of impressions, and remove these."""
        for path in self.disk.glob("[!.]*.parquet"):
            self.written += pq.read_metadata(path).num_rows
            path.unlink()


async def soak(
    events: Events, process: psutil.Process, checker: Checker, load: float, timeout: float, seconds: float
) -> list[Figure]:
    """Ask for more than the capacity, which is measured every few minutes, while all else happens."""
    bodies = list(checker.numbers)
    await in_turn(events.port, bodies, timeout, CLIENTS, 10)
    alone = await in_turn(events.port, bodies, timeout, 1, 10)
    events.end = time.monotonic() + seconds
    answers, capacities, memory = Answers(), list[float](), list[int]()

    async def ask() -> None:
        while (left := events.end - time.monotonic() - MEASURE) > 0:
            full = await in_turn(events.port, bodies, timeout, CLIENTS, MEASURE)
            capacities.append(len(full.seconds) / MEASURE)
            clients = Clients(events.port, bodies, timeout)
            clients.answers.check = checker
            await clients.arrive(load * capacities[-1], min(MEASURE_EVERY, left), even=False)
            answers.seconds += clients.answers.seconds
            answers.refused += clients.answers.refused

    async def sample() -> None:
        while True:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(1)

    sampling = asyncio.create_task(sample())
    leaving = [events.leave(bodies) for _ in range(LEAVING)]
    others = [*leaving, events.swap(checker), events.empty()]
    await asyncio.gather(ask(), *others)
    after = await in_turn(events.port, bodies, timeout, 1, 10)
    events.count_written()
    await asyncio.sleep(3 * IMPRESSIONS["seconds"])
    events.count_written()
    sampling.cancel()
    counted = await read_metrics(events.port)
    return [
        Figure(
            f"{seconds / 60:g} minutes at {load:g} times {min(capacities):.1f} to {max(capacities):.1f}/s: answers",
            f"{sum(checker.answered.values()):,}",
        ),
        *figures_of_answers(checker, events, answers, timeout),
        *figures_of_service(counted, events, memory),
        at_most("afterwards: refused", after.refused.total(), 0),
        at_most("afterwards: p50 of one client over before", after.percentile(50) / alone.percentile(50), 1.3),
    ]


def figures_of_answers(checker: Checker, events: Events, answers: Answers, timeout: float) -> list[Figure]:
    """Return what the clients have seen."""
    odd = Counter({kind: count for kind, count in answers.refused.items() if not kind.startswith("503")})
    return [
        Figure("answers of each version", ", ".join(f"{count:,}" for count in checker.answered.values())),
        at_most("wrong answers", checker.wrong, 0),
        at_most("answers of another version than they name", checker.mixed, 0),
        at_most("p99 of answered over timeout", answers.percentile(99) / timeout, 1.0),
        at_most(f"neither answered nor refused with 503 {dict(odd) or ''}", odd.total(), 0),
        at_most(f"of {events.swaps} swaps, not seen within {SWAP_EVERY / 2:g} s", events.missed, 0),
        Figure("clients that left", f"{events.left:,}"),
    ]


def figures_of_service(counted: dict[str, float], events: Events, memory: Sequence[int]) -> list[Figure]:
    """Return what the service has counted, and its memory, given one sample a second."""
    lists = {kind: counted.get(f'rarec_impressions_total{{outcome="{kind}"}}', 0.0) for kind in ("written", "lost")}
    answered = counted['rarec_requests_total{method="POST",route="/v1/recommend",status="200"}']
    tenth = max(1, len(memory) // 10)
    early, late = (statistics.median(part) for part in (memory[tenth : 2 * tenth], memory[-tenth:]))
    reasons = {name.split('"')[1]: int(count) for name, count in counted.items() if name.startswith("rarec_refused")}
    return [
        Figure("refused, by reason", json.dumps(reasons)),
        Figure("impressions written, lost", f"{lists['written']:,.0f}, {lists['lost']:,.0f}"),
        at_most("impressions in files, less than said", lists["written"] - events.written, 0),
        at_most("impressions neither written nor said to be lost", answered - sum(lists.values()), 0),
        Figure("memory after warm-up, at the end", f"{early / 1e6:.0f} MB, {late / 1e6:.0f} MB"),
        at_most("memory at the end over after warm-up", late / early, 1.1),
    ]


def main() -> None:
    """Run it, and print the table."""
    arguments = options(__doc__, "bundle", minutes=60.0, load=2.0, timeout=10.0)
    _, histories = sample_users(rarec.load(arguments.bundle, device="cpu"), HISTORIES)
    with tempfile.TemporaryDirectory() as scratch, small_disk(Path(scratch, "impressions")) as disk:
        lists = two_versions(arguments.bundle, Path(scratch), histories)
        bodies = [json.dumps({"histories": [history], "k": K}).encode() for history in histories]
        checker = Checker(lists, {body: number for number, body in enumerate(bodies)})
        link = Path(scratch, "current")
        link.symlink_to("one")
        impressions = {**IMPRESSIONS, "path": str(disk)}
        with service(link, timeout=arguments.timeout, impressions=impressions) as (port, process):
            events = Events(port, link, disk, 0.0)
            seconds = 60 * arguments.minutes
            figures = asyncio.run(soak(events, process, checker, arguments.load, arguments.timeout, seconds))
    print_table(figures)


if __name__ == "__main__":
    main()
