"""`rarec bench`, and the rows of the harness in tools/."""

import re
import sys
from pathlib import Path

import pytest

from rarec import cli
from rarec.entry import open_run
from rarec.errors import UserError
from tests.test_ownership import state

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from measuring import Row


def test_bench_says_where_a_steps_time_goes_and_writes_nothing(finished, capsys):
    root = open_run(finished).root
    before = state(root)
    cli.bench(finished, steps=2)
    out = capsys.readouterr().out
    phases = re.findall(r"^(waiting for data|forward|losses|backward|update) .* ms, (\d+)%$", out, re.MULTILINE)
    assert len(phases) == 5
    assert sum(int(share) for _, share in phases) == pytest.approx(100, abs=3)
    assert re.search(r"^step .* tokens/s$", out, re.MULTILINE)
    assert re.search(r"^padding +\d+% of all positions$", out, re.MULTILINE)
    assert re.search(r"^language model alone .*%$", out, re.MULTILINE)
    assert state(root) == before


def test_every_variant_can_be_measured_and_another_name_is_refused(finished, capsys):
    cli.bench(finished, variant="text_only", steps=1)
    assert "forward" in capsys.readouterr().out
    with pytest.raises(UserError, match="--variant nothing") as error:
        cli.bench(finished, variant="nothing")
    assert "text_only" in error.value.remedy


def test_without_shards_the_command_that_makes_them_is_named(finished, tmp_path):
    with pytest.raises(UserError) as error:
        cli.bench(finished, [f"run.dir={tmp_path / 'none'}"])
    assert "rarec" in error.value.remedy


def test_a_row_of_the_harness_is_judged_by_its_ratio():
    fast, slow = Row.least("a", 30, 10, 2, "users/s"), Row.most("b", 30, 10, 2, "s")
    assert (fast.ratio, fast.met, slow.met) == (3, True, False)
    assert slow.with_ratio(2).met
    assert not fast.with_ratio(1.99).met
    assert fast.figure().figure == "30 / 10 users/s = 3.00"
