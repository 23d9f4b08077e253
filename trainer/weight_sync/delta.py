"""What changed in a tensor since the version before: blocks of bytes, compressed, with a checksum of the result.

An optimizer's step changes few of the bits of bfloat16 weights. A block that changed is carried as its bytes XOR those
of before, mostly zeros, which compress well; applied to anything but the very bytes of before it would give nonsense,
so a patch is applied only where the result has the checksum that it was made with.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
COMPRESSION_LEVEL = 1


class DeltaError(ValueError):
    """A patch does not belong to the bytes that it was applied to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """How a tensor's bytes come from those of the version before, or from nothing."""

    name: str
    dtype: str
    """As safetensors names it."""
    shape: Sequence[int]
    blocks: npt.NDArray[np.int64] | None
    """Which blocks changed, in order; None: `payload` is the whole tensor, as it is."""
    block_bytes: int
    payload: bytes
    """Of blocks: their bytes XOR those of before, compressed."""
    checksum: bytes
    """SHA-256 of the tensor's new bytes."""

    @property
    def num_bytes(self) -> int:
        """That it takes to send."""
        return len(self.payload) + (0 if self.blocks is None else self.blocks.nbytes)


SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def bytes_of(tensor: torch.Tensor) -> Bytes:
    """A tensor's bytes on the CPU, in order; a view of it where that can be."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy()


def make_patch(name: str, tensor: torch.Tensor, before: Bytes | None, *, block_bytes: int) -> Patch:
    """What makes the tensor of its bytes in the version before; None: of nothing."""
    after = bytes_of(tensor)
    blocks = None if before is None else changed_blocks(before, after, block_bytes=block_bytes)
    if before is not None and blocks is not None:
        differing = _gather(before, blocks, block_bytes) ^ _gather(after, blocks, block_bytes)
        payload = zlib.compress(differing.data, COMPRESSION_LEVEL)
        if len(payload) + blocks.nbytes >= len(after):
            blocks = None
    return Patch(
        name=name,
        dtype=SAFETENSORS_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        blocks=blocks,
        block_bytes=block_bytes,
        payload=after.tobytes() if blocks is None else payload,
        checksum=hashlib.sha256(after.data).digest(),
    )


def changed_blocks(before: Bytes, after: Bytes, *, block_bytes: int) -> npt.NDArray[np.int64]:
    """The numbers of the blocks in which two stretches of the same length differ; the last block may be shorter."""
    whole = len(after) // block_bytes * block_bytes
    differs = (before[:whole] != after[:whole]).reshape(-1, block_bytes).any(axis=1)
    if whole < len(after):
        differs = np.append(differs, bool((before[whole:] != after[whole:]).any()))
    return np.flatnonzero(differs).astype(np.int64)


def apply_patch(patch: Patch, target: Bytes) -> None:
    """Change a tensor's bytes, in place, to those of the new version.

    Raises:
        DeltaError: the result is not the tensor that the patch was made of; `target` is spoilt.
    """
    if patch.blocks is None:
        if len(patch.payload) != len(target):
            raise DeltaError(f"{patch.name}: {len(patch.payload)} bytes for a tensor of {len(target)}")
        target[:] = np.frombuffer(patch.payload, dtype=np.uint8)
    else:
        try:
            payload = np.frombuffer(zlib.decompress(patch.payload), dtype=np.uint8)
        except zlib.error as fault:
            raise DeltaError(f"{patch.name}: {fault}") from fault
        _scatter_xor(target, patch.blocks, patch.block_bytes, payload)
    if hashlib.sha256(target.data).digest() != patch.checksum:
        raise DeltaError(f"{patch.name}: what came of the changes has another checksum than was meant")


def _gather(data: Bytes, blocks: npt.NDArray[np.int64], block_bytes: int) -> Bytes:
    """The bytes of some blocks, one behind the other."""
    whole = len(data) // block_bytes
    full = data[: whole * block_bytes].reshape(whole, block_bytes)[blocks[blocks < whole]].reshape(-1)
    has_rest = len(blocks) > 0 and blocks[-1] == whole
    return np.concatenate([full, data[whole * block_bytes :]]) if has_rest else full


def _scatter_xor(data: Bytes, blocks: npt.NDArray[np.int64], block_bytes: int, payload: Bytes) -> None:
    whole = len(data) // block_bytes
    inner = blocks[blocks < whole]
    full = data[: whole * block_bytes].reshape(whole, block_bytes)
    split = len(inner) * block_bytes
    full[inner] ^= payload[:split].reshape(-1, block_bytes)
    if len(blocks) > len(inner):
        data[whole * block_bytes :] ^= payload[split:]
