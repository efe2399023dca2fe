"""Make harmed runs at random for so many minutes: `python -m tests.faults 60`; any failure makes the exit code 1."""

import os
import subprocess
import sys
import time

EXAMPLES = 40
"""Examples of each kind in a round."""

end, failed, rounds = time.monotonic() + 60 * float(sys.argv[1]), 0, 0
while time.monotonic() < end:
    command = [sys.executable, "-m", "pytest", "tests/faults/test_faults.py", f"--hypothesis-seed={time.time_ns()}"]
    failed += bool(subprocess.run(command, env={**os.environ, "RAREC_FAULTS": str(EXAMPLES)}).returncode)
    rounds += 1
print(f"{rounds} rounds of {EXAMPLES} examples of each kind: {failed} with failures")
sys.exit(bool(failed))
