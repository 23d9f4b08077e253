"""What weights can come from: telling the kinds of directories apart. Needs neither torch nor Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.trainer.checkpoints.manifest import MARKER, find_faults
from polyturn.trainer.models.weight_files import INDEX_NAME, SINGLE_NAME, explain_missing_weights

TORCH_DIST_MARKER = "metadata.json"
HF_FOLDER = "hf"
"""In a torch_dist directory that we wrote: the model's config and tokenizer."""
MEGATRON_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """A directory with weights, and what kind it is."""

    kind: Literal["checkpoint", "torch_dist", "hf"]
    """One of our checkpoints, Megatron-core's format, or a Hugging Face directory."""
    path: Path


def find_source(directory: Path) -> WeightSource | None:
    """What can be loaded from a directory; None when it is empty.

    A run directory stands for its newest checkpoint, a directory of Megatron-LM for the iteration it names.

    Raises:
        ValueError: it does not exist, or holds nothing that can be loaded.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory")
    if (directory / MARKER).is_file():
        return WeightSource(kind="checkpoint", path=directory)
    if _is_torch_dist(directory):
        return WeightSource(kind="torch_dist", path=directory)
    if (directory / "config.json").is_file():
        return WeightSource(kind="hf", path=directory)
    steps = _steps(directory / "checkpoints") or _steps(directory)
    sound = [step for step in steps if not find_faults(step, read=False)]
    if sound:
        return WeightSource(kind="checkpoint", path=sound[-1])
    latest = directory / MEGATRON_LATEST
    if latest.is_file():
        iteration = latest.read_text(encoding="utf-8").strip()
        inner = directory / (f"iter_{int(iteration):07d}" if iteration.isdigit() else iteration)
        if not _is_torch_dist(inner):
            raise ValueError(f"{latest} names {iteration}, but {inner} is no torch_dist checkpoint")
        return WeightSource(kind="torch_dist", path=inner)
    if not any(directory.iterdir()):
        return None
    if any((directory / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
        raise ValueError(
            f"{directory} has weights, but no config.json that can be read, which says what model they are of: "
            "download it again"
        )
    reason = explain_missing_weights(directory)
    if reason is not None:
        raise ValueError(reason)
    raise ValueError(
        f"{directory} holds nothing to load: neither {MARKER} (a checkpoint), nor {TORCH_DIST_MARKER} (torch_dist), "
        "nor config.json (Hugging Face)"
    )


def _steps(directory: Path) -> list[Path]:
    """The checkpoints in a directory, by their numbers."""
    found = [path for path in directory.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def initial_weights(config: RunConfig) -> Path | None:
    """What a run begins with in place of the weights at `model.path`; None: those.

    A `checkpoint.load` that is still empty, as the directory that a first run is about to save into, falls back to
    the reference's weights.

    Raises:
        ValueError: `checkpoint.load` cannot be loaded.
    """
    if config.checkpoint.load is None:
        return None
    source = find_source(config.checkpoint.load)
    if source is not None:
        return source.path
    reference = config.model.reference_path
    return None if reference is None else resolve_model_path(reference, key="model.reference_path")


def _is_torch_dist(directory: Path) -> bool:
    path = directory / TORCH_DIST_MARKER
    if not path.is_file():
        return False
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return isinstance(marker, dict) and "sharded_backend" in marker
