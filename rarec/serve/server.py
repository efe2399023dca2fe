"""The process that serves: its socket, its workers, its end."""

import asyncio
import logging
import os
import re
import resource
import socket
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h11
import uvicorn
import yaml
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol, RequestResponseCycle

from rarec.errors import Terminated, UserError
from rarec.serve.app import assemble
from rarec.serve.engines import check
from rarec.serve.guard import PATIENCE, SAFE
from rarec.serve.refusals import BUSY, Refused
from rarec.serve.settings import LOOPBACK, VARIABLE, ServeSettings
from rarec.serve.telemetry import FOLDER, event

FACTORY = "rarec.serve.app:create"
OPTIONS: dict[str, Any] = {
    "ws": "none",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "timeout_keep_alive": int(PATIENCE),
}
"""Of uvicorn."""
_SIMPLE = re.compile(rb"POST /v1/[!-~]* HTTP/1\.1\r\n(?s:.*?)(?i:\ncontent-length: *)(\d{1,9})(?=\r\n|\Z)")
_COMPLEX = re.compile(rb"(?is)\n(connection|expect|transfer-encoding|upgrade) *:|\ncontent-length.*\ncontent-length")
"""Heads of requests that may be refused before they are parsed, and what such a head must not have."""
CONNECTIONS = 4096
"""Connections of a process; a further one is refused before anything is read."""


def serve(settings: ServeSettings, source: Path | None, host: str, port: int, workers: int, drain: int) -> None:
    """Serve until a signal: SIGTERM and Ctrl-C answer what was asked, for at most `drain` seconds, and end.

    Args:
        settings: of the service.
        source: file of the settings, which is read again while it serves; None if they are from the command line.
        host: address to listen at.
        port: to listen at; 0 takes a free one.
        workers: processes, each with the models; one that dies is replaced.
        drain: seconds.

    Raises:
        UserError: the address cannot be listened at; the file of tokens is wrong.
    """
    if not settings.tokens and host not in LOOPBACK:
        event("warning", f"everyone who reaches {host}:{port} is served; tokens (in the settings) would change that")
    _allow_many_connections()
    with ExitStack() as stack:
        listening = stack.enter_context(_listen(host, port))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rarec-")))
        if source is None:
            source = scratch / "serve.yaml"
            source.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        os.environ[VARIABLE] = str(source)
        if workers > 1:
            (scratch / "metrics").mkdir()
            os.environ[FOLDER] = str(scratch / "metrics")
        app, manager = assemble()
        if workers == 1:
            manager.load()
        else:
            for bundle in settings.bundles.values():  # workers load them later
                check(settings, Path(bundle.path))
        logging.getLogger("uvicorn.error").addHandler(_Events())
        host, port = listening.getsockname()[:2]
        event("listening", f"http://{f'[{host}]' if ':' in host else host}:{port}/")
        options = {**OPTIONS, "http": Patient, "timeout_graceful_shutdown": drain}
        try:
            if workers > 1:
                uvicorn.run(FACTORY, factory=True, workers=workers, fd=listening.fileno(), **options)
            else:
                uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listening])
        except (KeyboardInterrupt, Terminated):  # uvicorn has ended in order, and passes its signal on
            pass
    event("ended")


class Patient(H11Protocol):
    """HTTP/1.1 whose clients have `PATIENCE` for all headers of a request, and for a body that nobody reads.

    uvicorn's own time-out begins anew with every byte, and ends with the first request. A request knows when its first
    byte came.
    """

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(Refused(503, "too many connections", BUSY, after=1.0))
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:  # a request begins
            if (early := self._early(data)) is not None:
                self.transport.write(early)
                self._unset_keepalive_if_required()
                self._expect_request()
                return
            self._note_first_byte()
        super().data_received(data)

    def _note_first_byte(self) -> None:
        self.app_state = {**self.app_state, "first_byte": time.monotonic()}

    def _early(self, data: bytes) -> bytes | None:
        """Return the refusal of a whole request that there is no time for.

        Parsing the requests of an overload would take the processor from those that are answered.
        """
        head, _, body = data.partition(b"\r\n\r\n")
        if simple_length(head) != len(body) or self.flow.write_paused:
            return None
        refused: JSONResponse | None = self.app_state["refuse_early"]()
        return _as_http(refused) if refused else None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP in the service's own form."""
        self._refuse(Refused(400, msg.rstrip("."), "send a request of HTTP/1.1"))

    def _refuse(self, refused: Refused) -> None:
        response = refused.answer()
        response.headers.update({**SAFE, "connection": "close"})
        self.transport.write(_as_http(response))
        self.transport.close()

    def on_response_complete(self) -> None:
        """See `H11Protocol`."""
        answered = self.cycle
        self._note_first_byte()  # where the next request is there already, it begins now
        super().on_response_complete()
        if self.cycle is answered:  # otherwise the next request was there already
            self._expect_request()

    def _expect_request(self) -> None:
        if self._patience:
            self._patience.cancel()
        self._patience = self.loop.call_later(PATIENCE, self._lose_patience, self.cycle)

    def _lose_patience(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last:
            self.transport.abort()  # `close` would wait for a client that reads nothing


def simple_length(head: bytes) -> int | None:
    """Return the length of the body of a request, if its head says that and nothing about the connection; else None."""
    simple = _SIMPLE.match(head)
    return int(simple[1]) if simple and not _COMPLEX.search(head) else None


def _as_http(response: JSONResponse) -> bytes:
    """Return an answer as HTTP/1.1."""
    status = b"HTTP/1.1 %d %b" % (response.status_code, STATUS_PHRASES[response.status_code])
    headers = (b"%b: %b" % header for header in response.raw_headers)
    return b"\r\n".join([status, *headers, b"", bytes(response.body)])


class _Events(logging.Handler):
    """Writes what the server says of trouble as events."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            event("server", record.getMessage())


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{host}:{port}: {reason}", "choose another: --host, --port") from None


def _allow_many_connections() -> None:
    """Raise the number of open files, of which each connection is one, to what the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65_536) if most > 0 else 65_536, most))
