"""Off-policy corrections, once a step over all its tokens. Importing this registers those that ship."""

from __future__ import annotations

from polyturn.trainer.algorithms.corrections import rejection, weights

__all__ = ["rejection", "weights"]
