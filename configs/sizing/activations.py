"""What a trainer rank takes beside its state while it computes: activations, the head's logits, libraries.

The formula is that of Korthikanti et al. (arXiv 2205.05198, section 4), written down tensor by tensor for the layers
that are trained here: RMS norms, grouped-query or latent attention with a kernel that keeps no scores (FlashAttention),
gated MLPs, mixtures of experts; without dropout. A test counts what autograd saves of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.model_shape import ExpertShape, LatentShape, ModelShape

BYTES = {"float32": 4, "bfloat16": 2}
WIDE = 4
"""Bytes of what is kept in float32 whatever the model is in."""
KEPT_LOGITS = {"cpu": 2**25, "cuda": 2**27}
"""Up to so many logits stand from the forward pass to the backward pass (`trainer/megatron/logprob_head.py`)."""
LOGIT_TILES = {"cpu": 2**18, "cuda": 2**26}
"""So many are made at a time where there are more."""
CONTEXT_BYTES = 512 << 20
"""A process's CUDA context with PyTorch's kernels: about half a gigabyte on an A100 or H100; not measured here."""
GROUP_BYTES = 688 << 20
"""Of NCCL's buffers for one group of more than two GPUs (github.com/NVIDIA/nccl/issues/964: four A100 with NVLink)."""
ALL_TO_ALL_BYTES = 3_300_000_000
"""What the first all-to-all adds (github.com/NVIDIA/nccl/issues/1685: eight H100)."""


def working_bytes(
    config: RunConfig, shape: ModelShape, layers: Sequence[int], *, stage: int
) -> dict[str, int]:
    """By part, of a rank of a pipeline stage that holds these layers, in an update at the fullest micro-batch."""
    parallel, device = config.trainer.parallel, config.trainer.device
    tokens = micro_batch_tokens(config)
    saved = [layer_bytes(config, shape, layer, tokens) for layer in layers]
    recomputed = _recompute(config, shape, saved, tokens)
    parts = {
        "activations": round(recomputed * micro_batches_in_flight(parallel, stage)),
        # A layer's gradients stand beside what was saved of it.
        "backward": max(saved, default=0),
    }
    if stage == parallel.pipeline - 1:
        parts["head"] = head_bytes(config, shape, tokens)
    if device == "cuda":
        parts["libraries"] = library_bytes(parallel)
    return parts


def micro_batch_tokens(config: RunConfig) -> int:
    """That a rank holds of the fullest micro-batch: the packing limit, or one longer sample."""
    longest = math.ceil(config.environment.max_tokens_per_episode / config.trainer.parallel.context)
    return max(config.trainer.max_tokens_per_gpu, longest)


def micro_batches_in_flight(parallel: ParallelConfig, stage: int) -> float:
    """How many micro-batches' activations of its layers a stage holds at most.

    In the 1F1B schedule as many as there are stages from it to the last; interleaved, the chunks of its warm-up and one
    (arXiv 2104.04473, section 2.2; Megatron-core's `get_pp_rank_microbatches`), each a part of its layers.
    """
    left = parallel.pipeline - stage
    chunks = parallel.virtual_pipeline
    if chunks == 1:
        return float(left)
    return (2 * (left - 1) + (chunks - 1) * parallel.pipeline + 1) / chunks


def layer_bytes(config: RunConfig, shape: ModelShape, layer: int, tokens: int) -> int:
    """What autograd saves of one layer for a micro-batch of `tokens` tokens on this rank.

    With b bytes a number, hidden size H and t tensor-parallel ranks, which share the sequence where a layer is not
    split, a token takes: of each norm its input and, as the input of the linear layer behind it, its output; of the
    attention queries, keys and values as they leave the projection and again as they are attended to, the output,
    its log-sum-exp, and the sines and cosines; of the MLP 5 F (gate and up, and three steps of their product). A
    routed token takes 6 M + H for each of its experts.
    """
    size, tensor = BYTES[config.model.dtype], config.trainer.parallel.tensor
    norm = _norm_bytes(config, shape.hidden_size)
    outputs = size * shape.hidden_size
    num_norms = 4 if shape.sandwich_norms else 2
    token = (num_norms * norm + 2 * outputs) / tensor + _attention_bytes(config, shape) / tensor
    rotary = shape.latent.rotary_dim if shape.latent is not None else shape.head_dim
    # Every rank computes the angles of all tokens.
    token += 4 * size * rotary
    if shape.experts is not None and shape.experts.layers[layer]:
        token += _expert_bytes(shape.experts, config, shape.hidden_size) / tensor
    else:
        token += 5 * size * shape.ffn_size / tensor
    return round(tokens * token)


def head_bytes(config: RunConfig, shape: ModelShape, tokens: int) -> int:
    """Of the last norm and of the head that scores tokens instead of making logits, were all of them scored."""
    size, tensor = BYTES[config.model.dtype], config.trainer.parallel.tensor
    device = config.trainer.device
    columns = math.ceil(shape.vocab_size / tensor)
    logits = tokens * columns
    tile = logits if logits <= KEPT_LOGITS[device] else LOGIT_TILES[device]
    # Hidden states of the scored tokens whole on each rank, and their gradient and that of the weight in float32.
    rows = tokens * (size + WIDE) * shape.hidden_size
    weight = WIDE * columns * shape.hidden_size if config.trainer.lora is None else 0
    return round(tokens * _norm_bytes(config, shape.hidden_size) / tensor) + rows + weight + WIDE * tile


