"""The pages are true: links, paths, fields, options and names in them exist, and their `bash` blocks run."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
import yaml

from rarec.cli import app
from rarec.config import RunConfig
from rarec.config.load import validated
from rarec.stages import STAGES
from tests.engines import needs_spark
from tests.pages import DOCS, ROOT, blocks, lines, make_place, mine, pages, prose, runnable, shell, write_files
from tests.serving import service
from tools.make_config_reference import PAGE, reference, section_of

NAMES = [page.relative_to(ROOT).as_posix() for page in pages()]
OF_NOW = [name for name in NAMES if name != "CHANGELOG.md"]
"""Pages that say how things are; the change log names what is gone."""
SECTIONS = "|".join(RunConfig.model_fields)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("docs"))


def code(page: Path) -> Iterator[str]:
    """Yield the texts in backticks outside of blocks."""
    yield from re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())) for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name}: {link}"
        if page.is_relative_to(DOCS) and target != ROOT / "RESULTS.md":  # tools/results_site.py makes it a page
            assert target.is_relative_to(DOCS), f"{name}: {link} leads out of the site"
        if anchor:
            assert anchor in anchors(target), f"{name}: {link}"


@pytest.mark.parametrize("name", OF_NOW)
def test_stages_for_a_cluster_are_all_that_an_evaluation_needs(name):
    """A stage is refused if one that it is made from was left out, after hours of training."""
    for stages in re.findall(r'RAREC_STAGES="([^"]+)"', (ROOT / name).read_text(encoding="utf-8")):
        assert stages.split() == list(STAGES)[: list(STAGES).index(stages.split()[-1]) + 1], name


@pytest.mark.parametrize("name", OF_NOW)
def test_paths_of_this_repository_exist(name):
    page = ROOT / name
    words = [*code(page), *(word for line in lines(page, "bash", "sh") for word in line.split())]
    paths = [re.match(r"(?:rarec|tests|tools|configs|launch)/[\w./-]*", word) for word in words]
    assert [path[0] for path in paths if path and not (ROOT / path[0]).exists()] == []


def field_names(model: Any = RunConfig, place: str = "") -> Iterator[str]:
    """Yield every field of the configuration, and every section."""
    for name, field in model.model_fields.items():
        yield f"{place}{name}"
        section = section_of(field.annotation)
        if section is not None:
            yield from field_names(section, f"{place}{name}.")


@pytest.mark.parametrize("name", OF_NOW)
def test_fields_exist(name):
    known = set(field_names())
    found = [
        match[0]
        for text in code(ROOT / name)
        for match in re.finditer(rf"(?<![\w./:-])(?:{SECTIONS})(?:\.[a-z][a-z0-9_]*)+(?![\w(/])", text)
    ]
    unknown = {field for field in found if field not in known and not field.endswith((".yaml", ".json", ".py"))}
    assert unknown == set()


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_their_options_exist(name):
    cli = typer.main.get_command(app)
    texts = [*lines(ROOT / name, "bash", "sh"), *code(ROOT / name)]
    for words in (shlex.split(text) for text in texts if re.match(r"rarec [a-z]", text)):
        assert words[1] in cli.commands, " ".join(words)
        command = cli.commands[words[1]]
        if hasattr(command, "commands"):
            command = command.commands[words[2]]
        known = {option for each in command.params for option in each.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words[2:] if word.startswith("-") and " " not in word}
        assert given <= known, " ".join(words)


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(ROOT / name, "yaml")])
def test_yaml_blocks_are_valid(name, tmp_path, monkeypatch):
    from rarec.cluster.definition import load_sweep

    write_files(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    for text in blocks(ROOT / name, "yaml"):
        tree = yaml.safe_load(text)
        if "runs" in tree:
            path = tmp_path / "configs" / "sweeps" / "page.yaml"
            path.parent.mkdir(parents=True)
            (tmp_path / "configs" / "runs").symlink_to(ROOT / "configs" / "runs")
            path.write_text(text)
            assert load_sweep(path).runs
        elif set(tree) <= set(RunConfig.model_fields):
            base: dict[str, Any] = mine()
            for section, fields in tree.items():
                base[section] = {**base.get(section, {}), **fields}
            validated(RunConfig, base, name)


def test_the_configuration_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == reference(), "run python -m tools.make_config_reference"


def test_every_field_says_what_it_means():
    rows = re.findall(r"^\| `(\w+)` \| .* \|  \|$", reference(), re.MULTILINE)
    assert rows == []


def test_the_results_page_is_short():
    assert len((ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()) <= 300


def test_names_of_the_api_page_exist():
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        if name != "rarec.Run":
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_page_is_in_the_navigation():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f" {page.name}\n" not in menu] == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], "Apache-2.0")
    assert {"cff-version", "title", "message", "authors"} <= set(citation)


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site" / "index.html").exists()


def test_the_page_on_vllm_installs_what_its_tests_run_with():
    recipe = (ROOT / "Makefile").read_text().split("\n.venv-vllm/done:")[1].split("\n\n")[0]
    (package,) = re.findall(r"^VLLM := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    recipe = recipe.replace("--quiet ", "").replace("$(VLLM)", package)
    ours, page = (re.findall(r" -m pip (.*)", text) for text in (recipe, "\n".join(lines(DOCS / "vllm.md", "sh"))))
    assert ours == page != []


@pytest.fixture(scope="module")
def ran(place: Path) -> Path:
    """The place after the commands of the pages, in their order."""
    for page in ("training", "serving", "vector_databases", "distributed", "sweeps", "data"):
        for command in runnable(DOCS / f"{page}.md"):
            shell(command, place, quick=True)
    return place


@pytest.mark.slow
def test_commands_and_python_lines_run_in_the_order_of_the_pages(ran):
    assert (ran / "runs" / "mine" / "bundle-3" / "recommender.json").exists()
    python = [text for text in blocks(DOCS / "serving.md", "python") if not text.startswith("#")]
    first, last, *databases = blocks(DOCS / "vector_databases.md", "python")
    same = "assert [one.item for one in top] == [one.item for one in recommender.recommend([history], k=10)[0]]"
    python += [first, *(f"{database}\n{last}\n{same}" for database in databases)]
    (ran / "page.py").write_text("\n".join(python))
    shell("python page.py", ran)
    assert len(databases) == 3


@pytest.mark.slow
def test_the_services_of_the_page_answer(ran, monkeypatch):
    """Each line of `rarec serve`; the one that names settings, with each that the page has."""
    monkeypatch.chdir(ran)
    Path("tokens.txt").write_text("a-token-of-the-test\n")
    all_settings = [text for text in blocks(DOCS / "serving.md", "yaml") if text.startswith("# serve.yaml")]
    served = [bundle["path"] for text in all_settings for bundle in yaml.safe_load(text)["bundles"].values()]
    for path in map(Path, set(served)):
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(ran / "runs" / "mine" / "bundle")
    commands = [shlex.split(line)[2:] for line in lines(DOCS / "serving.md", "sh") if line.startswith("rarec serve")]
    assert {"runs/mine/bundle", "onnx", "serve.yaml"} <= {word for words in commands for word in words}
    for words in commands:
        for settings in all_settings if "--settings" in words else [""]:
            Path("serve.yaml").write_text(settings)
            with service(*words) as started:
                url = started.url.replace("0.0.0.0", "127.0.0.1")  # where it listens is no name of it
                assert len(first_list(url)) == 10, (words, settings)


def first_list(url: str) -> list[object]:
    """Return what a service recommends as soon as the process that is asked has loaded its bundles."""
    header = {"Authorization": "Bearer a-token-of-the-test"}
    body = {"histories": [["i001", "i007"]]}
    end = time.monotonic() + 120
    while (answer := httpx.post(f"{url}/v1/recommend", json=body, headers=header, timeout=60)).status_code == 503:
        assert time.monotonic() < end, answer.text
        time.sleep(0.2)
    assert answer.status_code == 200, answer.text
    items: list[object] = answer.json()["results"][0]["items"]
    return items


@needs_spark
@pytest.mark.slow
def test_the_job_of_the_page_runs_on_spark(ran):
    """Whatever Python is first in the path of the workers."""
    files = write_files(DOCS / "serving.md", ran)
    users = pa.table({"user": ["u1", "u2"], "items": [["i001", "i007"], []]})
    pq.write_table(users, ran / "histories.parquet")
    (job,) = files
    shell(f"{sys.executable} {job}", ran)
    top = pq.read_table(ran / "top").to_pandas()
    assert top.groupby("user")["rank"].apply(list).to_dict() == {"u1": list(range(1, 11)), "u2": list(range(1, 11))}
