"""Policy losses, token by token; a reduction weighs and sums them. Importing this registers those that ship."""

from __future__ import annotations

from polyturn.trainer.algorithms.losses import clip, regions, sequences, supervised, weighted

__all__ = ["clip", "regions", "sequences", "supervised", "weighted"]
