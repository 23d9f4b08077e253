"""How new weights get to the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from polyturn.configs.schema.section import Section


class BroadcastSync(Section):
    """Weights go to the engines by process-group broadcast, in buckets."""

    gathers_in_activate: ClassVar[bool] = True
    """Whether the ranks gather the weights while engines rest, rather than before."""
    kind: Literal["broadcast"] = "broadcast"
    bucket_bytes: PositiveInt = 512 * 1024 * 1024
    """Tensors are sent together up to this size."""
    timeout_s: PositiveFloat = 300.0
    """The run fails when a push takes longer."""
    every_steps: PositiveInt = 1
    """The engines get new weights after every so many steps, and after the last; more than 1 needs
    rollout.max_staleness."""
    dtype: Literal["same", "fp8_block", "fp8_rounded"] = "same"
    """What the engines serve: the trainer's weights as they are; cast to FP8 in 128 x 128 blocks at each sync; or
    rounded to what these blocks hold and sent in the trainer's dtype, which engines without FP8 serve, too."""


class DiskSync(Section):
    """Weights go to the engines through a Hugging Face directory that all hosts see."""

    gathers_in_activate: ClassVar[bool] = False
    kind: Literal["disk"]
    directory: Path | None = None
    """None: a folder in the run directory."""
    every_steps: PositiveInt = 1
    """The engines get new weights after every so many steps, and after the last; more than 1 needs
    rollout.max_staleness."""
    dtype: Literal["same", "fp8_block", "fp8_rounded"] = "same"
    """What the engines serve: the trainer's weights as they are; cast to FP8 in 128 x 128 blocks at each sync; or
    rounded to what these blocks hold and sent in the trainer's dtype, which engines without FP8 serve, too."""


WeightSync = Annotated[BroadcastSync | DiskSync, Field(discriminator="kind")]
