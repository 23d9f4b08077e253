"""Whether tokens that several samples begin with are computed once."""

from __future__ import annotations

from typing import Literal

SharedPrefix = Literal["off", "group", "tree"]
"""off: every sample by itself. group: samples with a common prefix on one rank and in one micro-batch, each computed by
itself. tree: there, and the prefix computed once."""
