"""Measure speed and memory of the data pipeline, as ratios within one run, against their goals.

    python -m tools.bench.data prepare DIR [--rows 10000000 100000000] [--memory 6GB]
    python -m tools.bench.data stream [--shards 20] [--rounds 3]
    python -m tools.bench.data ids [--rows 10000000]
    python -m tools.bench.data scale DIR [--interactions 100000000 --users 10000000 --items 10000000] [--stages]

prepare: prepare logs of two sizes from make_log.py with rarec, and with SQL written by hand.
stream:  stream shards of realistic samples; compare with a bare `tarfile` read and with the speed of a frozen model.
ids:     open a large table of ID embeddings and gather rows; compare with a bare `np.memmap`.
scale:   open a large dataset, select samples from it, and run every stage over it, in bounded memory.

A figure without a goal is for information. Run it on an otherwise idle machine.
"""

import argparse
import os
from importlib import import_module

from tools.bench.measuring import print_table

COMMANDS = ("prepare", "stream", "ids", "scale")


def main() -> None:
    """Run a sub-command and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    modules = {name: import_module(f"bench_data_{name}") for name in COMMANDS}  # not in the processes that measure
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, help=str(module.__doc__).partition("\n")[0].partition(": ")[2]))
    arguments = parser.parse_args()
    print(f"tools.bench.data {arguments.command} on {os.cpu_count()} cores")
    print_table(modules[arguments.command].run(arguments))


if __name__ == "__main__":
    main()
