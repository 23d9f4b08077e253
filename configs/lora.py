"""Low-rank adapters in place of training every weight."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from polyturn.configs.section import Section


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): W + alpha / rank · B A, with A and B trained and W frozen.

    Without dropout: the engines serve W + alpha / rank · B A, and the trainer computes the same.
    """

    rank: PositiveInt = 32
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 64.0
    """The product B A is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """The linear layers that get adapters, by the last part of their Hugging Face names (`q_proj`); empty: all of
    attention, MLP and shared experts. Routed experts get none."""

    def adapts(self, name: str) -> bool:
        """Whether a linear layer gets an adapter; `name` is that of its Hugging Face module."""
        return not self.target_modules or name.rpartition(".")[2] in self.target_modules

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank
