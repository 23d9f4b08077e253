"""Functions and classes that a user names by import path or file path."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from polyturn.configs.errors import did_you_mean


def load_object(target: str) -> Any:
    """What `module:name` or `path/to/file.py:name` names; the name may be dotted.

    A file is imported once; its own folder is not put on the import path.

    Raises:
        ValueError: there is no such module, file or name, or importing it fails.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"{target!r} is not of the form module:name or path/to/file.py:name")
    module = _load_file(where) if where.endswith(".py") else _load_module(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [public for public in vars(found) if not public.startswith("_")])
            raise ValueError(f"{where} has no {part!r}{near}")
        found = getattr(found, part)
    return found


def _load_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        missing = isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name)
        hint = "; for a file, write its path with .py" if missing else ""
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}{hint}") from error


def _load_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    # A name of its own, so that two files called rewards.py do not meet; known to `sys.modules`, as dataclasses need.
    name = f"polyturn_plugin_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's module may fail in any way while it is imported
        del sys.modules[name]
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    return module
