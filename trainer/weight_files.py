"""The weight files of a Hugging Face directory: which there are, and what their headers say. Needs no torch.

Everything here comes from outside, so everything is checked where it is read, and the sentence names the file: an index
that is damaged or names files elsewhere, files that are missing, cut short or stand-ins, headers that do not describe
what follows them. The format of safetensors is documented at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_config.json"
POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_NAME_BYTES = 255
"""Of a file's name, on every file system in use."""
FLOATS = ("F64", "F32", "F16", "BF16")
FP8 = "F8_E4M3"
"""With scales beside it; the dtypes that weights are read from are this and the floats."""
ELEMENT_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file, as the file's header describes it."""

    path: Path
    dtype: str
    """As the format names it: `BF16`."""
    shape: tuple[int, ...]


def read_weight_files(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face directory by its name, from the headers of the files alone.

    Raises:
        ValueError: a file is missing or damaged, or there are no safetensors; one sentence names it and the way out.
    """
    index = directory / INDEX_NAME
    if not index.is_file():
        single = directory / SINGLE_NAME
        if not single.is_file():
            raise ValueError(
                explain_missing_weights(directory) or f"{directory} has no {SINGLE_NAME}: it holds no weights"
            )
        return read_header(single)
    placed = _read_index(index)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(placed.values())):
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{directory} lacks {name}, which {INDEX_NAME} names: download it again")
        for tensor, stored in read_header(path).items():
            if tensor in found:
                raise ValueError(f"{tensor} is both in {found[tensor].path} and in {path}")
            found[tensor] = stored
    for tensor, name in placed.items():
        if tensor not in found or found[tensor].path.name != PurePosixPath(name).name:
            raise ValueError(f"{index} says that {tensor} is in {name}, and it is not: download both again")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name.

    Raises:
        ValueError: it is none, or not whole.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start.startswith(POINTER):
            raise ValueError(
                f"{path} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull, or download it"
            )
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"{path} is no whole safetensors file ({size} bytes): download it again")
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is no object")
        header.pop("__metadata__", None)
        described = {name: _tensor(path, entry) for name, entry in header.items()}
        end = _end_of_all(spans for _, spans in described.values())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}): download it again") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path} has {size} bytes, and its header describes {8 + length + end}: download it again"
        )
    return {name: stored for name, (stored, _) in described.items()}


def _end_of_all(spans: Iterable[tuple[int, int]]) -> int:
    """Where the last tensor's bytes end; all of them stand one behind the other."""
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"a tensor's bytes begin at {start}, those before it end at {end}")
        end = stop
    return end


def _tensor(path: Path, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    """What a header's entry describes, and between which offsets its bytes stand."""
    if not isinstance(entry, dict):
        raise ValueError("an entry is no object")
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in ELEMENT_BITS:
        raise ValueError(f"the dtype {dtype!r} is not known")
    start, end = offsets if len(offsets) == 2 else (0, -1)
    if (end - start) * 8 != math.prod(shape) * ELEMENT_BITS[dtype]:
        raise ValueError(f"the bytes at {list(offsets)} do not hold {list(shape)} numbers of {dtype}")
    return StoredTensor(path=path, dtype=dtype, shape=shape), (start, end)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
        raise ValueError("sizes are no numbers")
    return tuple(value)


def _read_index(path: Path) -> Mapping[str, str]:
    """The file of every tensor, each in the directory of the index."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{path} has no weight_map: download it again")
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r} for {tensor}, which is no safetensors file")
        if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
            raise ValueError(f"{path} names {name[:40]!r}... for {tensor}, which is too long for a file")
        if PurePosixPath(name).name != name:
            raise ValueError(f"{path} names {name!r} for {tensor}, which is not in the directory itself")
    return placed


def explain_missing_weights(directory: Path) -> str | None:
    """Why a directory without an index or a single file of safetensors has no weights to read, and the way out; None if
    nothing in it looks like weights."""
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if (directory / ADAPTER_NAME).is_file():
        return (
            f"{directory} holds a PEFT adapter, not a model: merge it into its base model with "
            "peft.AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
        )
    if shards:
        return (
            f"{directory} has {shards[0]}, but neither {SINGLE_NAME} nor {INDEX_NAME}, which says what is where: "
            "download the index"
        )
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")) or any(directory.glob("*.pt")):
        return (
            f"{directory} has its weights as pickles, which are not opened here: write them as safetensors with "
            "transformers.AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW)"
        )
    gguf = next(iter(sorted(directory.glob("*.gguf"))), None)
    if gguf is not None:
        return (
            f"{directory} has its weights as {gguf.name}, which is not read here: "
            "download the model's own safetensors"
        )
    return None
