"""The script that starts the runner: `python3 -s -S -P FOLDER/start.py [MODULE]`, MODULE being `serve` by default.

Loads this folder as the package `runner` without putting any folder on the import path, where the names of its modules,
or its neighbours', could hide those of the standard library.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys


def main() -> None:
    """Loads the package and calls `main` of the module that the command line names."""
    folder = os.path.dirname(os.path.abspath(__file__))
    location = os.path.join(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location("runner", location, submodule_search_locations=[folder])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["runner"] = package
    spec.loader.exec_module(package)
    module = sys.argv[1] if len(sys.argv) > 1 else "serve"
    importlib.import_module(f"runner.{module}").main()


if __name__ == "__main__":
    main()
