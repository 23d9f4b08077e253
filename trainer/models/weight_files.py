"""The tensors of a Hugging Face directory: which its files hold, by their headers, and which its config.json calls for.

Nothing here needs torch or reads a weight, so that the preflight, a conversion and the trainer refuse the same
directories in the same words, before anything starts. Everything comes from outside, so everything is checked where it
is read, and the sentence names the file: an index that is damaged or names files elsewhere, files that are missing, cut
short or stand-ins, headers that do not describe what follows them. The format of safetensors is documented at
https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from polyturn.configs.sizing.model_shape import ExpertShape, LatentShape, ModelShape

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


Shape = tuple[int, ...]
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
CORRECTION = "gate.e_score_correction_bias"
SCALE_SUFFIX = "_scale_inv"
"""Behind the name of a matrix in block-quantised FP8: its scales."""
_LAYERS = "model.layers."


def expected_tensors(shape: ModelShape) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of a model, as transformers stores it."""
    hidden = (shape.hidden_size,)
    yield EMBEDDING, (shape.vocab_size, *hidden)
    for layer in range(shape.num_layers):
        for name, size in _layer(shape, layer):
            yield f"{_LAYERS}{layer}.{name}", size
    yield "model.norm.weight", hidden
    if not shape.tied_embeddings:
        yield OUTPUT, (shape.vocab_size, *hidden)


def check_tensors(
    stored: Mapping[str, StoredTensor], shape: ModelShape, *, source: Path, without: Collection[str] = ()
) -> None:
    """Compare a directory's tensors with those of the model that its config.json describes.

    Tensors that have no place in the model are refused, but for those that `is_carried` tells of, the scales of
    quantised matrices, and an output layer beside embeddings that config.json ties to it.

    Args:
        without: expected tensors that may be missing.

    Raises:
        ValueError: one is missing, superfluous, no number or of another shape; names the file, the tensor and both
            shapes.
    """
    expected = dict(expected_tensors(shape))
    allowed = {*expected, *(f"{name}{SCALE_SUFFIX}" for name in expected), OUTPUT}
    superfluous = [name for name in stored if name not in allowed and not is_carried(name, shape)]
    for name, wanted in expected.items():
        found = stored.get(name)
        if found is None:
            if name in without:
                continue
            instead = f"; it holds {min(superfluous)}, which has no place" if superfluous else ""
            raise ValueError(f"{source} has no {name}, which its config.json calls for{instead}")
        if found.dtype not in (*FLOATS, FP8):
            raise ValueError(
                f"{found.path}: {name} has the dtype {found.dtype}, which holds no weights to train: "
                "use the model in bfloat16"
            )
        if found.shape != wanted:
            raise ValueError(
                f"{found.path}: {name} has the shape {list(found.shape)}, and config.json calls for {list(wanted)}"
            )
    beside = stored.get(OUTPUT)
    if beside is not None and beside.shape != expected[EMBEDDING]:
        raise ValueError(
            f"{beside.path}: {OUTPUT} has the shape {list(beside.shape)}, and config.json ties it to embeddings of "
            f"{list(expected[EMBEDDING])}"
        )
    if superfluous:
        name = min(superfluous)
        raise ValueError(f"{stored[name].path} holds {name}, {_why_superfluous(name, shape)}")


def linear_layers(shape: ModelShape) -> tuple[str, ...]:
    """The kinds of linear layers that can have adapters, by the last part of their names: `q_proj`, ..."""
    return tuple(
        dict.fromkeys(
            name.split(".")[-2]
            for name, size in expected_tensors(shape)
            if name.startswith(_LAYERS) and len(size) == 2 and ".experts." not in name and "_proj" in name
        )
    )


def check_targets(shape: ModelShape, targets: Collection[str]) -> None:
    """
    Raises:
        ValueError: a target of adapters is the name of no linear layer of the model.
    """
    known = linear_layers(shape) if targets else ()
    for target in targets:
        if target not in known:
            raise ValueError(
                f"lora.target_modules names {target!r}, but this model's linear layers are {', '.join(known)}"
            )


