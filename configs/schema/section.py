"""What every part of a config has in common, and the part that names a function of one's own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Plugin(Section):
    """A function or class of one's own (docs/algorithms.md and docs/tasks.md say how it is called)."""

    kind: Literal["plugin"]
    target: str
    """`module:name` or `path/to/file.py:name`, a function or a class of such."""
    options: dict[str, Any] = {}
    """Keyword arguments of the function, or of the class's constructor."""
