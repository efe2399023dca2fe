"""The command `rarec serve`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from rarec.cli_bundle import Device, LanguageModel, Trust
from rarec.errors import UserError

LOOPBACK = "127.0.0.1"
BundleOrNone = Annotated[
    Path | None,
    typer.Argument(metavar="[BUNDLE]", help="Folder that rarec export has written.", show_default=False),
]


def serve(
    bundle: BundleOrNone = None,
    settings: Annotated[Path | None, typer.Option(help="Settings instead: several bundles, limits, tokens.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; this machine alone reaches the default.")] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes, each with the models.")] = 1,
    backend: Annotated[str | None, typer.Option(help="torch, or onnx for a folder of --to onnx --to faiss.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="File of bearer tokens, one a line.")] = None,
    drain: Annotated[int, typer.Option(min=0, max=3600, help="Seconds to answer what was asked, at the end.")] = 30,
    llm: LanguageModel = None,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Serve a bundle over HTTP, with a page at /. Stop it with Ctrl-C."""
    try:
        http, reading = import_module("rarec.serve.server"), import_module("rarec.serve.settings")
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed", "pip install 'rarec[serve]'") from None
    if (bundle is None) == (settings is None):
        raise UserError("what to serve is not clear", "give a BUNDLE, or --settings serve.yaml")
    given: dict[str, Any] = {"backend": backend, "tokens": tokens and str(tokens.absolute()), "llm": llm}
    given = {name: value for name, value in given.items() if value is not None}
    if settings is not None:
        if given or trust or device != "auto":
            raise UserError("--settings says all but where to listen", "write the other options into that file")
        found = reading.read_settings(settings)
    else:
        found = reading.settings_of(bundle, device=device, trusted=trust or [], **given)
    http.serve(found, settings, host, port, workers, drain)
