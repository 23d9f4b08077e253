"""A function of one's own in place of a shipped one."""

from __future__ import annotations

from typing import Any, Literal

from polyturn.configs.section import Section


class Plugin(Section):
    """A function or class of one's own (docs/algorithms.md says how it is called)."""

    kind: Literal["plugin"]
    target: str
    """`module:name` or `path/to/file.py:name`, a function or a class of such."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function, or of the class's constructor."""