def library_bytes(parallel: ParallelConfig) -> int:
    """The CUDA context and NCCL's buffers of the groups in which a rank talks with others."""
    groups = ("tensor", "pipeline", "context", "data", "expert")
    num_groups = sum(getattr(parallel, axis) > 1 for axis in groups)
    return CONTEXT_BYTES + GROUP_BYTES * num_groups + (ALL_TO_ALL_BYTES if parallel.expert > 1 else 0)


def _norm_bytes(config: RunConfig, width: int) -> int:
    """Of a token: what a norm saves of its input, and the deviation that it divides by."""
    if config.trainer.device == "cuda":
        return BYTES[config.model.dtype] * width + WIDE
    # torch's norm is no fused kernel on a CPU: the input in float32, and that divided by its deviation.
    return 2 * WIDE * width + WIDE


def _attention_bytes(config: RunConfig, shape: ModelShape) -> float:
    """Of a token, over all heads."""
    size = BYTES[config.model.dtype]
    if shape.latent is not None:
        return _latent_bytes(config, shape, shape.latent)
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    projected, attended, output = queries + 2 * keys, queries + keys, queries
    found = size * (projected + attended + output) + WIDE * shape.num_heads
    if shape.head_norms:
        heads = shape.num_heads + shape.num_kv_heads
        found += _norm_bytes(config, queries + keys) + WIDE * (heads - 1)
    if config.trainer.parallel.context > 1:
        # The keys and values of the others.
        found += size * 2 * keys * config.trainer.parallel.context
    return found


def _latent_bytes(config: RunConfig, shape: ModelShape, latent: LatentShape) -> float:
    size, heads = BYTES[config.model.dtype], shape.num_heads
    queries = heads * (latent.plain_dim + latent.rotary_dim)
    values = heads * latent.value_dim
    up = heads * (latent.plain_dim + latent.value_dim)
    ranks = [latent.rank, *([latent.query_rank] if latent.query_rank else [])]
    latents = sum(size * rank + _norm_bytes(config, rank) for rank in ranks) + size * latent.rotary_dim
    # The latents are whole on every rank; only the heads are split.
    whole = latents * config.trainer.parallel.tensor
    return whole + size * (2 * queries + up + queries + 2 * values) + WIDE * heads


def _expert_bytes(experts: ExpertShape, config: RunConfig, hidden: int) -> float:
    """Of a token that a rank sends to its experts, as many as come back to it from others."""
    size, chosen = BYTES[config.model.dtype], experts.num_chosen
    width = size * (hidden * config.trainer.parallel.expert_tensor + 6 * experts.ffn_size)
    # Indices and probabilities of the chosen, and over all experts those and a mask.
    router = 24 * chosen + 5 * experts.num_experts
    return chosen * width + router + 5 * size * experts.shared_ffn_size


def _recompute(config: RunConfig, shape: ModelShape, saved: Sequence[int], tokens: int) -> int:
    """What is left of the layers' activations where some are made again in the backward pass, at its fullest."""
    section, parallel = config.megatron, config.trainer.parallel
    size = BYTES[config.model.dtype]
    entry = round(tokens * size * shape.hidden_size / parallel.tensor)
    granularity = section.get("recompute_granularity")
    if granularity == "full":
        count = int(section.get("recompute_num_layers") or 1)
        if section.get("recompute_method") == "block":
            again, kept = saved[:count], saved[count:]
            return entry * len(again) + sum(kept) + max(again, default=0)
        chunks = [saved[first : first + count] for first in range(0, len(saved), count)]
        return entry * len(chunks) + max((sum(chunk) for chunk in chunks), default=0)
    if granularity == "selective":
        return sum(saved) - _spared(section, config, shape, tokens, len(saved))
    return sum(saved)


def _spared(
    section: Mapping[str, Any], config: RunConfig, shape: ModelShape, tokens: int, num_layers: int
) -> int:
    """By recomputing modules of a layer. The core attention, whose kernel keeps no scores, spares nothing."""
    size, tensor = BYTES[config.model.dtype], config.trainer.parallel.tensor
    modules: Iterable[str] = section.get("recompute_modules") or ("core_attn",)
    num_mixtures = round(num_layers * sum(shape.experts.layers) / shape.num_layers) if shape.experts else 0
    num_dense = num_layers - num_mixtures
    # The norm before a dense MLP is one module with its first linear layer, and goes with it.
    by_module: dict[str, float] = {
        "layernorm": num_mixtures * size * shape.hidden_size,
        "mlp": num_dense * (5 * size * shape.ffn_size + _norm_bytes(config, shape.hidden_size)),
    }
    if shape.experts is not None:
        experts = shape.experts
        by_module["moe"] = num_mixtures * _expert_bytes(experts, config, shape.hidden_size)
        by_module["moe_act"] = num_mixtures * size * 4 * experts.ffn_size * experts.num_chosen
        by_module["shared_experts"] = num_mixtures * 5 * size * experts.shared_ffn_size
    return round(tokens / tensor * sum(by_module.get(module, 0.0) for module in modules))
