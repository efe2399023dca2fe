"""Secrets of URLs and connection strings: nothing that rarec writes shows one, and what is no secret stays readable."""

import json
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rarec.config import RunConfig, dump_config
from rarec.config.shipped import shipped_files
from rarec.console.last_resort import CRASH, CRASHED, crash_context, guarded, machine_trouble
from rarec.console.progress import console, say
from rarec.data.preparation.inputs import input_hashes
from rarec.errors import UserError, redacted, redacted_setting
from rarec.serve.settings import ServeSettings
from rarec.storage.artefacts import sha256_json

MARKS = ("hunter", "rabbit")
"""Begin and end of each secret: neither may be shown."""
ODD = " '\"@/#:?%+=.,~!$()[]{}<>|^*\\aZ9é"
IN_USER = st.text(ODD + "&;", max_size=8)
IN_QUERY = st.text(ODD, max_size=8)
NAMES = st.sampled_from(
    "password Passwd PWD token access_token X-Amz-Signature X-Amz-Security-Token sig api_key apikey X-Goog-Signature "
    "client_secret AWSAccessKeyId auth".split()
)
USERS = st.sampled_from(["", "me", "me@server", "A%40b"])
SCHEMES = st.sampled_from(["postgres", "https", "s3", "redis", "nosuch", "mysql+driver", "simplecache::https"])


def marked(junk: str) -> str:
    return f"{MARKS[0]}{junk}{MARKS[1]}"


URLS = st.one_of(
    st.builds(lambda s, user, junk: f"{s}://{user}:{marked(junk)}@host:5432/shop", SCHEMES, USERS, IN_USER),
    st.builds(lambda s, name, junk: f"{s}://host/a/b.csv?x=1&{name}={marked(junk)}&y=2", SCHEMES, NAMES, IN_QUERY),
    st.builds(lambda s, name, junk: f"{s}://host/a/b.csv#{name}={marked(junk)}", SCHEMES, NAMES, IN_QUERY),
    st.just(f"https://{marked('')}@host/a.csv"),
)
QUOTED = IN_USER.map(lambda junk: "'" + marked(junk).replace("\\", "\\\\").replace("'", "\\'") + "'")
PLAIN = st.text("@/#:?%+.,~aZ9é", max_size=8).map(marked)
DSNS = st.one_of(
    st.builds(lambda value: f"host=x user=me password={value} dbname=z", QUOTED | PLAIN),
    st.builds(
        lambda name, junk: f"Server=x;{name}={marked(junk)};Uid=me", NAMES, st.text(" '@/#:?%+.aZ9é", max_size=8)
    ),
    st.just(f"DefaultEndpointsProtocol=https;AccountKey={marked('==')};EndpointSuffix=core.windows.net"),
)


@pytest.fixture(autouse=True)
def no_secrets_known(monkeypatch):
    monkeypatch.setattr("rarec.errors._known_secrets", {})


def config_with(engine: str, **spark: str) -> RunConfig:
    tree = yaml.safe_load((shipped_files() / "configs" / "runs" / "mine.yaml").read_text())
    tree["prepare"] |= {"engine": engine, "spark": spark}
    if "\\" not in engine:  # without them, a quote that they escape would end a secret early
        tree["prepare"]["interactions"]["path"] = engine
    return RunConfig.model_validate(tree)


def shown(text: str) -> bool:
    return any(mark in text for mark in MARKS)


@given(URLS | DSNS)
@example("https://host/x?password=hunter it's rabbit")
@settings(max_examples=150, deadline=None)
def test_no_secret_of_a_configuration_is_in_a_dump_or_in_any_message(value):
    assert not shown(redacted_setting(value))
    config = config_with(value)
    assert not shown(dump_config(config))
    assert not shown(json.dumps(config.model_dump(mode="json"), ensure_ascii=False))
    assert config.prepare.engine == value
    for text in (f"log: {value} cannot be read: no access for me@host", f"got {value!r}", f"'{value}'\nnext"):
        error = UserError(text, f"try {value} again")
        assert not shown(str(error) + error.problem + error.remedy + str(UserError([text, text])))
    assert "cannot be read: no access for me@host" in str(
        UserError(f"log: {value} cannot be read: no access for me@host")
    )
    assert not shown(machine_trouble(PermissionError(13, "Permission denied", value)) or "")


