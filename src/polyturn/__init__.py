"""Polyturn: an RL gym for multi-turn tool use.

The public names load on first use, so that `import polyturn` needs neither torch, Ray, SGLang nor Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "ToolEnv": "polyturn.envs.tool_env",
    "make": "polyturn.envs.registry",
    "register": "polyturn.envs.registry",
    "tool": "polyturn.tools.tool",
}

__all__ = ["ToolEnv", "__version__", "make", "register", "tool"]

if TYPE_CHECKING:
    from polyturn.envs.registry import make, register
    from polyturn.envs.tool_env import ToolEnv
    from polyturn.tools.tool import tool


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'polyturn' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)
