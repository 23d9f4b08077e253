"""Writing one safetensors file as a stream, its checksum taken on the way.

The package's own writer wants the whole file in memory or holds the interpreter while it writes; this one runs beside
the training without either. The format is documented at https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import orjson
import torch

from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.megatron.checkpoints.manifest import CHUNK_BYTES, WrittenFile

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> WrittenFile:
    """Write contiguous CPU tensors; the file appears under its name once all of it is on the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    # The widest first, so that every tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % ALIGNMENT)
    prefix = struct.pack("<Q", len(text)) + text
    crc, num_bytes = zlib.crc32(prefix), len(prefix)
    with whole_file(path) as file:
        file.write(prefix)
        for name in names:
            view = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
            num_bytes += len(view)
    return WrittenFile(name=path.name, num_bytes=num_bytes, crc32=crc)
