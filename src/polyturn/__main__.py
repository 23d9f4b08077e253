"""`python -m polyturn` is `polyturn`."""

from polyturn.cli.main import main

main()
