"""Importing this fills the registries with all functions that ship. Each module registers its own."""

from __future__ import annotations

from polyturn.trainer.algorithms import advantages, corrections, kl, losses, reductions, shaping

__all__ = ["advantages", "corrections", "kl", "losses", "reductions", "shaping"]