@given(st.one_of(URLS.filter(lambda url: "=" not in url), st.builds(lambda n, v: f"x=1 {n}={v} y=2", NAMES, PLAIN)))
@settings(max_examples=100, deadline=None)
def test_a_secret_of_no_configuration_is_in_no_message_either(value):
    for text in (value, value.replace("://", ":/")):  # as Path shows it
        assert not shown(str(UserError(f"log: {text} cannot be read")) + redacted(f"got {text!r}, x"))


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/x?versionId=3", "postgres://me@host:5432/shop", "https://host:8000/a/b.csv?x=1&page=2#top", "C:\\x",
     "http://[::1]:8000/x", "logs/me@host/*.csv", "https://host/a@b/c.csv", "package:rarec/examples/log.csv", "duckdb",
     "s3://bucket/day=1/passwords/token.csv", "max_tokens=5 design=4", "duckdb:///a/b.db", "see https://host: mail a@b",
     "http://host:8000 is refused: mail me@host", "the tokenizer has no token: [CLS], [SEP]"],
)  # fmt: skip
def test_what_is_no_secret_stays_as_it_is(text):
    assert redacted(text) == text
    assert " mail " in text or redacted_setting(text) == text
    assert text in str(UserError(f"log {text}", "see it"))


def test_options_named_like_secrets_are_hidden_in_maps_and_no_field_is_named_so():
    secret = {"spark.hadoop.fs.s3a.secret.key": marked("xx"), "spark.master": "local", "ssl.password": marked("y")}
    config = config_with("spark", **secret)
    assert config.prepare.spark == secret
    assert not shown(dump_config(config))
    assert "spark.master: local" in dump_config(config)
    assert not shown(str(UserError(f"Spark says {marked('xx')} is wrong")))
    for model in (RunConfig, ServeSettings):
        for name in str(model.model_json_schema()).split("'"):
            assert not name.isidentifier() or redacted_setting("a value", name) == "a value"


def test_a_renewed_secret_is_the_same_input():
    def hashes(engine: str) -> dict[str, str]:
        prepare = config_with("duckdb").prepare
        tables = {
            name: getattr(prepare, name).model_copy(update={"path": None, "table": "t"})
            for name in ("interactions", "items")
        }
        return input_hashes(prepare.model_copy(update={"engine": engine, **tables}))

    assert hashes("redis://:one@host/x") == hashes("redis://:two@host/x") != hashes("redis://:one@other/x")
    assert hashes("pg://h/x?password=a b") == hashes("pg://h/x?password=c") != hashes("pg://h/x?sslmode=c")
    assert hashes("pg://h/x")["items"] == sha256_json(["pg://h/x", "table t"])  # as ever


@given(URLS | DSNS)
@example("host=x password='hunter it\\'s rabbit' user=me")
@settings(max_examples=15, deadline=None)
def test_no_secret_is_in_a_crash_file_its_line_or_a_line_of_the_log(tmp_path_factory, value):
    directory = tmp_path_factory.mktemp("run")
    config_with(value)

    def fail() -> None:
        crash_context["directory"] = directory
        say(f"reading {value} now")
        raise RuntimeError(f"driver: {value}; {value!r}")

    with pytest.MonkeyPatch.context() as patch, console.capture() as said:
        patch.setattr(sys, "argv", ["rarec", "prepare", f"prepare.engine={value}"])
        with pytest.raises(SystemExit) as end:
            guarded(fail)
    assert end.value.code == CRASHED
    report = (directory / CRASH).read_text()
    assert "driver: " in report
    assert not shown(report + said.get())
