"""Seconds that a new user waits: `make setup`, `make demo` and `make test` in a fresh clone with a fresh virtual
environment, and a second `make setup`, which must find everything in place."""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: fresh_clone.py --targets demo test"
    )
    parser.add_argument("--targets", nargs="*", default=["demo", "test"], help="make targets after setup")
    parser.add_argument("--short", action="store_true", help="only the second `make setup`, in this clone")
    return parser.parse_args()


def timed(*command: str, folder: Path) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    arguments = parse_arguments()
    seconds: dict[str, float] = {}
    if arguments.short:
        timed("make", "setup", folder=ROOT)
        seconds["second setup"] = timed("make", "setup", folder=ROOT)
    else:
        with tempfile.TemporaryDirectory() as name:
            clone = Path(name) / "polyturn"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            seconds["setup"] = timed("make", "setup", folder=clone)
            seconds["second setup"] = timed("make", "setup", folder=clone)
            for target in arguments.targets:
                seconds[target] = timed("make", target, folder=clone)
    for what, value in seconds.items():
        print(f"{what:<14} {value:>8.1f} s")
    print(json.dumps({"benchmark": "fresh_clone", "short": arguments.short, "seconds": seconds}))


if __name__ == "__main__":
    main()
