"""Optional packages: imported where they are used, and asked for by the command that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


class MissingPackage(ImportError, ValueError):
    """An adapter's package cannot be imported. The text says how to install it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, which `pip install polyturn[extra]` brings.

    Raises:
        MissingPackage: it, or something that it imports, is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        why = "is not installed" if error.name == package else f"cannot be imported ({error})"
        raise _missing(package, why, extra) from error


def require_installed(package: str, *, extra: str) -> None:
    """As `require`, of a package that another process will import."""
    if importlib.util.find_spec(package) is None:
        raise _missing(package, "is not installed", extra)


def _missing(package: str, why: str, extra: str) -> MissingPackage:
    return MissingPackage(
        f"the package {package!r} {why}; install it with: pip install 'polyturn[{extra}]'", name=package
    )
