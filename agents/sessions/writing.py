"""How answers are written, whichever protocol they are said in."""

from __future__ import annotations

import json
from typing import Any

import orjson


def arguments_text(arguments: Any) -> str:
    """The arguments of a call as JSON text, which is how most protocols want them."""
    return json.dumps(arguments, ensure_ascii=False)


def event_bytes(data: Any, *, event: str | None = None) -> bytes:
    """One server-sent event whose data are JSON."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"
