"""The sizes of a model that decide its memory, from its config.json. Nothing here needs torch.

Its weights layer by layer, the adapters on top of them, and the pipeline stage that holds each layer. The module is
long because all of it reads the same few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from polyturn.configs.errors import ConfigError
from polyturn.configs.models import read_json
from polyturn.configs.schema.trainer import LoraConfig

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")
"""Families, and releases of transformers, name the number of a layer's experts differently."""


def num_experts(hf: Mapping[str, Any]) -> int:
    """Routed experts of a layer that has any; 0 for a dense model."""
    for key in EXPERT_COUNTS:
        if hf.get(key):
            return int(hf[key])
    return 0


def expert_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """For each layer, whether it has experts in place of one MLP.

    DeepSeek V3 and GLM-4.5 begin with `first_k_dense_replace` dense layers, and then have experts in every
    `moe_layer_freq`-th; GLM-4.7-Flash says it of each layer in `mlp_layer_types`, and without that has experts in all
    but the first; Qwen3-MoE has them in every `decoder_sparse_step`-th layer but `mlp_only_layers`.
    """
    num_layers = int(hf["num_hidden_layers"])
    if hf.get("model_type") == "glm4_moe_lite":
        kinds = hf.get("mlp_layer_types") or ["dense"] + ["sparse"] * (num_layers - 1)
        return tuple(kind == "sparse" for kind in kinds)
    if hf.get("first_k_dense_replace") is not None:
        every = hf.get("moe_layer_freq") or 1
        if isinstance(every, list):
            return tuple(bool(has_experts) for has_experts in every)
        return tuple(i >= hf["first_k_dense_replace"] and i % every == 0 for i in range(num_layers))
    if num_experts(hf):
        step, dense = hf.get("decoder_sparse_step") or 1, hf.get("mlp_only_layers") or []
        return tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers))
    return (False,) * num_layers


