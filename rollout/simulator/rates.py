"""How quick engines and trainer are: a roofline from data sheets, to be replaced by what a run shows.

The figures of `rates_of` were measured nowhere. They are the model's FLOPs and bytes over a share of what the vendor's
data sheet says of the GPU (`configs/sizing/hardware.py`), and that share is an assumption, `Assumptions`. They are good
for comparing policies on one cluster; before GPUs are rented for a long run, calibrate on a short one.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyturn.configs.models import read_json, resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.hardware import GPU_GIB, GPU_PEAKS, GpuName
from polyturn.configs.sizing.memory import BYTES, token_bytes
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.rollout.simulator.engine import EngineRates

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """Shares of a data sheet's peak, and what is no matter of FLOPs and bytes. Nothing here was measured."""

    decode_bandwidth: float = 0.7
    """Share of the memory's bandwidth while decoding."""
    prefill_flops: float = 0.5
    train_flops: float = 0.35
    step_overhead_s: float = 0.004
    """Of a decoding step."""
    prefill_overhead_s: float = 0.01
    kv_share: float = 0.85
    """Of a GPU's memory that weights and KV pool may have."""
    train_overhead_s: float = 5.0
    """Of a training step: collecting, packing, logging, checkpoint."""
    sync_gigabytes_per_s: float = 10.0
    """Of weights to the engines."""
    sync_overhead_s: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerRates:
    """How quick the trainer is."""

    token_s: float
    """For each token of a step, all ranks together."""
    overhead_s: float
    sync_s: float
    """For which the engines are paused."""

    def step_s(self, num_tokens: int) -> float:
        """Seconds of a step without the sync."""
        return self.overhead_s + self.token_s * num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Of a cluster."""

    engine: EngineRates
    trainer: TrainerRates
    source: str
    """Where they come from, in a sentence."""


def rates_of(config: RunConfig, gpu: GpuName, assumed: Assumptions | None = None) -> Rates:
    """What the model and the GPU come to.

    With P parameters, A of them active for a token, b bytes each, t GPUs an engine and r ranks: a decoding step reads
    bP / t and the KV, and computes 2A for each request; a prompt computes 2A a token; training computes 6A for each
    token, 2A more where logprobs are scored first, and as much for a reference. Attention's own FLOPs are left out.
    """
    assumed = assumed or Assumptions()
    path = resolve_model_path(config.model.path, needs_weights=False)
    shape = ModelShape.read(path)
    active = active_parameters(shape, int(read_json(path / "config.json").get("num_experts_per_tok") or 0))
    size, tensor = BYTES[config.model.dtype], config.engines.tensor_parallel
    peak = GPU_PEAKS[gpu]
    bytes_per_s = 1e12 * peak.terabytes_per_s * assumed.decode_bandwidth
    flops = 1e12 * peak.tflops * assumed.prefill_flops
    weights = size * shape.num_parameters / tensor
    room = assumed.kv_share * GPU_GIB[gpu] * GIB - weights
    if room <= 0:
        raise ValueError(
            f"engines.tensor_parallel={tensor}: {weights / GIB:.0f} GiB of weights leave a {gpu} no room for KV"
        )
    pool = config.sglang.get("max_total_tokens")
    forward = 2 * active
    scored = 1 if config.trainer.algorithm.proximal == "scored" else 0
    reference = 1 if config.trainer.needs_reference else 0
    train_flops = 1e12 * peak.tflops * assumed.train_flops * config.trainer.num_ranks
    return Rates(
        engine=EngineRates(
            overhead_s=assumed.step_overhead_s,
            weights_s=weights / bytes_per_s,
            request_s=forward / tensor / flops,
            kv_token_s=token_bytes(config, shape) / bytes_per_s,
            prefill_s=assumed.prefill_overhead_s,
            prefill_token_s=forward / tensor / flops,
            kv_tokens=pool if isinstance(pool, int) else int(room / token_bytes(config, shape)),
            max_running=int(config.sglang.get("max_running_requests", 4096)),
            has_prefix_cache=not config.sglang.get("disable_radix_cache", False),
        ),
        trainer=TrainerRates(
            token_s=forward * (3 + scored + reference) / train_flops,
            overhead_s=assumed.train_overhead_s,
            sync_s=assumed.sync_overhead_s
            + size * shape.num_parameters / (1e9 * assumed.sync_gigabytes_per_s),
        ),
        source=(
            f"assumed, not measured: {assumed.decode_bandwidth:.0%} of the bandwidth, {assumed.prefill_flops:.0%} "
            f"(prompts) and {assumed.train_flops:.0%} (training) of the dense 16-bit FLOPs of a {gpu}'s data sheet"
        ),
    )


def active_parameters(shape: ModelShape, experts_per_token: int) -> int:
    """Parameters that a token goes through: of a layer's experts, those that it is sent to."""
    experts = shape.experts
    if experts is None or not experts_per_token:
        return shape.num_parameters
    idle = experts.num_experts - experts_per_token
    return shape.num_parameters - 3 * shape.hidden_size * experts.ffn_size * idle * sum(experts.layers)
