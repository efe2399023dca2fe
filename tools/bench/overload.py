"""Ask a service for more than it can do, as independent clients would: `python -m tools.bench.serve BUNDLE overload`.

Arrivals are a Poisson process (with --even: evenly spaced) that does not wait for answers. Each takes an idle
connection, or opens one. Time counts from the moment at which a request should have been sent, so that a generator
that falls behind makes figures worse, never better.

The capacity is what the same process sees, right before each load, with clients that each wait for their answer: the
generator's share of the processor is in both figures, and so is whatever else the machine does.
"""

import asyncio
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from tools.bench.measuring import Figure, at_least, at_most

LOADS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
"""Loads, in capacities."""
HELD = (3.0, 10.0)
"""Loads at which the goals must be met."""
HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
CLIENTS = 16
"""Clients that wait for their answers, whom the service is never too full for."""
RESTS = 5.0
"""Seconds after which an idle connection is not used again, as clients do whose server closes such ones: a request
that is sent while it does so is lost."""
PATIENCE = 3.0
"""Timeouts of the service after which a client gives up: late answers must be seen."""


@dataclass
class Answers:
    """What became of requests.

    Attributes:
        seconds: until each answer with status 200, and the moment of that answer.
        refused: number of other answers, by status and problem.
        check: is called with the request and the answer with status 200.
    """

    seconds: list[tuple[float, float]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    check: Callable[[bytes, bytes], None] = lambda request, answer: None

    def goodput(self, start: float, end: float, timeout: float) -> float:
        """Return the answers a second that came within the timeout, in a span of time."""
        good = sum(seconds <= timeout and start <= moment < end for seconds, moment in self.seconds)
        return good / (end - start)

    def percentile(self, percent: int) -> float:
        """Return a percentile of the seconds until an answer with status 200."""
        seconds = [seconds for seconds, _ in self.seconds]
        return statistics.quantiles(seconds, n=100)[percent - 1] if len(seconds) > 1 else float("nan")


class Connection(asyncio.Protocol):
    """A connection that carries one request at a time.

    Args:
        answers: notes what comes back.
        free: is called with it when it can carry another request.
    """

    def __init__(self, answers: Answers, free: Callable[["Connection"], None]) -> None:
        self._answers, self._free = answers, free
        self._asked: float | None = None
        self._came = b""
        self.refused = False
        self._rests_since = float("inf")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._loop = asyncio.get_running_loop()

    def ask(self, body: bytes, asked: float, patience: float) -> None:
        """Send a request that should have been sent at a moment."""
        self._asked, self._request = asked, body
        self._giving_up = self._loop.call_later(patience, self._give_up)
        self.transport.write(HEAD + str(len(body)).encode() + b"\r\n\r\n" + body)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._came += data
        head, found, body = self._came.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if found and len(body) >= length and self._asked is not None:
            now, status = self._loop.time(), head[9:12].decode()
            self.refused = status != "200"
            if not self.refused:
                self._answers.seconds.append((now - self._asked, now))
                self._answers.check(self._request, body)
            else:
                self._answers.refused[f"{status} {json.loads(body)['problem']}"] += 1
            self._done()
            if b"connection: close" not in head.lower():
                self._free(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        if self._asked is not None:
            self._answers.refused["connection lost"] += 1
            self._done()

    @property
    def usable(self) -> bool:
        """Return whether the server will still read a request."""
        return not self.transport.is_closing() and self._loop.time() < self._rests_since + RESTS

    def _give_up(self) -> None:
        self._answers.refused["no answer at all"] += 1
        self._done()
        self.transport.abort()

    def _done(self) -> None:
        self._asked, self._came, self._rests_since = None, b"", self._loop.time()
        self._giving_up.cancel()


class Clients:
    """Independent clients of a service.

    Args:
        port: of the service, on this machine.
        bodies: of requests.
        timeout: of the service.
    """

    def __init__(self, port: int, bodies: Sequence[bytes], timeout: float) -> None:
        self._port, self._bodies, self._patience = port, bodies, PATIENCE * timeout
        self.answers, self._idle, self._opening = Answers(), list[Connection](), set[asyncio.Task[None]]()

    async def arrive(self, rate: float, seconds: float, even: bool) -> None:
        """Ask at a rate, and wait for what was asked."""
        loop = asyncio.get_running_loop()
        moment, end, asked = loop.time(), loop.time() + seconds, 0
        while moment < end:
            await asyncio.sleep(moment - loop.time())
            self._ask(moment)
            moment, asked = moment + (1 / rate if even else random.expovariate(rate)), asked + 1
        while len(self.answers.seconds) + self.answers.refused.total() < asked:
            await asyncio.sleep(0.05)
        for connection in self._idle:
            connection.transport.close()

    def _ask(self, moment: float) -> None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self._send(connection, moment)
                return
            connection.transport.close()
        task = asyncio.ensure_future(self._open(moment))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, moment: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(self.answers, self._idle.append), "127.0.0.1", self._port
            )
        except OSError:
            self.answers.refused["no connection"] += 1
        else:
            self._send(connection, moment)

    def _send(self, connection: Connection, moment: float) -> None:
        connection.ask(random.choice(self._bodies), moment, self._patience)


async def in_turn(port: int, bodies: Sequence[bytes], timeout: float, clients: int, seconds: float) -> Answers:
    """Ask with some clients, each of which waits for its answer."""
    answers, loop = Answers(), asyncio.get_running_loop()
    end, connections = loop.time() + seconds, list[Connection]()

    def again(connection: Connection) -> None:
        if connection.refused and loop.time() < end:  # who is refused comes again a little later
            connection.refused = False
            loop.call_later(0.25, again, connection)
        elif loop.time() < end:
            connection.ask(random.choice(bodies), loop.time(), PATIENCE * timeout)
        else:
            connection.transport.close()

    for _ in range(clients):
        _, connection = await loop.create_connection(lambda: Connection(answers, again), "127.0.0.1", port)
        again(connection)
        connections.append(connection)
    await asyncio.sleep(seconds)
    while not all(connection.transport.is_closing() for connection in connections):
        await asyncio.sleep(0.05)
    return answers


def overloaded(
    port: int,
    process: psutil.Process,
    bodies: Sequence[bytes],
    timeout: float,
    seconds: float,
    even: bool,
    loads: Sequence[float],
) -> list[Figure]:
    """Measure capacity, then answers and refusals at each load, then whether all is as before."""

    async def measure() -> list[Figure]:
        await in_turn(port, bodies, timeout, CLIENTS, seconds / 4)
        before = await in_turn(port, bodies, timeout, 1, seconds / 4)
        memory, figures = process.memory_info().rss, list[Figure]()
        for load in loads:
            start = asyncio.get_running_loop().time()
            full = await in_turn(port, bodies, timeout, CLIENTS, seconds)
            capacity = full.goodput(start, start + seconds, timeout)
            figures += await _at(port, bodies, timeout, seconds, even, load, capacity)
        after = await in_turn(port, bodies, timeout, 1, seconds / 4)
        return [
            *figures,
            at_most("afterwards: p50 of one client over before", after.percentile(50) / before.percentile(50), 1.3),
            at_most("afterwards: refused", after.refused.total(), 0),
            at_most("afterwards: memory over before", process.memory_info().rss / memory, 1.1),
        ]

    return asyncio.run(measure())


async def _at(
    port: int, bodies: Sequence[bytes], timeout: float, seconds: float, even: bool, load: float, capacity: float
) -> list[Figure]:
    """Measure one load."""
    clients, start = Clients(port, bodies, timeout), asyncio.get_running_loop().time()
    await clients.arrive(load * capacity, seconds, even)
    answers = clients.answers
    goodput, last = answers.goodput(start, start + seconds, timeout) / capacity, answers.percentile(99)
    refused = ", ".join(f"{count} x {kind}" for kind, count in answers.refused.most_common()) or "none"
    shown = f"p50 {answers.percentile(50):.2f} s, p99 {last:.2f} s; refused: {refused}"
    figures = [Figure(f"load {load:g} of {capacity:.1f}/s", shown)]
    if load not in HELD:
        return [*figures, Figure(f"load {load:g}: goodput over capacity", f"{goodput:.2f}")]
    return [
        *figures,
        at_least(f"load {load:g}: goodput over capacity", goodput, 0.9),
        at_most(f"load {load:g}: p99 of answered over timeout", last / timeout, 1.0),
    ]
