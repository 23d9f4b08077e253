"""How many parameters adapters have. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from polyturn.configs.lora import LoraConfig
from polyturn.configs.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A linear layer that can carry an adapter, by its Hugging Face name."""

    name: str
    num_inputs: int
    num_outputs: int
    split: Literal["rows", "columns", "none"]
    """By what tensor parallelism splits it."""

    def adapter_parameters(self, rank: int, tensor: int) -> int:
        """On one tensor-parallel rank: A is split with the columns, B with the rows."""
        inputs = self.num_inputs // tensor if self.split == "columns" else self.num_inputs
        outputs = self.num_outputs // tensor if self.split == "rows" else self.num_outputs
        return rank * (inputs + outputs)


def adapter_parameters(shape: ModelShape, lora: LoraConfig, layers: Iterable[int], *, tensor: int) -> int:
    """The adapters' parameters on one tensor-parallel rank that holds these layers."""
    return sum(
        projection.adapter_parameters(lora.rank, tensor)
        for layer in layers
        for projection in (*_attention(shape), *_mlp(shape, layer))
        if lora.adapts(projection.name)
    )


def _attention(shape: ModelShape) -> Iterator[Projection]:
    hidden = shape.hidden_size
    if shape.latent is None:
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield Projection(name=name, num_inputs=hidden, num_outputs=size, split="rows")
        yield Projection(name="o_proj", num_inputs=queries, num_outputs=hidden, split="columns")
        return
    latent = shape.latent
    queries = shape.num_heads * (latent.plain_dim + latent.rotary_dim)
    if latent.query_rank is None:
        yield Projection(name="q_proj", num_inputs=hidden, num_outputs=queries, split="rows")
    else:
        yield Projection(name="q_a_proj", num_inputs=hidden, num_outputs=latent.query_rank, split="none")
        yield Projection(name="q_b_proj", num_inputs=latent.query_rank, num_outputs=queries, split="rows")
    down = latent.rank + latent.rotary_dim
    yield Projection(name="kv_a_proj_with_mqa", num_inputs=hidden, num_outputs=down, split="none")
    up = shape.num_heads * (latent.plain_dim + latent.value_dim)
    yield Projection(name="kv_b_proj", num_inputs=latent.rank, num_outputs=up, split="rows")
    values = shape.num_heads * latent.value_dim
    yield Projection(name="o_proj", num_inputs=values, num_outputs=hidden, split="columns")


def _mlp(shape: ModelShape, layer: int) -> Iterator[Projection]:
    """The MLP, or the shared experts; routed experts carry none."""
    hidden, size = shape.hidden_size, shape.ffn_size
    if shape.experts is not None and shape.experts.layers[layer]:
        size = shape.experts.shared_ffn_size
    if not size:
        return
    if shape.model_type == "glm4":
        yield Projection(name="gate_up_proj", num_inputs=hidden, num_outputs=2 * size, split="rows")
    else:
        yield Projection(name="gate_proj", num_inputs=hidden, num_outputs=size, split="rows")
        yield Projection(name="up_proj", num_inputs=hidden, num_outputs=size, split="rows")
    yield Projection(name="down_proj", num_inputs=size, num_outputs=hidden, split="columns")
