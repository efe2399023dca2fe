"""`python -m rarec`: the command, where it is not on the path."""

from rarec.cli import main

main()
