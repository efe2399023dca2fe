"""`python -m rarec`: the command, where it is not on the path."""

import sys

try:
    from rarec.entry import main
except KeyboardInterrupt:  # before the code is there that ends all else in order
    print("interrupted", file=sys.stderr)
    sys.exit(130)

main()
