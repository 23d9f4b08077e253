"""The console script: the version is told before the commands, and all that they need, are imported."""

from __future__ import annotations

import sys

from polyturn.version import __version__


def main() -> None:
    """`polyturn ARGUMENTS...`."""
    if sys.argv[1:] == ["--version"]:
        print(f"polyturn {__version__}")
        return
    from polyturn.cli.main import app

    app()


if __name__ == "__main__":
    main()
