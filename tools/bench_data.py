"""Speed and memory of everything that moves data: ratios in one run, beside their goals.

    python tools/bench_data.py prepare DIR [--rows 10000000 100000000] [--memory 6GB]
    python tools/bench_data.py stream [--shards 20] [--rounds 3]
    python tools/bench_data.py ids [--rows 10000000]

prepare: logs of two sizes from make_log.py through the real preparation, and through SQL written by hand.
stream:  shards of realistic samples; beside a bare `tarfile` read, and beside what a frozen language model consumes.
ids:     a large table of ID embeddings, opened and gathered from; beside a bare `np.memmap`.

A figure without a goal is there to be read. Run it alone on the machine.
"""

import argparse
import os
from importlib import import_module

from measuring import print_table

COMMANDS = ("prepare", "stream", "ids")


def main() -> None:
    """Run what the command names, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    modules = {name: import_module(f"bench_data_{name}") for name in COMMANDS}  # not in the processes that measure
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, help=str(module.__doc__).partition("\n")[0].partition(": ")[2]))
    arguments = parser.parse_args()
    print(f"bench_data.py {arguments.command} on {os.cpu_count()} cores")
    print_table(modules[arguments.command].run(arguments))


if __name__ == "__main__":
    main()
