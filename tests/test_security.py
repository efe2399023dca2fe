"""The source has no pickle, no eval, no shell, no remote code: of rarec, its launchers and its tools."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import rarec
from rarec.config.plain_yaml import Loader

ROOT = Path(rarec.__file__).parents[1]
SOURCES = sorted(path for room in ("rarec", "launch", "tools") for path in (ROOT / room).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
CALLS = {
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp"),
    *("torch.load", "torch.save", "pd.read_pickle", "pandas.read_pickle"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"),
}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "yaml.SafeLoader", "yaml.CSafeLoader", Loader.__name__}
OFF = ("shell", "trust_remote_code", "allow_pickle")
"""Keywords that may only be False."""
WRITES_ALONE = {"tests/faults/values.py": {"torch.save"}, "rarec/export/rarec_vllm.py": {"torch.save"}}
"""Sources that write what they never read: pickled weights that must be refused, and a tensor as vLLM takes it."""


def name_of(node: ast.expr) -> str:
    return ast.unparse(node)


def dangers(source: str) -> list[str]:
    """Return what a module does that nothing here may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += imported(node)
        elif isinstance(node, ast.Call):
            found += called(node)
        elif isinstance(node, ast.Attribute) and name_of(node) in CALLS:
            found.append(name_of(node))
    return found


def imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
    module = node.module or ""
    whole = [f"{module}.{alias.name}" for alias in node.names]
    return [name for name in whole if module.partition(".")[0] in MODULES or name in CALLS]


def called(node: ast.Call) -> Iterator[str]:
    name, keywords = name_of(node.func), {each.arg: each.value for each in node.keywords}
    if name in CALLS or name in BUILT_IN:
        yield name
    for word in OFF:
        if word in keywords and not is_constant(keywords[word], False):
            yield word
    if "weights_only" in keywords and not is_constant(keywords["weights_only"], True):
        yield "weights_only"
    if name in ("yaml.load",):
        loader = [name_of(each) for each in [*node.args[1:2], *([keywords["Loader"]] if "Loader" in keywords else [])]]
        if not loader or loader[0] not in SAFE_LOADERS:
            yield name
    if name.endswith("Environment") and not is_constant(keywords.get("autoescape"), True):
        yield "Environment without autoescape"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_foreign_code(path):
    assert set(dangers(path.read_text())) == WRITES_ALONE.get(path.relative_to(ROOT).as_posix(), set())


def test_every_claim_of_the_page_names_tests_that_are_there():
    rows = re.findall(
        r"^\| (.+?) \| .+ \| (.*) \|$", (ROOT / "SECURITY.md").read_text().split("| held by |")[1], re.MULTILINE
    )
    assert len(rows) > 10
    for topic, held in rows[1:]:
        for file, test in re.findall(r"`([\w/]+)::(\w+)`", held):
            path = ROOT / "tests" / f"{file.rpartition('/')[0]}" / f"test_{file.rpartition('/')[2]}.py"
            assert f"def {test}(" in path.read_text(), topic
        assert held or topic == "network"


def test_the_loader_of_configurations_is_a_safe_one():
    assert issubclass(Loader, yaml.SafeLoader)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import pickle as harmless",
        "import marshal, json",
        "from os import system",
        "os.system('x')",
        "run = os.system",
        "eval(text)",
        "exec(code)",
        "compile(text, 'x', 'exec')",
        "subprocess.run(line, shell=True)",
        "subprocess.run(line, shell=wanted)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "torch.load(path, weights_only=True)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "yaml.unsafe_load(text)",
        "tempfile.mktemp()",
        "jinja2.Environment(loader=x)",
        "jinja2.Environment(autoescape=False)",
    ],
)
def test_each_danger_is_noticed(line):
    assert dangers(line)


@pytest.mark.parametrize(
    "line",
    [
        "re.compile('x')",
        "model.eval()",
        "np.load(path, allow_pickle=False)",
        "yaml.load(text, Loader)",
        "subprocess.run([name], shell=False)",
        "jinja2.Environment(autoescape=True)",
    ],
)
def test_what_is_harmless_passes(line):
    assert dangers(line) == []
