"""When checkpoints are written, and what a run begins with."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveInt

from polyturn.configs.section import Section


class CheckpointConfig(Section):
    """When the run can be resumed from, and what it begins with."""

    every_steps: PositiveInt = 1
    """Steps between checkpoints; the last step always has one."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    asynchronous: bool = True
    """Write while the next step is played: a save then costs one copy of the state, in the memory of the host."""
    load: Path | None = None
    """What a new run begins with instead of `model.path`'s weights: a run, one of its checkpoints (with the optimizer's
    state), a torch_dist directory or a Hugging Face directory. An empty directory, into which nothing was saved yet:
    the weights at `model.reference_path`, if it is given."""
    load_optimizer: bool = True
    """Take the optimizer's state, too, if `load` is a checkpoint."""
