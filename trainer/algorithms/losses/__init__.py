"""Policy losses, token by token; a reduction weighs and sums them. Importing this registers those that ship."""

from __future__ import annotations

from polyturn.trainer.algorithms.losses import clip, supervised

__all__ = ["clip", "supervised"]
