"""What is shown is inert: data cannot steer a terminal, forge markup, or fill a screen."""

import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import example as example_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.table import Table

from rarec.console.inert import in_one_line, inert, inert_streams
from rarec.console.last_resort import guarded
from rarec.console.progress import Console, say
from rarec.errors import LONGEST, UserError
from rarec.storage.artefacts import write_manifest
from rarec.storage.files import write_json
from tests.test_report import directories, example, measured, write_page

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
ATTACKS = [
    "\x1b[31mred\x1b]0;title\x07",
    "\x00\x07\x08\r\x7f\x9b31m",
    "\u202egnp.exe\u202c \u2066x\u2069\u2028\u2029",
    "[bold]x[/bold] [/] [link=http://x]y[/link] :smile:",
    "\udc80",
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</style></title></svg></pre></dl></table>",
    '"><b onmouseover="x">',
    "' onload='x",
    "<!-- ",
    "]]><![CDATA[<b>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "&lt;b&gt; &#60;b&#62; &",
    "$\\frac{1}{2}$ _x_ \\1 \\g<0>",
]
texts = (
    st.text(min_size=1, max_size=40)
    | st.sampled_from(ATTACKS)
    | st.tuples(*2 * [st.sampled_from(ATTACKS)]).map("".join)
)


@given(texts)
def test_no_control_passes_and_all_else_stays(text):
    shown = inert(text)
    assert not CONTROLS.search(shown)
    assert re.sub(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\r", "", shown) == re.sub(
        r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}|\\r", "", CONTROLS.sub("", text)
    )
    assert inert(shown) == shown
    assert not {"\n", "\t"} & set(in_one_line(text))


@pytest.mark.parametrize(
    "text", ["Amélie 2", "שלום عربى", "日本語", "\u200d\u200c👩\u200d🚀", "a\tb\n", "[x]", "\\x1b"]
)
def test_ordinary_text_of_any_script_stays_as_it_is(text):
    assert inert(text) == text


@pytest.mark.parametrize("text", ATTACKS)
def test_a_table_and_a_line_show_data_as_text_without_markup(text, capsys):
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console = Console(width=200)
    console.print(table)
    console.print(text, soft_wrap=True)
    out = capsys.readouterr().out
    assert not CONTROLS.search(out)
    assert out.count(inert(text)) == 4


@pytest.mark.parametrize("text", ATTACKS)
def test_messages_results_and_what_libraries_print_are_escaped(text, capsys):
    def fail() -> None:
        say(f"read {text}")
        print(f"result {text}")
        print(f"warning {text}", file=sys.stderr)
        raise UserError(f"{text} is corrupt", f"restore {text}")

    with pytest.raises(SystemExit):
        guarded(fail)
    out, err = capsys.readouterr()
    assert not CONTROLS.search(out + err)
    assert out == f"result {inert(text)}\n"
    shown = inert(text)
    assert err == f"read {shown}\nwarning {shown}\nerror: {shown} is corrupt\n  -> restore {shown}\n"


def test_a_terminal_gets_the_consoles_own_colours_alone(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with inert_streams():
        Console(stderr=True).print("\x1b[7mforged", style="bold red")
    shown = terminal.getvalue()
    assert "\\x1b[7mforged" in shown
    assert "\x1b[7m" not in shown
    assert "\x1b[1;31m" in shown


@given(
    st.integers(min_value=LONGEST + 100, max_value=20_000),
    st.sampled_from("xé \t/,<"),
    st.sampled_from(["field `a`: got '{}'", "user {} is not in the log", 'x.csv, row 3: "{}"', "{}"]),
)
def test_long_data_are_cut_and_the_reason_stays(length, letter, message):
    data = (letter + "y") * (length // 2)
    said = str(UserError(message.format(data), "rarec run CONFIG"))
    assert len(said) < 1_200
    assert said.startswith(message.partition("{}")[0])
    assert said.endswith("\n  -> rarec run CONFIG")
    if "'" in message or '"' in message:
        assert f"({len(data) - LONGEST:,} more characters)" in said
        assert message.rpartition("}")[2] in said


def test_a_path_is_not_cut():
    path = "/".join(["", *3 * ["d" * 200], "file.csv"])
    assert path in str(UserError(f"{path} does not exist"))


def test_a_line_break_in_data_does_not_forge_a_line():
    error = UserError("a.csv\nerror: all is lost\n  -> rm -r / is corrupt", "restore it")
    assert str(error).splitlines() == ["a.csv error: all is lost -> rm -r / is corrupt", "  -> restore it"]


class Shape(HTMLParser):
    """The elements of a page with the names of their attributes; the text in between is left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", data))


def page_of(directory: Path, title: str) -> str:
    """Return the report of a run in which everything that comes from data is this text."""
    run = directories(directory)
    row, outside = example(1), re.sub("[/+]", "", title)  # these two have a meaning in a row's name
    row |= {"user": title, "history": [title, "x"], "target": title, "top": {"per_layer": [title, "y"]}}
    write_json(run.evaluation / "metrics.json", [measured("per_layer"), measured(f"external:{outside}")])
    write_json(run.evaluation / "examples.json", [row])
    write_json(run.shards / "selection.json", {"samples": {title: 1}, "noise": [{"history": [title], "target": title}]})
    run.prepare.mkdir(parents=True, exist_ok=True)
    steps = [{"step": title, "note": title}]
    write_manifest(run.prepare, "prepare", settings={}, made_from={}, counts={"users": 3}, steps=steps, note=title)
    return write_page(run).read_text()


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, ...]]:
    return Shape(page_of(tmp_path_factory.mktemp("page"), "a title")).elements


@pytest.mark.filterwarnings("ignore:Glyph")
@settings(max_examples=8)
@example_of(text="".join(ATTACKS))
@given(text=texts)
def test_no_element_or_attribute_of_the_report_arises_from_data(tmp_path_factory, harmless, text):
    directory = tmp_path_factory.mktemp("page")
    page = page_of(directory, text)
    assert not CONTROLS.search(page)
    assert Shape(page).elements == harmless
