"""Low-rank adapters in place of training every weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from polyturn.configs.section import Section

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of attention and MLP, as Hugging Face names them."""


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): W + alpha / rank · B A, with A and B trained and W frozen.

    Without dropout: the engines serve W + alpha / rank · B A, and the trainer computes the same.
    """

    rank: PositiveInt = 32
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 64.0
    """The product B A is multiplied by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = LORA_TARGETS
    """The linear layers that get adapters, by the last part of their Hugging Face names. Routed experts get none."""

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank
