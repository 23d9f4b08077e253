"""JSON for the page, of values that anybody may have written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import orjson

from polyturn.tools.plain import recordable

Json = dict[str, Any]
"""An answer, or a part of one, in the shape of `viewer/web/src/api.ts`."""
MAX_DEPTH = 32
"""Of values that a model wrote: deeper ones stand there as a sentence."""


def dumps(value: Any) -> bytes:
    """The value as JSON: what is not finite is null, and what JSON cannot hold stands there as text."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return orjson.dumps(recordable(value))


def finite(value: Any) -> float | None:
    """A number that JSON has; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def numbers(values: Iterable[Any]) -> list[float | None]:
    """The same of each."""
    return [finite(value) for value in values]


def text_of(value: Any) -> str:
    """A text as it is, and of any other value its JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else dumps(bounded(value)).decode()


def cut(text: str, limit: int) -> tuple[str, int]:
    """The beginning of a text, and how many characters were left out."""
    return (text, 0) if len(text) <= limit else (text[:limit], len(text) - limit)


def bounded(value: Any, *, max_chars: int = 20_000, depth: int = 0) -> Any:
    """A value of JSON with its texts and depth cut, and with no more than 1,000 items in a list or object."""
    if isinstance(value, str):
        kept, left_out = cut(value, max_chars)
        return f"{kept}… ({left_out} more characters)" if left_out else kept
    if isinstance(value, dict | list) and depth >= MAX_DEPTH:
        return "… (more levels)"
    if isinstance(value, dict):
        kept_items = list(value.items())[:1_000]
        return {
            str(key)[:200]: bounded(item, max_chars=max_chars, depth=depth + 1) for key, item in kept_items
        }
    if isinstance(value, list):
        return [bounded(item, max_chars=max_chars, depth=depth + 1) for item in value[:1_000]]
    return value