def is_carried(name: str, shape: ModelShape) -> bool:
    """Whether the trainer has no place for a tensor, and conversions carry it over as it is.

    These are the layers behind the model's own, which predict further tokens (multi-token prediction), and tables of
    rotary frequencies, which follow from the config.
    """
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    layer = layer_number(name)
    return layer is not None and 0 <= layer - shape.num_layers < shape.num_further_layers


def layer_number(name: str) -> int | None:
    """The layer that a tensor belongs to."""
    if not name.startswith(_LAYERS):
        return None
    number = name.removeprefix(_LAYERS).partition(".")[0]
    return int(number) if number.isdecimal() else None


def _why_superfluous(name: str, shape: ModelShape) -> str:
    layer = layer_number(name)
    if layer is None or layer < shape.num_layers:
        return "for which its config.json has no place"
    return (
        f"a layer beyond those of its config.json (num_hidden_layers={shape.num_layers}, "
        f"num_nextn_predict_layers={shape.num_further_layers})"
    )


def _layer(shape: ModelShape, layer: int) -> Iterator[tuple[str, Shape]]:
    hidden = shape.hidden_size
    norms = ["input_layernorm", "post_attention_layernorm"]
    if shape.sandwich_norms:
        norms += ["post_self_attn_layernorm", "post_mlp_layernorm"]
    for norm in norms:
        yield f"{norm}.weight", (hidden,)
    attention = _grouped_query(shape) if shape.latent is None else _latent(shape, shape.latent)
    for name, size in attention:
        yield f"self_attn.{name}", size
    if shape.experts is not None and shape.experts.layers[layer]:
        mlp = _mixture(shape, shape.experts)
    elif shape.fused_gate_up:
        mlp = iter(
            (
                ("gate_up_proj.weight", (2 * shape.ffn_size, hidden)),
                ("down_proj.weight", (hidden, shape.ffn_size)),
            )
        )
    else:
        mlp = _gated("", hidden, shape.ffn_size)
    for name, size in mlp:
        yield f"mlp.{name}", size


def _gated(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    for name in ("gate_proj", "up_proj"):
        yield f"{prefix}{name}.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


def _mixture(shape: ModelShape, experts: ExpertShape) -> Iterator[tuple[str, Shape]]:
    hidden = shape.hidden_size
    yield "gate.weight", (experts.num_experts, hidden)
    if experts.has_correction:
        yield CORRECTION, (experts.num_experts,)
    for expert in range(experts.num_experts):
        yield from _gated(f"experts.{expert}.", hidden, experts.ffn_size)
    if experts.shared_ffn_size:
        yield from _gated("shared_experts.", hidden, experts.shared_ffn_size)


def _grouped_query(shape: ModelShape) -> Iterator[tuple[str, Shape]]:
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"{name}.weight", (rows, hidden)
        if shape.qkv_bias:
            yield f"{name}.bias", (rows,)
    yield "o_proj.weight", (hidden, queries)
    if shape.head_norms:
        yield "q_norm.weight", (shape.head_dim,)
        yield "k_norm.weight", (shape.head_dim,)


def _latent(shape: ModelShape, latent: LatentShape) -> Iterator[tuple[str, Shape]]:
    hidden, heads = shape.hidden_size, shape.num_heads
    queries = heads * (latent.plain_dim + latent.rotary_dim)
    if latent.query_rank is None:
        yield "q_proj.weight", (queries, hidden)
    else:
        yield "q_a_proj.weight", (latent.query_rank, hidden)
        yield "q_a_layernorm.weight", (latent.query_rank,)
        yield "q_b_proj.weight", (queries, latent.query_rank)
    yield "kv_a_proj_with_mqa.weight", (latent.rank + latent.rotary_dim, hidden)
    yield "kv_a_layernorm.weight", (latent.rank,)
    yield "kv_b_proj.weight", (heads * (latent.plain_dim + latent.value_dim), latent.rank)
    yield "o_proj.weight", (hidden, heads * latent.value_dim)