FAMILIES = (
    "deepseek_v3",
    "ernie4_5",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "kimi_k2",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
)
"""The `model_type`s that the trainer can load."""
LATENT_FAMILIES = ("deepseek_v3", "glm4_moe_lite", "kimi_k2")
"""Those with multi-head latent attention."""
BIASED_BY_KEY = ("glm4", "glm4_moe", "seed_oss")
"""Those whose `attention_bias` is one of queries, keys and values alone."""
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
MAX_EXPERTS = 65536
"""No model has as many; a config.json that says so is damaged, and would be counted through for hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShape:
    """The mixtures of experts of a model."""

    layers: tuple[bool, ...]
    """Which layers have one in place of an MLP."""
    num_experts: int
    ffn_size: int
    shared_ffn_size: int
    """Of the experts that every token goes to, together; 0 without any."""
    num_chosen: int = 1
    """To which a token is sent."""
    has_correction: bool = False
    """The router adds a correction to its scores when it chooses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """Multi-head latent attention."""

    query_rank: int | None
    """None: queries are projected without a latent."""
    rank: int
    """Of keys and values."""
    plain_dim: int
    """Of a head's query and key, without the rotated part."""
    rotary_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RankParameters:
    """Parameters on one rank."""

    dense: int
    """Copied over the data-parallel and context-parallel ranks."""
    experts: int
    """Copied over the ranks of a stage that hold the same experts."""

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Over how many ranks the weights of a layer are split."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder-only transformer."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    tied_embeddings: bool
    qkv_bias: bool = False
    head_norms: bool = False
    """Queries and keys are normed by head."""
    sandwich_norms: bool = False
    """The outputs of attention and MLP are normed, too."""
    fused_gate_up: bool = False
    """Gate and up projection of an MLP are one matrix."""
    num_further_layers: int = 0
    """Layers behind the model's own that predict further tokens; neither trained nor served."""
    experts: ExpertShape | None = None
    latent: LatentShape | None = None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """From a model directory's config.json. Raises ConfigError as `of` does."""
        return cls.of(read_json(directory / "config.json"), source=str(directory / "config.json"))

    @classmethod
    def of(cls, data: Mapping[str, Any], *, source: str) -> Self:
        """From a config.json's object; `source` stands for it in messages.

        Raises:
            ConfigError: a family that the trainer cannot load, or a size that is none.
        """
        model_type = data.get("model_type")
        if model_type not in FAMILIES:
            raise ConfigError(
                f"{source}: model_type {model_type!r} is not supported; one of {', '.join(FAMILIES)} is"
            )
        sizes = _Sizes(data, source)
        num_heads = sizes["num_attention_heads"]
        num_kv_heads = sizes.get("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"{source}: the {num_kv_heads} key-value heads must divide the {num_heads} attention heads"
            )
        return cls(
            model_type=model_type,
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=sizes.get("num_hidden_layers", None, most=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=sizes.get("head_dim", sizes["hidden_size"] // num_heads),
            ffn_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            tied_embeddings=bool(data.get("tie_word_embeddings", False)),
            qkv_bias=model_type == "qwen2"
            or (model_type in BIASED_BY_KEY and bool(data.get("attention_bias"))),
            head_norms=model_type.startswith("qwen3") or bool(data.get("use_qk_norm")),
            sandwich_norms=model_type == "glm4",
            fused_gate_up=model_type == "glm4",
            num_further_layers=sizes.count("num_nextn_predict_layers"),
            experts=_read_experts(data, sizes),
            latent=_read_latent(data, sizes),
        )

    @property
    def num_parameters(self) -> int:
        """All parameters, tied embeddings counted once."""
        return self.on_stage(range(self.num_layers), Split(), first=True, last=True).total

    def on_stage(self, layers: range | list[int], split: Split, *, first: bool, last: bool) -> RankParameters:
        """Parameters on one rank of a pipeline stage.

        With hidden size H, vocabulary V and t tensor-parallel ranks: the first stage has the embedding, H·V/t (V
        padded to a multiple of t); the last one the output layer, as large, which with tied embeddings is another
        copy where the first stage is not the last, and the final norm, H. A layer is counted by `layer`.

        Args:
            layers: the numbers of the stage's layers.
            first, last: whether it is the first or the last stage.
        """
        padded_vocab = -(-self.vocab_size // split.tensor) * split.tensor
        table = padded_vocab * self.hidden_size // split.tensor
        dense = experts = 0
        if first:
            dense += table
        if last:
            dense += self.hidden_size + (0 if self.tied_embeddings and first else table)
        for layer in layers:
            counts = self.layer(layer, split)
            dense += counts.dense
            experts += counts.experts
        return RankParameters(dense=dense, experts=experts)

    def layer(self, layer: int, split: Split) -> RankParameters:
        """Parameters of one layer on one rank.

        Attention as `_attention` counts it; two norms of H (four with sandwich norms); an MLP of 3·H·F/t, or the
        router's H·E, the shared experts' 3·H·S/t and E/e experts of 3·H·M/x, for e expert-parallel and x
        expert-tensor-parallel ranks.
        """
        hidden = self.hidden_size
        dense = self._attention(split.tensor) + hidden * (4 if self.sandwich_norms else 2)
        if self.experts is None or not self.experts.layers[layer]:
            return RankParameters(dense=dense + 3 * hidden * self.ffn_size // split.tensor, experts=0)
        mixture = self.experts
        dense += hidden * mixture.num_experts + 3 * hidden * mixture.shared_ffn_size // split.tensor
        own = mixture.num_experts // split.expert
        return RankParameters(dense=dense, experts=own * 3 * hidden * mixture.ffn_size // split.expert_tensor)

    def _attention(self, tensor: int) -> int:
        """Of one layer on one rank: projections and biases by head split, norms inside whole.

        Grouped-query attention with A heads, K key-value heads of size D: 2·H·A·D + 2·H·K·D, and with biases
        (A + 2K)·D. Latent attention with ranks Q and R: the down projections H·Q + H·(R + rotary) and the norms
        Q + R are whole on each rank; split are the up projections, from Q (or H) to A·(plain + rotary) and from R to
        A·(plain + value), and the output, A·value·H.
        """
        hidden = self.hidden_size
        if self.latent is None:
            split = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * hidden
            if self.qkv_bias:
                split += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
            return split // tensor + (2 * self.head_dim if self.head_norms else 0)
        latent = self.latent
        queries = self.num_heads * (latent.plain_dim + latent.rotary_dim)
        whole = hidden * (latent.rank + latent.rotary_dim) + latent.rank
        split = latent.rank * self.num_heads * (latent.plain_dim + latent.value_dim)
        split += self.num_heads * latent.value_dim * hidden
        if latent.query_rank is None:
            split += hidden * queries
        else:
            split += latent.query_rank * queries
            whole += hidden * latent.query_rank + latent.query_rank
        return split // tensor + whole

    def explain_heads(self, tensor: int) -> str | None:
        """Why so many tensor-parallel ranks of the trainer cannot share the attention heads; None: they can.

        More ranks than key-value heads share each of them, and its projections' rows are split as evenly as all others.
        """
        if self.num_heads % tensor:
            return f"must divide the model's {self.num_heads} attention heads"
        if self.latent is not None:
            return None
        if self.num_kv_heads % tensor and tensor % self.num_kv_heads:
            return (
                f"must divide the model's {self.num_kv_heads} key-value heads, or be divided by them: so many ranks "
                "cannot share them evenly"
            )
        num_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        if num_rows % tensor:
            return f"must divide the {num_rows} rows of the model's queries, keys and values"
        return None

    def cache_elements(self, *, tensor_parallel: int) -> int:
        """Elements of the KV cache for one token on one rank of an engine.

        Keys and values of the rank's heads (at least one) in each layer; with latent attention the latent and the
        rotated key, whole on each rank.
        """
        if self.latent is not None:
            return self.num_layers * (self.latent.rank + self.latent.rotary_dim)
        return 2 * self.num_layers * self.head_dim * max(1, self.num_kv_heads // tensor_parallel)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The integers of a config.json."""

    data: Mapping[str, Any]
    source: str

    def __getitem__(self, key: str) -> int:
        return self.get(key, None)

    def get(self, key: str, default: int | None, *, most: int = MAX_SIZE) -> int:
        """A positive integer, or `default` where there is none or null."""
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= most:
            given = "there is none" if value is None and key not in self.data else f"got {value!r:.60}"
            raise ConfigError(f"{self.source}: '{key}' must be an integer from 1 to {most}, and {given}")
        return value

    def count(self, key: str, *, most: int = MAX_SIZE) -> int:
        """An integer of at least 0, which stands where there is none or null."""
        value = self.data.get(key)
        value = 0 if value is None else value
        if type(value) is not int or not 0 <= value <= most:
            raise ConfigError(
                f"{self.source}: '{key}' must be an integer from 0 to {most}, and got {value!r:.60}"
            )
        return value

    def counts(self, key: str, *, most: int) -> list[int]:
        """A list of integers of at least 0; empty where there is none or null."""
        values = self.data.get(key)
        values = [] if values is None else values
        if not isinstance(values, list) or not all(
            type(one) in (int, bool) and 0 <= one <= most for one in values
        ):
            raise ConfigError(
                f"{self.source}: '{key}' must be a list of integers from 0 to {most}, and got {values!r:.60}"
            )
        return values


def _read_experts(data: Mapping[str, Any], sizes: _Sizes) -> ExpertShape | None:
    for key in EXPERT_COUNTS:
        sizes.count(key, most=MAX_EXPERTS)
    count = num_experts(data)
    if not count:
        return None
    num_layers = sizes["num_hidden_layers"]
    for key in ("first_k_dense_replace", "decoder_sparse_step"):
        sizes.count(key)
    sizes.counts("mlp_only_layers", most=num_layers)
    kinds = data.get("mlp_layer_types")
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) != num_layers
        or any(kind not in ("dense", "sparse") for kind in kinds)
    ):
        raise ConfigError(
            f"{sizes.source}: 'mlp_layer_types' must name one of dense and sparse for each of the {num_layers} layers"
        )
    every = data.get("moe_layer_freq")
    if not isinstance(every, list):
        sizes.count("moe_layer_freq")
    elif len(sizes.counts("moe_layer_freq", most=1)) != num_layers:
        raise ConfigError(
            f"{sizes.source}: 'moe_layer_freq' lists {len(every)} layers, and there are {num_layers}"
        )
    size = sizes["moe_intermediate_size"]
    return ExpertShape(
        layers=expert_layers(data),
        num_experts=count,
        ffn_size=size,
        shared_ffn_size=size * sizes.count("n_shared_experts"),
        num_chosen=max(1, sizes.count("num_experts_per_tok", most=MAX_EXPERTS)),
        has_correction=data["model_type"] != "qwen3_moe",
    )


def _read_latent(data: Mapping[str, Any], sizes: _Sizes) -> LatentShape | None:
    if data["model_type"] not in LATENT_FAMILIES:
        return None
    return LatentShape(
        query_rank=None if data.get("q_lora_rank") is None else sizes["q_lora_rank"],
        rank=sizes["kv_lora_rank"],
        plain_dim=sizes["qk_nope_head_dim"],
        rotary_dim=sizes["qk_rope_head_dim"],
        value_dim=sizes["v_head_dim"],
    )


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSizes:
    """Layers of the first and of the last stage; None: as many as each of the others."""

    first: int | None = None
    last: int | None = None


def divide_layers(
    num_layers: int, pipeline: int, virtual_pipeline: int | None = None, *, given: StageSizes | None = None
) -> StageSizes:
    """Stages as even as they can be, the short ones at the ends, which hold the embeddings and the output layer, too.

    Args:
        given: what the user decided, which is kept as it is.

    Raises:
        ValueError: there are fewer layers than stages, or virtual stages cannot all have as many.
    """
    given = given or StageSizes()
    num_stages = pipeline * (virtual_pipeline or 1)
    if num_layers < num_stages:
        raise ValueError(
            f"{num_layers} layers cannot be divided among {num_stages} pipeline stages: use fewer"
        )
    if given != StageSizes() or num_layers % num_stages == 0:
        return given
    if virtual_pipeline is not None:
        raise ValueError(
            f"{num_layers} layers do not divide among {pipeline} pipeline ranks with {virtual_pipeline} virtual stages "
            "each; leave parallel.virtual_pipeline out, or set megatron.num_layers_in_first_pipeline_stage and "
            "megatron.num_layers_in_last_pipeline_stage"
        )
    middle = -(-num_layers // pipeline)
    while num_layers - middle * (pipeline - 2) < 2:
        middle -= 1
    at_ends = num_layers - middle * (pipeline - 2)
    return StageSizes(first=-(-at_ends // 2), last=at_ends // 2)


def stage_layers(
    num_layers: int,
    pipeline: int,
    virtual_pipeline: int | None = None,
    *,
    given: StageSizes | None = None,
) -> list[list[int]]:
    """The numbers of the layers that each pipeline rank holds, from 0, as Megatron-core divides them.

    With virtual stages every rank holds a chunk of layers in each round through the ranks.

    Raises:
        ValueError: as `divide_layers` does, or the sizes do not add up.
    """
    counts = _stage_counts(
        num_layers, pipeline, divide_layers(num_layers, pipeline, virtual_pipeline, given=given)
    )
    rounds = virtual_pipeline or 1
    if sum(counts) != num_layers or min(counts) < 1 or any(count % rounds for count in counts):
        raise ValueError(
            f"{num_layers} layers cannot be divided into stages of {', '.join(map(str, counts))} layers"
            + (f" with {rounds} virtual stages each" if rounds > 1 else "")
        )
    chunks = [count // rounds for count in counts]
    return [
        [
            round_ * sum(chunks) + sum(chunks[:rank]) + layer
            for round_ in range(rounds)
            for layer in range(chunks[rank])
        ]
        for rank in range(pipeline)
    ]


def _stage_counts(num_layers: int, pipeline: int, sizes: StageSizes) -> list[int]:
    if pipeline == 1:
        return [num_layers]
    num_given = sum(size is not None for size in (sizes.first, sizes.last))
    rest = num_layers - (sizes.first or 0) - (sizes.last or 0)
    counts = [rest // (pipeline - num_given) if pipeline > num_given else 0] * pipeline
    if sizes.first is not None:
        counts[0] = sizes.first
    if sizes.last is not None:
        counts[-1] = sizes.last
    return counts
