"""Measure what this project says is fast, in one run, beside what it is compared with.

    python -m tools.bench [PART ...] [--quick] [--json FILE]

Parts: step, ids, ranking, data, start, growth, busy; each in a process of its own. docs/performance.md has the figures
and what they mean. A ratio comes from repeats in turns, in one run; run it on an otherwise idle machine. --quick takes
about a minute, with fewer repeats and the small cases alone. RecTools, in an environment of its own: make bench-peers.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rarec.distributed.hardware import cores
from rarec.storage.files import write_json
from tools.bench.measuring import Row, apart, print_table, rows_of

PARTS = {
    "step": "step.rows",
    "ids": "ids.rows",
    "ranking": "ranking.rows",
    "data": "data.rows",
    "start": "start.rows",
    "growth": "ranking.growth",
    "busy": "waiting.rows",
}
"""The function that measures each part."""


def main() -> None:
    """Run the parts and print the table; the exit code says whether every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {min(unknown)}: there are {', '.join(PARTS)}")
    rows: list[Row] = []
    print(f"tools.bench on {cores():g} cores{', quick' if arguments.quick else ''}")
    for part in arguments.parts or PARTS:
        started = time.monotonic()
        own = apart(rows_of, PARTS[part], arguments.quick)
        rows += own
        print(f"\n{part}, {time.monotonic() - started:.0f} s")
        print_table([row.figure() for row in own])
        sys.stdout.flush()
    if arguments.json is not None:
        write_json(arguments.json, [{**asdict(row), "met": row.met} for row in rows])
    raise SystemExit(not all(row.met for row in rows))


if __name__ == "__main__":
    main()
