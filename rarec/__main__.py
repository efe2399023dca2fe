"""The command `rarec`, also as `python -m rarec`."""

import sys
from importlib import import_module

try:
    from rarec.console.last_resort import guarded
except KeyboardInterrupt:  # before the code is there that ends all else in order
    print("interrupted", file=sys.stderr)
    sys.exit(130)


def main() -> None:
    """Run the `rarec` command."""
    guarded(lambda: import_module("rarec.cli").command())


if __name__ == "__main__":
    main()
