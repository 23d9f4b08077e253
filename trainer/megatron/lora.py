"""LoRA (arXiv 2106.09685) on Megatron-core's parallel linear layers: y = x W^T + scale · x A^T B^T.

Every Hugging Face projection has an A [rank, in] and a B [out, rank] of its own, as in PEFT, also where Megatron
fuses projections into one layer (queries, keys and values; gate and up). Under tensor parallelism a column-parallel
layer's A is whole on every rank and its B split like the layer's rows; a row-parallel one's A is split like the layer's
columns and its B whole.

The adapters hang beside the layers, not in them, so the names and checkpoints of the base weights stay what they are.
They are written as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import save
from torch.nn import functional

from polyturn.configs.schema.trainer import LoraConfig
from polyturn.configs.sizing.model_shape import num_experts
from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.megatron.model import Architecture
from polyturn.trainer.megatron.weights import chunk_mapping
from polyturn.trainer.models.hf_directory import read_config
from polyturn.trainer.models.weight_files import check_targets

Parallel = Literal["column", "row", "whole"]
PARALLEL: dict[int | None, Parallel] = {0: "column", 1: "row", None: "whole"}
"""By the dimension that tensor parallelism splits a weight along."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A linear layer of this rank that can carry an adapter."""

    path: str
    """Its module's path in the model of this rank."""
    projections: tuple[str, ...]
    """The Hugging Face modules that it is made of, in order: `model.layers.0.self_attn.q_proj`, ..."""
    join: Literal["copy", "qkv", "gate_up"]
    """How their rows are laid out in it."""
    parallel: Parallel
    """How tensor parallelism splits it: by rows, by columns, or not at all."""

    @property
    def halves(self) -> bool:
        """Whether Hugging Face fuses gate and up, too: tensor parallelism then splits each half of the rows."""
        return self.join == "gate_up" and len(self.projections) == 1


