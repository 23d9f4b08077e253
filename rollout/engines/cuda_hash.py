"""SGLang's hash of a tensor on CUDA, in plain torch: the same value on any device.

A port of `sglang.kernels.ops.memory.gpu_tensor_hash` (a Triton kernel): the tensor's bytes as little-endian 32-bit
words, hashed in tiles, the tiles' hashes summed and mixed. Integers only, so it is exact.
"""

from __future__ import annotations

import torch

MASK_32 = 0xFFFFFFFF
MASK_64 = 0xFFFFFFFFFFFFFFFF
TILE_WORDS = 8192
TILES_AT_ONCE = 512
SEED_1 = 0x243F6A88
SEED_2 = ((SEED_1 * 0x9E3779B1) ^ 0xDEADBEEF) & MASK_32
POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
ROTATIONS = (15, 13)


def cuda_tensor_hash(tensor: torch.Tensor) -> int:
    """The 64-bit hash of the bytes of `tensor`, any shape and dtype."""
    words = _words(tensor)
    if len(words) == 0:
        return 0
    total = 0
    for start in range(0, len(words), TILE_WORDS * TILES_AT_ONCE):
        chunk = words[start : start + TILE_WORDS * TILES_AT_ONCE]
        total += _sum_of_tiles(chunk, start, num_words=len(words))
    return _mix_64(total & MASK_64)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes as int32 words, padded with zeros."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padding = -len(data) % 4
    if padding:
        data = torch.cat([data, data.new_zeros(padding)])
    return data.view(torch.int32)


def _sum_of_tiles(chunk: torch.Tensor, start: int, *, num_words: int) -> int:
    """The sum of the 64-bit hashes of the tiles in `chunk`, which begins at word `start` of all words."""
    values = chunk.long() & MASK_32
    positions = torch.arange(start, start + len(chunk), device=chunk.device) & MASK_32
    padding = -len(chunk) % TILE_WORDS
    halves = []
    for seed, factor, bits in zip((SEED_1, SEED_2), POSITION_FACTORS, ROTATIONS, strict=True):
        rotated = ((positions << bits) | (positions >> (32 - bits))) & MASK_32
        place = ((positions * factor + seed) & MASK_32) ^ rotated
        hashed = torch.nn.functional.pad(_mix_32(values ^ place), (0, padding))
        tiles = hashed.view(-1, TILE_WORDS).sum(dim=1) & MASK_32
        halves.append(_mix_32(tiles ^ (num_words * 4 & MASK_32)))
    # int64 sums wrap modulo 2**64, which is what an unsigned sum does.
    return int(((halves[0] << 32) | halves[1]).sum().item())


def _mix_32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser. int64 products wrap modulo 2**64, which keeps their low 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK_32
    return x ^ (x >> 16)


def _mix_64(x: int) -> int:
    """SplitMix64's finaliser."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)
