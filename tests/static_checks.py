"""Type check and import contract."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> int:
    """Run both checks; the exit code is non-zero when one of them finds a fault."""
    types = subprocess.run([str(BIN / "mypy")], cwd=ROOT, check=False)
    imports = subprocess.run(
        [str(BIN / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )
    return types.returncode or imports.returncode


if __name__ == "__main__":
    sys.exit(main())
