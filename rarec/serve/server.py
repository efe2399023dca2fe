"""The process that serves: its socket, its workers, its end."""

import asyncio
import logging
import os
import resource
import socket
import tempfile
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from rarec.errors import Terminated, UserError
from rarec.serve.app import assemble
from rarec.serve.guard import FOLDER, PATIENCE, event, read_tokens
from rarec.serve.settings import LOOPBACK, VARIABLE, ServeSettings

FACTORY = "rarec.serve.app:create"
OPTIONS: dict[str, Any] = {
    "ws": "none",
    "log_config": None,
    "access_log": False,
    "server_header": False,
    "timeout_keep_alive": int(PATIENCE),
}
"""Of uvicorn."""


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
    if settings.tokens:
        read_tokens(Path(settings.tokens))
    elif host not in LOOPBACK:
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
            check(settings)
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


def check(settings: ServeSettings) -> None:
    """Check the files of every bundle; workers load them later.

    Raises:
        UserError: one is missing or damaged.
    """
    for bundle in settings.bundles.values():
        if settings.backend == "onnx":
            import_module("rarec.serve.engines").check_served(Path(bundle.path))
        else:
            import_module("rarec.bundle.bundle").Bundle.open(Path(bundle.path), settings.trusted)


class Patient(H11Protocol):
    """HTTP/1.1 whose clients have `PATIENCE` for all headers of a request, and for a body that nobody reads.

    uvicorn's own time-out begins anew with every byte, and ends with the first request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._expect_request()

    def on_response_complete(self) -> None:
        """See `H11Protocol`."""
        answered = self.cycle
        super().on_response_complete()
        if self.cycle is answered:  # otherwise the next request was there already
            self._expect_request()

    def _expect_request(self) -> None:
        self.loop.call_later(PATIENCE, self._lose_patience, self.cycle)

    def _lose_patience(self, last: RequestResponseCycle | None) -> None:
        if self.cycle is last:
            self.transport.abort()  # `close` would wait for a client that reads nothing


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
