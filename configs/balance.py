"""How the samples of an update are shared out over the data-parallel ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from polyturn.configs.section import Section


class BalanceConfig(Section):
    """How the samples of an update are shared out over the data-parallel ranks, by what they cost."""

    method: Literal["greedy", "karmarkar_karp"] = "karmarkar_karp"
    """greedy gives the costliest sample to the lightest rank; karmarkar_karp evens out differences, mostly better."""
    attention_tokens: PositiveInt | None = None
    """The length at which a sample's attention costs as much as all other layers: about the parameters of a layer
    (the active ones) / (attention heads x head size). None: a sample costs its tokens."""
