"""The optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from polyturn.configs.section import Section

Fraction = Annotated[float, Field(ge=0, le=1)]


class ConstantSchedule(Section):
    """The learning rate as it is, after the warm-up."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(Section):
    """From the peak down along half a cosine (arXiv 1608.03983)."""

    kind: Literal["cosine"]
    num_updates: PositiveInt | None = None
    """The update at which it ends; None: the last one of the run."""
    final_fraction: Fraction = 0.1
    """Where it ends, as a fraction of the peak."""


class LinearSchedule(Section):
    """From the peak down along a straight line."""

    kind: Literal["linear"]
    num_updates: PositiveInt | None = None
    """The update at which it ends; None: the last one of the run."""
    final_fraction: Fraction = 0.0
    """Where it ends, as a fraction of the peak."""


class StableDecaySchedule(Section):
    """Warm-up, stable, decay: the peak until a straight line down at the end (arXiv 2404.06395)."""

    kind: Literal["wsd"]
    num_updates: PositiveInt | None = None
    """The update at which it ends; None: the last one of the run."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The part of all updates that the line down takes."""
    final_fraction: Fraction = 0.0
    """Where it ends, as a fraction of the peak."""


ScheduleChoice = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | StableDecaySchedule, Field(discriminator="kind")
]


class OptimizerConfig(Section):
    """AdamW with linear warm-up and a schedule."""

    learning_rate: PositiveFloat = 1e-6
    """The peak, which the warm-up ends at."""
    schedule: ScheduleChoice = ConstantSchedule()
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient (AdamW)."""
    decay_vectors: bool = False
    """Whether norms and biases decay, too."""
    no_decay: list[str] = []
    """What does not decay either: patterns of Megatron-core's parameter names, such as `*word_embeddings*`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the squared gradient's running mean."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_grad: PositiveFloat = 1.0
    """Largest global norm of the gradient; a longer one is scaled down to it."""
    max_grad_norm: PositiveFloat | None = None
    """A gradient whose norm, before it is clipped, is larger than this has exploded; so has one that is not finite."""
    on_exploding: Literal["stop", "skip"] = "stop"
    """stop ends the run; skip leaves weights and optimizer as they are and counts the update as skipped."""
