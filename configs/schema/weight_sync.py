"""How new weights get to the engines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from polyturn.configs.schema.section import Section

BUCKET_BYTES: Mapping[str, int] = {"cuda": 512 * 1024 * 1024, "cpu": 24 * 1024 * 1024}
"""Of a broadcast, where the config says nothing."""


class SyncSection(Section):
    """What every way has."""

    gathers_in_activate: ClassVar[bool] = False
    """Whether the ranks gather the weights while engines rest, rather than before."""
    needs_pause: ClassVar[bool] = True
    """Whether engines stop while they take new weights."""
    every_steps: PositiveInt = 1
    """The engines get new weights after every so many steps, and after the last; more than 1 needs
    rollout.max_staleness."""
    pause_timeout_s: PositiveFloat = 60.0
    """How long an engine may take to stop for new weights, and to go on with them."""


class WeightsSync(SyncSection):
    """What every way has that sends the weights themselves."""

    dtype: Literal["same", "fp8_block", "fp8_rounded"] = "same"
    """What the engines serve: the trainer's weights as they are; cast to FP8 in 128 x 128 blocks at each sync; or
    rounded to what these blocks hold and sent in the trainer's dtype, which engines without FP8 serve, too."""


class BroadcastSync(WeightsSync):
    """Weights go to the engines by process-group broadcast, in buckets."""

    gathers_in_activate: ClassVar[bool] = True
    kind: Literal["broadcast"] = "broadcast"
    bucket_bytes: PositiveInt | None = None
    """Tensors are sent together up to this size; null: 512 MiB on GPUs and 24 MiB on CPUs, where memory that a process
    was given before is several times as fast to fill, and the allocator keeps none in larger pieces."""
    timeout_s: PositiveFloat = 300.0
    """The run fails when a push takes longer."""

    def bucket_bytes_on(self, device: Literal["cpu", "cuda"]) -> int:
        """The size that counts for a trainer and engines on such devices."""
        return self.bucket_bytes or BUCKET_BYTES[device]


class DiskSync(WeightsSync):
    """Weights go to the engines through a Hugging Face directory that all hosts see."""

    kind: Literal["disk"]
    directory: Path | None = None
    """None: a folder in the run directory."""


class DeltaSync(WeightsSync):
    """What changed in the weights goes to every host of engines, which keeps a whole copy for them to load."""

    kind: Literal["delta"]
    directory: Path | None = None
    """Where each host keeps its copy; None: in a folder of the run directory's name."""
    block_bytes: PositiveInt = 256
    """The grain of a change."""
    bucket_bytes: PositiveInt = 512 * 1024 * 1024
    """Changes are found and sent for tensors together up to this size."""
    full_every: PositiveInt = 50
    """After so many versions one is sent whole."""


class TensorSync(WeightsSync):
    """Engines on the trainer's own GPUs open the gathered weights where they lie; on a CPU they get a copy."""

    gathers_in_activate: ClassVar[bool] = True
    kind: Literal["tensors"]
    bucket_bytes: PositiveInt = 64 * 1024 * 1024
    """Tensors are given together up to this size."""
    timeout_s: PositiveFloat = 300.0
    """The run fails when an engine takes longer to load a bucket."""


class AdapterSync(SyncSection):
    """Only LoRA's adapters go to the engines, under a new name each time, while they serve those of before."""

    needs_pause: ClassVar[bool] = False
    kind: Literal["adapter"]
    dtype: Literal["same"] = "same"
    """Of the base model, which engines serve as it is."""
    timeout_s: PositiveFloat = 300.0
    """The run fails when an engine takes longer to load them."""


WeightSync = Annotated[
    BroadcastSync | TensorSync | DeltaSync | DiskSync | AdapterSync, Field(discriminator="kind")
]
