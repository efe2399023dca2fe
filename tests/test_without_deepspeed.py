"""DeepSpeed is used by its own engine alone: other runs do not import it, and work where it is not installed."""

import subprocess
import sys

import pytest

from tests.test_training import log_lines, untrained

RUN = """
import sys
if sys.argv.pop(1) == "absent":
    sys.modules["deepspeed"] = None  # for Python it is not installed then
from rarec.cli import app
app(sys.argv[1:], standalone_mode=False)
assert not [name for name in sys.modules if name.partition(".")[0] == "deepspeed" and sys.modules[name] is not None]
"""
VARIANT = "per_layer_lora"
SHORT = [f"train.variants=[{VARIANT}]", f"export.variant={VARIANT}", "train.max_steps=2", "run.device=cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["absent", "present"])
def test_a_run_on_one_process_does_not_need_or_import_deepspeed(finished, tmp_path, deepspeed):
    command = [sys.executable, "-c", RUN, deepspeed, "run", str(finished), untrained(finished, tmp_path), *SHORT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [1, 2]
    assert (tmp_path / "bundle" / "lora").is_dir()