class LoraAdapter(torch.nn.Module):
    """What LoRA adds to one linear layer: [tokens, 1, in] -> [tokens, 1, out], cut as the layer's own tensors are."""

    def __init__(
        self, layer: torch.nn.Module, site: Site, *, config: TransformerConfig, lora: LoraConfig, seed: int
    ) -> None:
        super().__init__()
        self.site = site
        self.enabled = True
        self._config = config
        self._rank = lora.rank
        self._scale = lora.scale
        self._sequence_parallel = bool(config.sequence_parallel)
        weight: torch.nn.Parameter = layer.weight  # type: ignore[assignment]
        self._rows = _rows_of_projections(site, weight.size(0), config)
        self.targets = tuple(name for name in site.projections if lora.adapts(name))
        for name, num_rows in zip(site.projections, self._rows, strict=True):
            if name in self.targets:
                self._add_pair(name, num_rows, weight, seed)

    def _add_pair(self, name: str, num_rows: int, weight: torch.Tensor, seed: int) -> None:
        split_a = 1 if self.site.parallel == "row" else None
        split_b = 0 if self.site.parallel == "column" else None
        a = torch.nn.Parameter(_initial_a(name, self._rank, weight, split=split_a is not None, seed=seed))
        shape: tuple[int, ...] = (num_rows, self._rank)
        if self.site.halves:
            shape, split_b = (2, num_rows // 2, self._rank), None if split_b is None else 1
        b = torch.nn.Parameter(weight.new_zeros(shape))
        for param, split_dim in ((a, split_a), (b, split_b)):
            whole = split_dim is None
            param.tensor_model_parallel = not whole  # type: ignore[attr-defined]
            param.partition_dim = -1 if whole else split_dim  # type: ignore[attr-defined]
            param.partition_stride = 1  # type: ignore[attr-defined]
            # A whole one meets only this rank's tokens: Megatron-core sums its gradient over the ranks.
            param.sequence_parallel = whole and self._sequence_parallel  # type: ignore[attr-defined]
        self.register_parameter(f"a_{_last(name)}", a)
        self.register_parameter(f"b_{_last(name)}", b)

    def pair(self, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """A [rank, in] and B [out, rank] of a Hugging Face module, this rank's parts; [2, out / 2, rank] for halves."""
        return self.get_parameter(f"a_{_last(name)}"), self.get_parameter(f"b_{_last(name)}")

    def forward(self, hidden: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """What is added to the output of the layer, given its input."""
        hidden = self._normed(hidden, layer)
        pairs = [self.pair(name) for name in self.targets]
        low = functional.linear(hidden, torch.cat([a for a, _ in pairs]))
        if self.site.parallel == "column":
            if self._sequence_parallel:
                low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
            else:
                low = copy_to_tensor_model_parallel_region(low)
        elif self.site.parallel == "row":
            if self._sequence_parallel:
                low = reduce_scatter_to_sequence_parallel_region(low)
            else:
                low = reduce_from_tensor_model_parallel_region(low)
        parts = low.split(self._rank, -1)
        outputs = {
            name: functional.linear(part, b.view(-1, self._rank))
            for name, part, (_, b) in zip(self.targets, parts, pairs, strict=True)
        }
        return self._scale * self._join(outputs, low.shape[:-1], low)

    def _normed(self, hidden: torch.Tensor, layer: Any) -> torch.Tensor:
        """What the layer's own weight sees: a norm may be fused into it."""
        weight = getattr(layer, "layer_norm_weight", None)
        if weight is None:
            return hidden
        gain = weight + 1 if self._config.layernorm_zero_centered_gamma else weight
        return functional.rms_norm(hidden, hidden.shape[-1:], gain, layer.eps)

    @torch.no_grad()
    def weight_delta(self) -> torch.Tensor:
        """scale · B A of this rank, float32, laid out as the layer's weight."""
        products: dict[str, torch.Tensor] = {}
        for name in self.targets:
            a, b = self.pair(name)
            products[name] = (b.view(-1, self._rank).float() @ a.float()).t()
        some = products[self.targets[0]]
        return self._scale * self._join(products, some.shape[:-1], some).t()

    def _join(self, parts: dict[str, torch.Tensor], shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Outputs of projections, [..., rows] each, as the layer lays them out; 0 where a projection has no adapter."""
        outputs = [
            parts[name] if name in parts else like.new_zeros(*shape, num_rows)
            for name, num_rows in zip(self.site.projections, self._rows, strict=True)
        ]
        if len(outputs) == 1 or self.site.join != "qkv":
            return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        head = self._config.kv_channels
        groups = self._rows[1] // head
        grouped = [output.reshape(*shape, groups, -1, head) for output in outputs]
        return torch.cat(grouped, -2).flatten(-3)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _rows_of_projections(site: Site, num_rows: int, config: TransformerConfig) -> tuple[int, ...]:
    """How many of a rank's `num_rows` rows belong to each projection."""
    if len(site.projections) == 1:
        return (num_rows,)
    if site.join == "gate_up":
        return (num_rows // 2, num_rows // 2)
    per_group = config.num_attention_heads // config.num_query_groups
    keys = num_rows // (per_group + 2)
    return (per_group * keys, keys, keys)


def _initial_a(name: str, rank: int, weight: torch.Tensor, *, split: bool, seed: int) -> torch.Tensor:
    """PEFT's initial A, Kaiming-uniform with a = sqrt(5), thus U(-1/sqrt(in), 1/sqrt(in)); the same at any layout."""
    size = parallel_state.get_tensor_model_parallel_world_size() if split else 1
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    num_inputs = weight.size(1) * size
    whole = (torch.rand(rank, num_inputs, generator=generator) * 2 - 1) / math.sqrt(num_inputs)
    part = whole.chunk(size, 1)[parallel_state.get_tensor_model_parallel_rank() if split else 0]
    return part.to(device=weight.device, dtype=weight.dtype).contiguous()


def find_sites(model: GPTModel, find_mapping: Callable[[str], Any]) -> list[Site]:
    """The linear layers of attention, MLP and shared experts of this rank's part of a model.

    Args:
        find_mapping: a parameter's name -> the Hugging Face tensors that it is made of (`weights.Mapped`).
    """
    sites = []
    for name, param in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if kind != "weight" or param.dim() != 2 or not path.startswith("decoder.layers."):
            continue
        if ".experts." in path or path.endswith(".router"):
            continue
        mapped = find_mapping(name)
        assert mapped.join in ("copy", "qkv", "gate_up"), name
        sites.append(
            Site(
                path=path,
                projections=tuple(hf_name.removesuffix(".weight") for hf_name in mapped.hf_names),
                join=mapped.join,
                parallel=PARALLEL[mapped.split_dim],
            )
        )
    return sites


def add_adapters(model: GPTModel, architecture: Architecture, lora: LoraConfig, *, seed: int) -> None:
    """Freeze a chunk of a model and give it adapters, before anything wraps it and before its weights are loaded.

    Raises:
        ValueError: a target is the name of no linear layer of this family.
    """
    check_targets(architecture.shape, lora.target_modules)
    attach_lora(model, find_sites(model, chunk_mapping(model, architecture)), lora, seed=seed)


def attach_lora(model: GPTModel, sites: Sequence[Site], lora: LoraConfig, *, seed: int) -> None:
    """Freeze a chunk of a model and give those of its linear layers adapters that are targets."""
    for param in model.parameters():
        param.requires_grad_(False)
    adapters = LoraAdapters()
    for site in sites:
        if not any(lora.adapts(name) for name in site.projections):
            continue
        layer = model.get_submodule(site.path)
        adapter = LoraAdapter(layer, site, config=model.config, lora=lora, seed=seed)
        adapters[site.path.replace(".", "/")] = adapter
        layer.register_forward_hook(_Addition(adapter))
    model.lora = adapters
    if model.config.recompute_granularity is not None and model.pre_process:
        # A recomputed layer gets no gradient at all unless its input asks for one, which a frozen embedding's does not.
        model.embedding.register_forward_hook(_ask_for_gradient)


class LoraAdapters(torch.nn.ModuleDict):
    """All adapters of this rank's part of the model, by the paths of their layers, `.` written as `/`."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """Their place in the whole model, under keys that depend on no layout, as Megatron-core asks for it."""
        result: dict[str, Any] = {}
        for adapter in self.values():
            assert isinstance(adapter, LoraAdapter)
            for name in adapter.targets:
                for letter, param in zip("AB", adapter.pair(name), strict=True):
                    split: Any = param
                    axes = {letter: split.partition_dim} if split.tensor_model_parallel else {}
                    result.update(
                        make_sharded_tensors_for_checkpoint(
                            {letter: param},
                            f"{prefix}{name}.",
                            axes,
                            sharded_offsets,
                            tp_group=parallel_state.get_tensor_model_parallel_group(),
                            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                        )
                    )
        return result


class _Addition:
    """The forward hook of a linear layer with an adapter."""

    def __init__(self, adapter: LoraAdapter) -> None:
        self._adapter = adapter

    def __call__(self, layer: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not self._adapter.enabled:
            return output
        value, *bias = output
        return value + self._adapter(inputs[0], layer), *bias


def _ask_for_gradient(_layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


def adapters_of(model: torch.nn.Module) -> list[LoraAdapter]:
    """The adapters of this rank's part of the model, in the order of its layers."""
    return list(getattr(model, "lora", {}).values())


@contextmanager
def adapters_off(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The base model, for as long as the context lasts."""
    adapters = [adapter for model in models for adapter in adapters_of(model)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


class AdapterRounding:
    """How much of what adapters add is left once merged weights are rounded to the model's dtype.

    A bfloat16 weight has 8 bits: what is less than a 512th of it is rounded away, and after a few small updates that is
    most of what an adapter adds. The trainer computes with the adapters themselves, engines with the merged weights.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Of one weight: what the adapter adds, and what the merged weight differs from the base, both float32."""
        sums = torch.stack([(wanted * found).sum(), wanted.square().sum(), found.square().sum()]).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def correlation(self, device: torch.device) -> float | None:
        """Between the two, over the weights of all ranks: 1 where all of it is left; None where nothing was added.

        Collective.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=device) if self._sums is None else self._sums
        dist.all_reduce(sums)
        both, wanted, found = sums.tolist()
        return both / math.sqrt(wanted * found) if wanted and found else (0.0 if wanted else None)


class BaseWeights:
    """A model as if it had no adapters: `named_parameters` gives the base weights alone, all else is the model's."""

    def __init__(
        self,
        model: GPTModel,
        *,
        merged: bool = False,
        rounding: AdapterRounding | None = None,
        hidden: str = "lora.",
    ) -> None:
        """See a model so.

        Args:
            merged: each base weight with its adapter added, a new tensor, rounded once to the weight's dtype.
            rounding: is told what the rounding leaves.
            hidden: the parameters whose names begin so are left out.
        """
        self._model = model
        self._merged = merged
        self._rounding = rounding
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        deltas = {f"{adapter.site.path}.weight": adapter for adapter in adapters_of(self._model)}
        for name, param in self._model.named_parameters():
            if name.startswith(self._hidden):
                continue
            if self._merged and name in deltas:
                base, delta = param.detach().float(), deltas[name].weight_delta()
                merged = (base + delta).to(param.dtype)
                if self._rounding is not None:
                    self._rounding.add(delta, merged.float() - base)
                yield name, merged
            else:
                yield name, param


WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's own modules."""


def named_adapter_tensors(models: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Every A and B under PEFT's name, whole, on the CPU of every rank.

    Collective over tensor and pipeline parallelism. `models` are the parts of the model that this rank holds.
    """
    own: dict[str, torch.Tensor] = {}
    for model in models:
        for adapter in adapters_of(model):
            for name in adapter.targets:
                for letter, param in zip("AB", adapter.pair(name), strict=True):
                    own[f"{PREFIX}{name}.lora_{letter}.weight"] = _gather(param)
    size = parallel_state.get_pipeline_model_parallel_world_size()
    stages: list[dict[str, torch.Tensor]] = [own] * size
    if size > 1:
        dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
    return {name: tensor for stage in stages for name, tensor in stage.items()}


def _gather(param: Any) -> torch.Tensor:
    """The whole tensor of the tensor-parallel ranks' parts."""
    part: torch.Tensor = param.detach()
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size > 1 and param.tensor_model_parallel:
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        part = torch.cat(parts, param.partition_dim)
    return part.reshape(-1, part.size(-1)).cpu()


def _target_modules(names: Iterable[str], *, has_experts: bool) -> list[str]:
    """The modules with adapters: by the last parts of their names, or in a model with experts by their whole names.

    There `gate_proj` alone would also mean the routed experts', which have none. With transformers 5, PEFT 0.21 takes
    even the whole name of a shared expert's for the routed ones', and cannot read it.
    """
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names}
    return sorted(modules if has_experts else {name.rpartition(".")[2] for name in modules})


def peft_config(names: Iterable[str], *, lora: LoraConfig, base_model: Path) -> dict[str, Any]:
    """The adapter_config.json of adapters whose tensors have these names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(names, has_experts=num_experts(read_config(base_model)) > 0),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "inference_mode": True,
    }


def save_adapter(
    directory: Path, tensors: dict[str, torch.Tensor], *, lora: LoraConfig, base_model: Path
) -> None:
    """Write what `peft.PeftModel.from_pretrained` reads, whole or not at all for each file."""
    directory.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    with whole_file(directory / WEIGHTS_NAME) as file:
        file.write(content)
    config = peft_config(tensors, lora=lora, base_model=base_model)
    with whole_file(directory / CONFIG_NAME) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
