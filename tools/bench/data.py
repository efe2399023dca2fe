"""Measure speed and memory of the data pipeline, as ratios within one run, against their goals.

    python -m tools.bench.data prepare DIR [--rows 10000000 100000000] [--memory 6GB] [--rounds 1] [--most 8]
    python -m tools.bench.data stream [--shards 20] [--samples 1024] [--rounds 3] [--directory DIR]
    python -m tools.bench.data scale DIR [--interactions 100000000 --users 10000000 --items 10000000] [--stages]

prepare: prepare logs of two sizes from make_log.py with rarec, and with SQL written by hand.
stream:  stream shards of realistic samples beside a bare `tarfile` read; memory over an epoch; restart in mid-epoch.
scale:   open a large dataset, select samples from it, and run every stage over it, in bounded memory.

A figure without a goal is for information. Run it on an otherwise idle machine.
"""

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path

from tools.bench.measuring import Row, add_option, print_table

COMMANDS = ("prepare", "stream", "scale")


def main() -> None:
    """Run a sub-command and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    modules = {name: import_module(f"tools.bench.data_{name}") for name in COMMANDS}  # not where memory is measured
    for name, module in modules.items():
        form = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, description=module.__doc__, formatter_class=form)
        for option, default in module.OPTIONS.items():
            if default is Path:
                command.add_argument(option, type=Path)
            else:
                add_option(command, option, default)
    arguments = parser.parse_args()
    print(f"tools.bench.data {arguments.command} on {os.cpu_count()} cores")
    print_table(modules[arguments.command].run(arguments))


def rows(quick: bool) -> list[Row]:
    """Measure the part `data` of `python -m tools.bench`."""
    from tools.bench import data_prepare, data_stream

    with tempfile.TemporaryDirectory() as scratch:
        return [
            data_stream.row(Path(scratch) / "shards", 3 if quick else 20),
            data_prepare.row(Path(scratch), 300_000 if quick else 10_000_000),
        ]


if __name__ == "__main__":
    main()
