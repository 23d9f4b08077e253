"""The optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from polyturn.configs.section import Section


class OptimizerConfig(Section):
    """AdamW with linear warm-up, then constant."""

    learning_rate: PositiveFloat = 1e-6
    """After the warm-up."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient (AdamW)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the squared gradient's running mean."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_grad: PositiveFloat = 1.0
    """Largest global norm of the gradient."""
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0."""
