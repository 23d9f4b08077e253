"""Checksums of weights as SGLang computes and names them, so that trainer and engines can be compared.

`/weights_checker` of SGLang hashes each parameter of its own model: on a CPU the first 8 bytes of the SHA-256 of the
tensor's bytes (`sglang.srt.managers.mm_utils.tensor_hash`), on CUDA a word hash. Its model fuses q, k, v and gate, up
along dimension 0, and with them the two projections to latents, where there are two; it stacks the experts of a layer,
pads the vocabulary with rows of zeros, splits tensors over its tensor-parallel ranks, and has no tensor for a tied
`lm_head`. Every family that is trained is covered.

The word hash is a port of `sglang.kernels.ops.memory.gpu_tensor_hash` (a Triton kernel) to plain torch, with the same
value on any device: the tensor's bytes as little-endian 32-bit words, hashed in tiles, the tiles' hashes summed and
mixed. Integers only, so it is exact.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polyturn.configs.sizing.model_shape import num_experts

EngineDevice = Literal["cpu", "cuda"]

VOCABULARY_PADDING = 64
"""SGLang pads the rows of embedding and output layer to a multiple of this."""

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The engine's modules that are several of Hugging Face's, along dimension 0."""
LATENT_FUSED: Mapping[str, tuple[str, ...]] = {
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""The same with latent attention: queries have a projection of their own, and a latent or none."""
STACKED = {"w13_weight": ("gate_proj", "up_proj"), "w2_weight": ("down_proj",)}
"""The engine's tensors [experts, rows, columns] of a layer's experts, and what is concatenated in each of them."""
_EXPERT = re.compile(r"(.+\.mlp\.experts)\.\d+\.(\w+)\.weight")
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
SPLIT_BY_COLUMN = (".o_proj.weight", ".down_proj.weight")
SPLIT_BY_KV_HEAD = (".k_proj.", ".v_proj.")
SPLIT_BY_ROW = (".q_proj.", ".q_b_proj.", ".kv_b_proj.", ".gate_proj.", ".up_proj.")
SPLIT_BY_HALF = (".gate_up_proj.",)
"""Gate and up, which Hugging Face has in one tensor, too."""


def tensor_checksum(*parts: Tensor, device: EngineDevice = "cpu") -> str:
    """16 hex digits over the bytes of `parts`, one behind the other, equal to those of an engine on `device` that holds
    them as one tensor."""
    if device == "cuda":
        return f"{cuda_tensor_hash(_concatenate(parts)):016x}"
    found = hashlib.sha256()
    for part in parts:
        data = part.detach().cpu().contiguous()
        # A tensor that has been an array by `numpy()` cannot give its memory up any more.
        found.update(np.from_dlpack(data.reshape(-1).view(torch.uint8)).data)
    return found.digest()[:8].hex()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLayout:
    """How SGLang names, joins and splits a model's tensors."""

    tied_embeddings: bool
    num_experts: int = 0
    num_kv_heads: int | None = None
    """Needed when there are fewer than tensor-parallel ranks: these then share heads."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: FUSED)

    @classmethod
    def of_config(cls, hf_config: Mapping[str, Any]) -> EngineLayout:
        """That of a model with this config.json."""
        has_latents = hf_config.get("kv_lora_rank") is not None
        fused = LATENT_FUSED if has_latents else FUSED
        if has_latents and not hf_config.get("q_lora_rank"):
            fused = {name: parts for name, parts in fused.items() if "q_a_proj" not in parts}
        return cls(
            tied_embeddings=bool(hf_config.get("tie_word_embeddings")),
            num_experts=num_experts(hf_config),
            num_kv_heads=None if has_latents else hf_config.get("num_key_value_heads"),
            fused=fused,
        )

    def engine_name(self, name: str) -> str:
        """The engine's name of the tensor that holds the Hugging Face tensor `name`."""
        if expert := _EXPERT.fullmatch(name):
            stacked = next(stacked for stacked, parts in STACKED.items() if expert[2] in parts)
            return f"{expert[1]}.{stacked}"
        for fused, parts in self.fused.items():
            for part in parts:
                if f".{part}." in name:
                    return name.replace(f".{part}.", f".{fused}.")
        return name

    def hf_names(self, name: str) -> tuple[str, ...]:
        """The Hugging Face names of the engine's tensor `name`, to be concatenated along dimension 0.

        Those of stacked experts come expert by expert.
        """
        experts, _, stacked = name.rpartition(".")
        if stacked in STACKED:
            return tuple(
                f"{experts}.{expert}.{part}.weight"
                for expert in range(self.num_experts)
                for part in STACKED[stacked]
            )
        for fused, parts in self.fused.items():
            if f".{fused}." in name:
                return tuple(name.replace(f".{fused}.", f".{part}.") for part in parts)
        return (name,)

    def shard(self, name: str, tensor: Tensor, *, rank: int, size: int) -> Tensor:
        """The part of the whole Hugging Face tensor that one tensor-parallel rank of the engine holds."""
        if name in VOCABULARY:
            return _pad_rows(tensor, -len(tensor) % VOCABULARY_PADDING).chunk(size)[rank]
        if name.endswith(SPLIT_BY_COLUMN):
            return tensor.chunk(size, dim=1)[rank]
        if any(part in name for part in SPLIT_BY_KV_HEAD):
            num_shards = min(size, self.num_kv_heads or size)
            return tensor.chunk(num_shards)[rank * num_shards // size]
        if any(part in name for part in SPLIT_BY_HALF):
            return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
        if any(part in name for part in SPLIT_BY_ROW):
            return tensor.chunk(size)[rank]
        return tensor


class EngineChecksums:
    """What `EngineControl.weight_checksums` returns for an engine that holds the tensors that are added here.

    Tensors come one by one under their Hugging Face names, whole, in any order; only the parts of a fused tensor that
    is not complete yet are held.
    """

    def __init__(
        self, layout: EngineLayout, *, device: EngineDevice = "cpu", tensor_parallel: int = 1
    ) -> None:
        """`tensor_parallel`: ranks of the engine, each of which has checksums of its own."""
        self._layout = layout
        self._device = device
        self._size = tensor_parallel
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._checksums: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        if self._layout.tied_embeddings and name == "lm_head.weight":
            return
        target = self._layout.engine_name(name)
        # A tensor may have the engine's name as it is: GLM-4's gate and up are one in Hugging Face, too.
        wanted = (name,) if target == name else self._layout.hf_names(target)
        parts = self._waiting.setdefault(target, {})
        parts[name] = tensor
        if len(parts) == len(wanted):
            del self._waiting[target]
            for rank in range(self._size):
                prefix = f"rank{rank}." if rank else ""
                shards = [
                    self._layout.shard(part, parts[part], rank=rank, size=self._size) for part in wanted
                ]
                self._checksums[prefix + target] = tensor_checksum(*shards, device=self._device)

    def finish(self) -> dict[str, str]:
        """Checksum by the engine's tensor name. Raises `ValueError` when a part of a fused tensor is missing."""
        if self._waiting:
            name, parts = next(iter(self._waiting.items()))
            missing = ", ".join(sorted(set(self._layout.hf_names(name)) - set(parts)))
            raise ValueError(f"the engine's {name} needs {missing}, which the trainer did not give")
        return self._checksums


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(num_rows, *tensor.shape[1:])]) if num_rows else tensor


