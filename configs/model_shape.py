"""The sizes of a model that decide its memory, from its config.json. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from polyturn.configs.errors import ConfigError
from polyturn.configs.expert_layers import EXPERT_COUNTS, expert_layers, num_experts
from polyturn.configs.models import read_json

FAMILIES = (
    "deepseek_v3",
    "glm4",
    "glm4_moe",
    "kimi_k2",
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""The `model_type`s that the trainer can load."""
LATENT_FAMILIES = ("deepseek_v3", "kimi_k2")
"""Those with multi-head latent attention."""
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
            or (model_type.startswith("glm4") and bool(data.get("attention_bias"))),
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
