"""What config.json says of weights in FP8, and which of a model's tensors are: by names and shapes, without torch.

Read is FP8 with a scale for each block, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3): `quant_method:
fp8` and `weight_block_size`, scales as `weight_scale_inv` beside each matrix. Everything else is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from polyturn.trainer.models.weight_files import FLOATS, FP8, SCALE_SUFFIX, StoredTensor

BLOCK = 128
SCALES = (*(dtype for dtype in FLOATS if dtype != "F64"), "F8_E8M0")
"""The dtypes that scales are stored in."""
_MATRIX = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\..*(?:_proj|_proj_with_mqa)\.weight$")
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)\d+\.\w+\.weight$")
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices that an engine joins row by row into one; it wants each of them in whole blocks."""
_LATENT = ("q_a_proj", "kv_a_proj_with_mqa")
"""Joined in the same way, but only the seam must lie between blocks."""
_HALVES = "gate_up_proj"
"""Stored as one: its halves must be whole blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFP8:
    """How the matrices of a directory are quantised."""

    block: tuple[int, int] = (BLOCK, BLOCK)
    """Rows and columns that have a scale in common."""
    powers_of_two: bool = False
    """Scales are rounded up to powers of two (`scale_fmt: ue8m0`, as in DeepSeek-V3.1)."""

    @classmethod
    def of(cls, config: Mapping[str, Any], *, source: object) -> Self | None:
        """As a config.json says; None: its weights are not quantised.

        Raises:
            ValueError: they are quantised in another way, which is not read.
        """
        quantization = config.get("quantization_config")
        if not quantization:
            return None
        said = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
        method, size = said.get("quant_method"), said.get("weight_block_size")
        if method == "fp8" and not size:
            raise ValueError(
                f"{source} is quantised in FP8 with one scale for a whole matrix, and only FP8 with a scale for each "
                "block (weight_block_size) can be read: use the model in bfloat16"
            )
        if method != "fp8":
            raise ValueError(
                f"{source} is quantised with {method!r}, and only FP8 with a scale for each block (quant_method fp8, "
                "weight_block_size) can be read: use the model in bfloat16"
            )
        if not (
            isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)
        ):
            raise ValueError(f"{source}: weight_block_size must be two numbers above 0, not {size!r}")
        return cls(block=(size[0], size[1]), powers_of_two=said.get("scale_fmt") == "ue8m0")

    def num_scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a matrix; blocks at its lower and right edge may be smaller."""
        return tuple(-(-size // block) for size, block in zip(shape, self.block, strict=False))


def without_quantization(config: Mapping[str, Any], *, source: object) -> dict[str, Any]:
    """A config.json as it is once its weights are read as what they stand for. Raises `ValueError` as `BlockFP8.of`."""
    BlockFP8.of(config, source=source)
    return {key: value for key, value in config.items() if key != "quantization_config"}


def starts_engines(config: Mapping[str, Any], dtype: str) -> bool:
    """Whether engines that are sent weights as `weight_sync.dtype` says can start from a model's directory as it is."""
    return bool(config.get("quantization_config")) == (dtype == "fp8_block")


def check_scales(stored: Mapping[str, StoredTensor], config: Mapping[str, Any], *, source: object) -> None:
    """That every FP8 matrix of a directory has its scales, as its config.json says.

    Raises:
        ValueError: it has none, or of another shape or dtype; names the file and the tensor.
    """
    fp8 = BlockFP8.of(config, source=source)
    for name, tensor in stored.items():
        if tensor.dtype == FP8:
            check_scale(name, stored, fp8 or BlockFP8())


def check_scale(name: str, stored: Mapping[str, StoredTensor], fp8: BlockFP8) -> None:
    """The same of one matrix."""
    tensor, scales_name = stored[name], f"{name}{SCALE_SUFFIX}"
    scales = stored.get(scales_name)
    if scales is None:
        beside = f"{name}{SCALE_SUFFIX.removesuffix('_inv')}"
        instead = f"; {beside} is one scale for all of it" if beside in stored else ""
        raise ValueError(
            f"{tensor.path}: {name} has the dtype {tensor.dtype}, and there is no {scales_name}{instead}: only FP8 "
            "with a scale for each block can be read"
        )
    if scales.dtype not in SCALES:
        raise ValueError(
            f"{scales.path}: {scales_name} has the dtype {scales.dtype}, and scales are one of {', '.join(SCALES)}"
        )
    wanted = fp8.num_scales(tensor.shape)
    if len(tensor.shape) != 2 or scales.shape != wanted:
        raise ValueError(
            f"{scales.path}: {scales_name} has the shape {list(scales.shape)}, and blocks of {fp8.block[0]} x "
            f"{fp8.block[1]} of {name} {list(tensor.shape)} need {list(wanted)}"
        )


def find_quantised(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Which of a model's tensors are cast to FP8, by their Hugging Face names: matrices of attention and feed-forward
    layers, but for those that an engine could not take.

    What an engine joins is left alone together where a seam would lie inside a block, and so are all experts of a
    layer: an engine has one precision for all of them.
    """
    matrices = {name for name, shape in shapes.items() if _MATRIX.match(name) and len(shape) == 2}
    left_alone = {name for name in matrices if _has_split_block(name, shapes, matrices)}
    experts = {found[1] for name in left_alone if (found := _EXPERT.match(name))}
    return frozenset(
        name for name in matrices - left_alone if not ((found := _EXPERT.match(name)) and found[1] in experts)
    )


def _has_split_block(name: str, shapes: Mapping[str, tuple[int, ...]], matrices: Collection[str]) -> bool:
    prefix, _, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf == _HALVES:
        return shapes[name][0] % (2 * BLOCK) != 0
    for group in _JOINED:
        members = [full for member in group if (full := f"{prefix}.{member}.weight") in matrices]
        if leaf in group and len(members) > 1:
            return any(shapes[member][0] % BLOCK for member in members)
    first = f"{prefix}.{_LATENT[0]}.weight"
    return leaf in _LATENT and first in matrices and shapes[first][0] % BLOCK != 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRanks:
    """Over how many ranks an engine divides the matrices of each kind; 1: every rank has them whole."""

    attention: int
    """Of one data-parallel part of the attention."""
    experts: int
    """That share one expert."""
    shared_experts: int
    dense: int
    """The layers of a model with experts that have none, and all of any other model's."""

    def of(self, name: str) -> int:
        """Those of a matrix, by its name."""
        if _EXPERT.match(name):
            return self.experts
        if ".shared_expert" in name:
            return self.shared_experts
        return self.attention if ".self_attn." in name else self.dense


def check_engine_blocks(
    shapes: Mapping[str, tuple[int, ...]],
    quantised: Collection[str],
    *,
    ranks: EngineRanks,
    num_kv_heads: int,
) -> None:
    """That an engine can divide FP8 matrices among its ranks: it wants whole blocks on each of them.

    As SGLang 0.5.23 checks it (`Fp8LinearMethod.validate_block_quant_shapes`, `Fp8MoEMethod.create_weights`).

    Args:
        shapes: of the model's tensors; of a layer's experts one will do.

    Raises:
        ValueError: a rank's part of a matrix is no multiple of 128.
    """
    for name in sorted(quantised & shapes.keys()):
        leaf, (rows, columns) = name.split(".")[-2], shapes[name]
        shares = ranks.of(name)
        if leaf in ("k_proj", "v_proj"):
            # More ranks than key-value heads have copies of them.
            shares = min(shares, num_kv_heads)
        if shares == 1 or leaf in _LATENT:
            continue
        size, what = (columns, "columns") if leaf in ("o_proj", "down_proj") else (rows, "rows")
        if leaf == _HALVES:
            size //= 2
        if size % (shares * BLOCK):
            raise ValueError(
                f"{name} has {size} {what}, which {shares} ranks of an engine cannot share in whole blocks of {BLOCK}"
            )


def quantization_config(shapes: Mapping[str, tuple[int, ...]], quantised: Collection[str]) -> dict[str, Any]:
    """What config.json says about it, in the form that transformers and SGLang read."""
    skipped = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name not in quantised
    }
    # An engine asks for the halves by names of their own.
    halves = {name.removesuffix(_HALVES) for name in skipped if name.endswith(f".{_HALVES}")}
    skipped |= {f"{prefix}{half}" for prefix in halves for half in _JOINED[1]}
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        # An engine has an output layer of its own even where the safetensors have none.
        "modules_to_not_convert": sorted({*skipped, "lm_head"}),
    }
