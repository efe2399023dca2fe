"""`python -m rarec`: the command, where it is not on the path."""

from rarec.entry import main

main()
