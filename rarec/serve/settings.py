"""The settings of a service: `rarec serve --settings serve.yaml`, or one bundle and defaults."""

import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from rarec.config.load import read_tree, validated
from rarec.config.section import Device, Location, NonNegative, Positive, Section, Share
from rarec.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names and addresses at which a machine reaches itself."""
VARIABLE = "RAREC_SERVE"
"""Variable of the environment with the path of the settings, for servers that start `rarec.serve.app:create`."""
DEFAULT = "default"
"""Name of a bundle that is served alone."""
Name = Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,40}$")]
Seconds = Annotated[float, Field(gt=0, le=3600)]


def host_name(given: str) -> str:
    """Return the name in a header `Host`, without its port; "" if it is none."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+?))\.?(?::\d{1,5})?", given.lower())
    return match[1] or match[2] if match else ""


def _check_host(given: str) -> str:
    if given != "*" and host_name(given) != given:
        raise ValueError("write a name in lower case without a port, or an address without brackets")
    return given


Host = Annotated[str, AfterValidator(_check_host)]


class ServedBundle(Section):
    """One bundle and its share of the traffic."""

    path: Location
    """Folder of `rarec export`, or, for `backend: onnx`, of `rarec export BUNDLE --to onnx --to faiss`. When it is
    replaced, or a link in its path leads to another one, the service takes the new one, and no request fails."""
    share: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Share of the users, beside those of the other bundles; 0 serves only those that ask for it by name."""


class ImpressionSettings(Section):
    """Where each answer of `/v1/recommend` is noted, for `rarec clicks`. They apply from the start on."""

    path: Location
    """Folder. It gets files of answers, each whole when it appears, and the key of the users' hashes."""
    format: Literal["parquet", "jsonl"] = "parquet"
    """Of the files."""
    seconds: Seconds = 60.0
    """After which a file is written; the answers of so long are lost if the machine fails."""
    max_rows: Positive = 10_000
    """Lists after which a file is written earlier. Twice as many may wait in memory; more are lost, and counted."""


class ShadowSettings(Section):
    """A bundle that is asked beside those that answer, when nothing waits; its agreement with them is in `/metrics`."""

    bundle: Name
    """One of `bundles`, with share 0 if it answers nobody."""
    share: Share = 0.1
    """Share of the requests to `/v1/recommend`."""


class ServeSettings(Section):
    """What is served, to whom, and its limits."""

    bundles: Annotated[dict[Name, ServedBundle], Field(min_length=1, max_length=32)]
    """By name; a request may name one."""
    backend: Literal["torch", "onnx"] = "torch"
    """What runs the model: PyTorch, or ONNX Runtime, which needs neither torch nor the language model's folder."""
    device: Device = "auto"
    """For torch: auto, cpu, cuda or cuda:N. Whether the machine has it is seen when a bundle is opened."""
    llm: str | None = None
    """For torch: the language model, if it is elsewhere than at the export."""
    trusted: Annotated[list[str], Field(default_factory=list)]
    """Parts of your own that a bundle may import, as `package.module:Name`."""
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Threads that compute a pass of a model, in every worker; by default one a core. Fewer of them need less CPU time
    for a user, and answer one user later."""
    batch_size: Positive | None = None
    """Prompts of similar length that are computed together; by default as many as in the evaluation, for onnx 32."""
    warm_up: NonNegative = 8
    """Users with made-up histories of 1 to 20 items whom a bundle answers before it serves, so that no request waits
    for memory that the first ones take; 0 for none."""
    max_batch: Positive = 64
    """Users whose prompts go through the model together."""
    window_ms: Annotated[float, Field(ge=0, le=1000)] = 3.0
    """How long a request waits for others to share a pass of the model."""
    max_body: Annotated[int, Field(gt=0, le=1 << 30)] = 1 << 20
    """Bytes of a request."""
    max_users: Positive = 256
    """Histories in a request."""
    max_history: Positive = 1000
    """Items in a history."""
    max_k: Positive = 1000
    """Items that a request may ask for."""
    rate: Annotated[float, Field(gt=0)] | None = None
    """Requests a second of one client, by its token or address; none: no limit."""
    timeout: Seconds = 10.0
    """Seconds from the first byte of a request until its answer. What cannot be answered by then, by the measured pace,
    is refused at once with 503, and nothing is computed after it."""
    body_timeout: Seconds = 5.0
    """Seconds in which a request must have arrived."""
    hosts: Annotated[list[Host], Field(max_length=100)] | None = None
    """Names by which it may be reached (the header `Host`, without a port); `*` allows any. By default, at an address
    that others reach, any; at 127.0.0.1 `localhost` and its addresses: else a web page could read the catalogue under a
    name of its own."""
    tokens: Location | None = None
    """File of bearer tokens, one a line; without it, everyone who reaches the port is served."""
    page: bool = True
    """Whether `/` is a page for people."""
    impressions: ImpressionSettings | None = None
    """Where answers are noted; not by default."""
    shadow: ShadowSettings | None = None
    """A bundle to compare with; none by default."""

    @model_validator(mode="after")
    def _check_shadow(self) -> Self:
        if self.shadow and self.shadow.bundle not in self.bundles:
            raise ValueError(f"shadow.bundle: {self.shadow.bundle!r} is none of `bundles`: add it there, with share 0")
        return self


def read_settings(path: Path) -> ServeSettings:
    """Read settings from a YAML file; relative paths in it are relative to the file.

    Raises:
        UserError: it cannot be read, or a field is wrong.
    """
    settings = validated(ServeSettings, read_tree(path), str(path))
    place = path.absolute().parent
    bundles = {
        name: bundle.model_copy(update={"path": str(place / bundle.path)}) for name, bundle in settings.bundles.items()
    }
    tokens = str(place / settings.tokens) if settings.tokens else None
    impressions = settings.impressions and settings.impressions.model_copy(
        update={"path": str(place / settings.impressions.path)}
    )
    return settings.model_copy(update={"bundles": bundles, "tokens": tokens, "impressions": impressions})


def settings_of(bundle: Path, **fields: Any) -> ServeSettings:
    """Return the settings of a service of one bundle.

    Raises:
        UserError: a field is wrong.
    """
    tree = {"bundles": {DEFAULT: {"path": str(bundle.absolute())}}, **fields}
    return validated(ServeSettings, tree, "rarec serve")


def settings_of_environment() -> ServeSettings:
    """Return the settings that the environment names: for servers that start the application themselves.

    Raises:
        UserError: none are named, or they are wrong.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        raise UserError(f"{VARIABLE} is not set", f"set it to the path of settings: {VARIABLE}=serve.yaml")
    return read_settings(Path(path))


def read_tokens(path: Path) -> list[bytes]:
    """Return the hashes of the tokens in a file, one a line.

    Raises:
        UserError: it cannot be read, has no token, or a short one.
    """
    try:
        lines = [line.strip() for line in path.read_text("ascii").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise UserError(f"tokens {path}: {reason}", "name a file with a token on each line") from None
    if not lines or min(map(len, lines)) < 16:
        raise UserError(f"tokens {path}: no token, or one of fewer than 16 characters", "openssl rand -hex 24 > FILE")
    return [hashlib.sha256(line.encode()).digest() for line in lines]
