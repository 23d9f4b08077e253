"""Type check and import contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> int:
    """Run both checks at a time; the exit code is non-zero when one of them finds a fault."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    commands = ([str(BIN / "mypy")], [str(BIN / "lint-imports"), "--no-cache"])
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in commands]
    return max(abs(process.wait()) for process in running)


if __name__ == "__main__":
    sys.exit(main())