MASK_32 = 0xFFFFFFFF
MASK_64 = 0xFFFFFFFFFFFFFFFF
TILE_WORDS = 8192
TILES_AT_ONCE = 512
SEED_1 = 0x243F6A88
SEED_2 = ((SEED_1 * 0x9E3779B1) ^ 0xDEADBEEF) & MASK_32
POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
ROTATIONS = (15, 13)


def cuda_tensor_hash(tensor: Tensor) -> int:
    """The 64-bit hash of the bytes of `tensor`, any shape and dtype."""
    words = _words(tensor)
    if len(words) == 0:
        return 0
    total = 0
    for start in range(0, len(words), TILE_WORDS * TILES_AT_ONCE):
        chunk = words[start : start + TILE_WORDS * TILES_AT_ONCE]
        total += _sum_of_tiles(chunk, start, num_words=len(words))
    return _mix_64(total & MASK_64)


def _words(tensor: Tensor) -> Tensor:
    """The bytes as int32 words, padded with zeros."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    padding = -len(data) % 4
    if padding:
        data = torch.cat([data, data.new_zeros(padding)])
    return data.view(torch.int32)


def _sum_of_tiles(chunk: Tensor, start: int, *, num_words: int) -> int:
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


def _mix_32(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser. int64 products wrap modulo 2**64, which keeps their low 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK_32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK_32
    return x ^ (x >> 16)


def _mix_64(x: int) -> int:
    """SplitMix64's finaliser."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)
