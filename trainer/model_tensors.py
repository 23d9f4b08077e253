"""The tensors that a Hugging Face model consists of, by its config.json; and whether a directory's are these.

Nothing here needs torch or reads a weight: names and shapes stand in the files' headers, so that the preflight, a
conversion and the trainer refuse the same directories in the same words, before anything starts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from polyturn.configs.sizing.model_shape import ExpertShape, LatentShape, ModelShape
from polyturn.trainer.weight_files import FLOATS, FP8, StoredTensor

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
