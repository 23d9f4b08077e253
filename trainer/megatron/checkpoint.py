"""Checkpoints of the trainer: one safetensors file a rank, cheap enough to write after every update.

A rank's file holds its share of the distributed optimizer (float32 weights and both moments) and its random state; the
model's weights are those float32 weights, shared out on load. Megatron-core's own checkpoints can be loaded at another
layout but take seconds to write; these load at the layout that wrote them, and the next update is then bitwise the one
of an uninterrupted run. Exporting a Hugging Face directory is the way to another layout.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save

from polyturn.trainer.megatron.engine import Engine

FORMAT = 1
MARKER = "trainer.json"
"""Written last: a directory without it was not finished."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save_checkpoint(engine: Engine, directory: Path, *, header: dict[str, Any]) -> None:
    """Write this rank's file, and the marker once every rank's is there. Collective.

    Args:
        header: JSON values that tell the layout and the position; `load_checkpoint` returns them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        (directory / MARKER).unlink(missing_ok=True)
    dist.barrier()
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in _named_state(engine)}
    metadata = {"header": json.dumps(header), "steps": json.dumps(_steps(engine))}
    write_atomically(directory / _file_name(), save(tensors, metadata))
    dist.barrier()
    if dist.get_rank() == 0:
        marker = {"format": FORMAT, **header}
        write_atomically(directory / MARKER, (json.dumps(marker, indent=2) + "\n").encode("utf-8"))
    dist.barrier()


def read_header(directory: Path) -> dict[str, Any]:
    """The header that a finished checkpoint was written with.

    Raises:
        ValueError: the directory holds no finished checkpoint, or one of another format.
    """
    path = directory / MARKER
    if not path.is_file():
        raise ValueError(f"{directory} holds no finished trainer checkpoint: it has no {MARKER}")
    header = json.loads(path.read_text(encoding="utf-8"))
    found = header.pop("format", None)
    if found != FORMAT:
        raise ValueError(f"{path}: the checkpoint has format {found}, this release reads format {FORMAT}")
    return header


def load_checkpoint(engine: Engine, directory: Path, *, layout: dict[str, Any]) -> dict[str, Any]:
    """Restore this rank and return the header. Collective.

    Raises:
        ValueError: no finished checkpoint, another layout, or another model.
    """
    header = read_header(directory)
    written = {key: header.get(key) for key in layout}
    if written != layout:
        raise ValueError(
            f"{directory} was written with {_describe(written)}, this run has {_describe(layout)}: "
            "resume with the same layout, or start a new run from the exported Hugging Face directory"
        )
    with safe_open(directory / _file_name(), framework="pt") as file:
        metadata = file.metadata()
        if json.loads(metadata["header"]) != header:
            raise ValueError(f"{directory / _file_name()} belongs to another checkpoint than {MARKER}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    _restore(engine, directory, tensors, json.loads(metadata["steps"]))
    engine.share_params()
    return header


def _file_name() -> str:
    return f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"


def _describe(layout: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in layout.items())


def _groups(engine: Engine) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The parameter groups of the inner optimizers: name, inner optimizer, group."""
    for number, optimizer in enumerate(engine.optimizers):
        inner = optimizer.optimizer
        for index, group in enumerate(inner.param_groups if inner is not None else []):
            yield f"{number}.{index}", inner, group


def _steps(engine: Engine) -> dict[str, int]:
    """How often each parameter group was stepped; FusedAdam's layout keeps it in the group."""
    return {name: int(group.get("step", 0)) for name, _, group in _groups(engine)}


def _named_state(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    for name, inner, group in _groups(engine):
        for index, param in enumerate(group["params"]):
            yield f"optimizer.{name}.{index}.weight", param
            for key, value in inner.state.get(param, {}).items():
                yield f"optimizer.{name}.{index}.{key}", value
    for name, buffer in engine.model.named_buffers():
        yield f"buffer.{name}", buffer
    yield "random.cpu", torch.random.get_rng_state()
    yield "random.device", torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        yield f"random.tracker.{name}", state


@torch.no_grad()
def _restore(
    engine: Engine, directory: Path, tensors: dict[str, torch.Tensor], steps: dict[str, int]
) -> None:
    for name, inner, group in _groups(engine):
        if steps[name]:
            group["step"] = steps[name]
        for index, param in enumerate(group["params"]):
            prefix = f"optimizer.{name}.{index}."
            weight = tensors.get(f"{prefix}weight")
            if weight is None or weight.shape != param.shape:
                raise ValueError(f"{directory} holds the checkpoint of another model")
            param.copy_(weight)
            inner.state.pop(param, None)
            moments = {
                key.removeprefix(prefix): value.to(param.device)
                for key, value in tensors.items()
                if key.startswith(prefix) and key != f"{prefix}weight"
            }
            if moments:
                inner.state[param] = moments
    for name, buffer in engine.model.named_buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
    torch.random.set_rng_state(tensors["random.cpu"])
    torch.cuda.set_rng_state(tensors["random.device"])
    tracker = "random.tracker."
    get_cuda_rng_tracker().set_states(
        {key.removeprefix(tracker): value for key, value in tensors.items() if key.startswith(tracker)}
    )
