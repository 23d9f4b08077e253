"""Type check and import contract, on a built copy of the package.

Static tools do not follow an editable install whose folders are mapped, so the package is built into a temporary
directory and checked there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> int:
    """Run both checks; the exit code is non-zero when one of them finds a fault."""
    with tempfile.TemporaryDirectory() as name:
        built = Path(name)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        install += ["--no-deps", "--no-build-isolation", "--target", str(built), str(ROOT)]
        subprocess.run(install, check=True, cwd=name)
        config = ROOT / "pyproject.toml"
        types = subprocess.run(
            [str(BIN / "mypy"), "--config-file", str(config), "-p", "polyturn"],
            cwd=name,
            env={**os.environ, "MYPYPATH": name},
            check=False,
        )
        imports = subprocess.run(
            [str(BIN / "lint-imports"), "--config", str(config), "--no-cache"],
            cwd=name,
            env={**os.environ, "PYTHONPATH": name},
            check=False,
        )
    return types.returncode or imports.returncode


if __name__ == "__main__":
    sys.exit(main())
