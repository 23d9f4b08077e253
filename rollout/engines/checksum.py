"""Checksums of weights as SGLang computes and names them, so that trainer and engines can be compared.

`/weights_checker` of SGLang hashes each parameter of its own model: the first 8 bytes of the SHA-256 of the
tensor's bytes (`sglang.srt.managers.mm_utils.tensor_hash`, for a tensor on the CPU). Its model fuses q, k, v
and gate, up along dimension 0, pads the vocabulary with rows of zeros, and has no tensor for a tied
`lm_head`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY_PADDING = 64
"""SGLang pads the rows of embedding and output layer to a multiple of this."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def tensor_checksum(tensor: Tensor) -> str:
    """16 hex digits over the bytes of `tensor` (any shape and dtype), equal to those of an engine on a CPU."""
    return checksum_of_parts([tensor])


def checksum_of_parts(parts: Sequence[Tensor], *, num_zero_rows: int = 0) -> str:
    """The checksum of `parts` concatenated along dimension 0, with rows of zeros after them."""
    import torch

    hasher = hashlib.sha256()
    for part in parts:
        data = part.detach().cpu().contiguous()
        hasher.update(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
    if num_zero_rows:
        last = parts[-1]
        hasher.update(bytes(num_zero_rows * last[0].numel() * last.element_size()))
    return hasher.digest()[:8].hex()


def engine_name(name: str) -> str:
    """The engine's name of the tensor that holds the Hugging Face tensor `name`."""
    for fused, parts in FUSED.items():
        for part in parts:
            if f".{part}." in name:
                return name.replace(f".{part}.", f".{fused}.")
    return name


def fused_names(name: str) -> tuple[str, ...]:
    """The Hugging Face names of the engine's tensor `name`, to be concatenated along dimension 0."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return tuple(name.replace(f".{fused}.", f".{part}.") for part in parts)
    return (name,)


def engine_checksums(
    named_tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor], *, tied_embeddings: bool
) -> dict[str, str]:
    """What `EngineControl.weight_checksums` returns for a one-rank engine that holds these tensors.

    Only the parts of one fused tensor are held at a time, so a stream of tensors in layer order needs little
    memory. Raises `ValueError` when a part of a fused tensor is missing.
    """
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    checksums: dict[str, str] = {}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in items:
        if tied_embeddings and name == "lm_head.weight":
            continue
        target = engine_name(name)
        parts = waiting.setdefault(target, {})
        parts[name] = tensor
        wanted = fused_names(target)
        if len(parts) < len(wanted):
            continue
        padding = -len(tensor) % VOCABULARY_PADDING if name in VOCABULARY else 0
        checksums[target] = checksum_of_parts([parts[part] for part in wanted], num_zero_rows=padding)
        del waiting[target]
    if waiting:
        name, parts = next(iter(waiting.items()))
        missing = sorted(set(fused_names(name)) - set(parts))
        raise ValueError(f"the engine's {name} needs {', '.join(missing)}, which the trainer did not give")
    return checksums
