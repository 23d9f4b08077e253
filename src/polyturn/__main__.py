"""`python -m polyturn` is `polyturn`."""

from polyturn.cli.entry import main

main()
