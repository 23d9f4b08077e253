"""The policy as the trainer sees it: one `MegatronPolicy` in each rank's process, and its frozen reference.

The reference, which a KL penalty compares with, has no model of its own: its weights wait on the CPU and change places
with the policy's for as long as they are needed, one tensor at a time. With LoRA there is nothing to keep: the
reference is the policy without its adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.trainer.algorithms.entropy_control import EntropyBonus
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.checkpoints.manifest import describe_adapters, read_manifest
from polyturn.trainer.checkpoints.megatron_args import check_args
from polyturn.trainer.checkpoints.sources import find_source, initial_weights
from polyturn.trainer.data.prefix_tree import Sharing
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.checkpoints import Checkpoints
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.lora import (
    AdapterRounding,
    BaseWeights,
    adapters_off,
    add_adapters,
    named_adapter_tensors,
    peft_config,
    save_adapter,
)
from polyturn.trainer.megatron.model import LayerFlops, layer_flops, read_architecture
from polyturn.trainer.megatron.optimizer import LearningRateSchedule
from polyturn.trainer.megatron.packing import make_micro_batches
from polyturn.trainer.megatron.process_groups import Place, join_ranks, leave_ranks
from polyturn.trainer.megatron.routing_replay import RoutingReplay
from polyturn.trainer.megatron.torch_dist import load_torch_dist
from polyturn.trainer.megatron.tree_attention import allow_trees
from polyturn.trainer.megatron.weights import load_hf_weights, named_hf_tensors
from polyturn.trainer.models.families import same_computation
from polyturn.trainer.models.hf_directory import HFWeights, read_config, write_hf_directory
from polyturn.trainer.models.weight_files import linear_layers

REFERENCE_NAME = "reference"
"""The folder of a checkpoint that holds a reference which is no longer the run's first."""


class MegatronPolicy:
    """One rank of the trained policy.

    Every method is collective: all ranks call it, with the samples of their data-parallel rank, which
    `data_parallel_rank` says. All ranks that share one copy of the model get the same samples and the same results.
    """

    def __init__(self, config: RunConfig, place: Place | None = None) -> None:
        """Meet the other ranks, and load the model and the weights that the run begins with.

        Args:
            place: None: this process is the only rank.

        Raises:
            ValueError: the directory, the config or the layout cannot be used; one sentence says why.
        """
        trainer = config.trainer
        self.model_path = resolve_model_path(config.model.path)
        self.dtype = config.model.dtype
        self.lora = trainer.lora
        self.parallel = trainer.parallel
        self.num_updates = 0
        self._entropy_target = config.algorithm.entropy_target
        self.entropy_bonus = EntropyBonus.first(config.algorithm.entropy_coefficient)
        """Of the next update, where the weight follows a target."""
        self._schedule = LearningRateSchedule.from_config(
            trainer.optimizer, num_updates=trainer.total_updates
        )
        self._rounding: AdapterRounding | None = None
        self._refreshed = False
        hf_config = read_config(self.model_path)
        join_ranks(self.parallel, place or Place(), device=trainer.device, seed=config.seed)
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._engine = Engine(
                hf_config,
                config,
                optimizer=trainer.optimizer,
                pack=partial(
                    make_micro_batches,
                    max_tokens=trainer.max_tokens_per_gpu,
                    parallel=self.parallel,
                    shared_prefix=trainer.shared_prefix,
                ),
                prepare=partial(_prepare, hf_config, config),
            )
            if config.engines.routing_replay:
                self._engine.replay = RoutingReplay(self._engine.chunks)
            self.checkpoints = Checkpoints(
                {"policy": self._engine},
                hf_config=hf_config,
                parallel=self.parallel,
                dtype=self.dtype,
                adapters=describe_adapters(self.lora, linear_layers(self._engine.architecture.shape)),
            )
            self._load_initial(initial_weights(config), with_optimizer=config.checkpoint.load_optimizer)
            self._reference = self._make_reference(config) if trainer.needs_reference else None
            on_failure.pop_all()

    @property
    def engine(self) -> Engine:
        """The model with its optimizer."""
        return self._engine

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def data_parallel_rank(self) -> int:
        return self.parallel.place(dist.get_rank()).data

    def logprobs(
        self, samples: Sequence[TrainSample], *, temperature: float = 1.0
    ) -> list[npt.NDArray[np.float32]]:
        """The logprobs of this rank's samples, in their order.

        Entry t of a sample's column [T] is the logprob of token t given the tokens before it, from the float32 softmax
        of logits / temperature; 0 where the token was not sampled.

        Raises:
            FloatingPointError: one of them is not finite; names the sample. All ranks raise it.
        """
        return self._engine.score(samples, temperature=temperature, what="logprob")

    def reference_logprobs(
        self, samples: Sequence[TrainSample], *, temperature: float = 1.0
    ) -> list[npt.NDArray[np.float32]]:
        """The same of the frozen reference: another model's weights, or those that this policy began with."""
        if self._reference is None:
            raise ValueError("this policy keeps no reference: trainer.algorithm compares with none")
        # What the engine chose was the policy's choice: the reference makes its own.
        unrouted = [replace(sample, routed_experts=None) for sample in samples]
        with self._reference.in_place():
            return self.logprobs(unrouted, temperature=temperature)

    def refresh_reference(self) -> None:
        """Make the policy as it is the reference from now on; checkpoints then hold it."""
        assert self._reference is not None, "there is no reference to refresh"
        self._reference.refresh()
        self._refreshed = True

    def train(
        self,
        samples: Sequence[TrainSample],
        *,
        objective: Objective,
        global_counts: GlobalCounts,
        learning_rate: float | None = None,
    ) -> dict[str, float]:
        """One optimizer update; returns the metrics of the global batch, the same on every rank.

        Args:
            samples: those of this data-parallel rank.
            global_counts: the denominators, over the samples of all ranks.
            learning_rate: None takes the schedule's.

        Raises:
            FloatingPointError: a number on a trainable token is not finite; names the sample. All ranks raise it.
            ValueError: a sample lacks a column that the objective needs.
        """
        rate = self._schedule(self.num_updates) if learning_rate is None else learning_rate
        target, coefficient = self._entropy_target, self.entropy_bonus.coefficient
        if target is not None:
            objective = replace(objective, entropy_coefficient=coefficient)
        metrics = self._engine.update(samples, objective=objective, counts=global_counts, learning_rate=rate)
        self.num_updates += 1
        if target is not None:
            self.entropy_bonus = self.entropy_bonus.after(metrics["entropy"], target)
            metrics["entropy_coefficient"] = coefficient
        return metrics

    def take_sharing(self) -> tuple[Sharing, LayerFlops]:
        """What updates computed on this rank since the last call, and would have without shared prefixes; its costs."""
        sharing, self._engine.sharing = self._engine.sharing, Sharing()
        return sharing, layer_flops(self._engine.chunks)

    def named_hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its Hugging Face name, whole on every rank, in the same order on all; adapters merged.

        Collective: all ranks go through it to its end. A tensor may be a view of the weight
        itself, to be read before the next update.
        """

        self._rounding = AdapterRounding() if self.lora is not None else None
        merged: Any = [
            BaseWeights(chunk, merged=True, rounding=self._rounding) for chunk in self._engine.chunks
        ]
        return named_hf_tensors(merged, self._engine.architecture)

    def adapter_correlation(self) -> float | None:
        """Between what the adapters add and what was left of it in the last `named_hf_tensors`, after its rounding.

        None without adapters, or where they add nothing. Collective.
        """
        return None if self._rounding is None else self._rounding.correlation(self._engine.device)

    def save_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory, adapters merged: rank 0 writes, the others wait for it."""
        tensors = self.named_hf_tensors()
        if self.rank == 0:
            write_hf_directory(Path(directory), source=self.model_path, tensors=tensors, dtype=self.dtype)
        else:
            for _ in tensors:
                pass
        dist.barrier()

    def named_adapter_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every A and B under PEFT's name, whole, on the CPU of every rank. Collective."""
        return iter(named_adapter_tensors(self._engine.chunks).items())

    def adapter_config(self, names: Sequence[str]) -> dict[str, Any]:
        """PEFT's config of adapters whose tensors have these names."""
        assert self.lora is not None, "there are no adapters"
        return peft_config(names, lora=self.lora, base_model=self.model_path)

    def save_adapter(self, directory: Path) -> None:
        """Write the adapters as a PEFT directory: rank 0 writes, the others wait for it."""
        assert self.lora is not None, "there are no adapters to save"
        tensors = named_adapter_tensors(self._engine.chunks)
        if self.rank == 0:
            save_adapter(Path(directory), tensors, lora=self.lora, base_model=self.model_path)
        dist.barrier()

    def begin_checkpoint(self, directory: Path) -> None:
        """Copy what a checkpoint holds, and write it while training goes on; `checkpoints.finish` must follow."""
        if self._refreshed:
            assert self._reference is not None
            with self._reference.in_place():
                self.save_hf(Path(directory) / REFERENCE_NAME)
        self.checkpoints.begin(
            Path(directory), num_updates=self.num_updates, entropy_bonus=asdict(self.entropy_bonus)
        )

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint, whatever layout wrote it.

        The reference stays what this policy was constructed with, unless it was refreshed.

        Raises:
            ValueError: no finished checkpoint is there, or it is one of another model.
        """
        self.num_updates = self.checkpoints.load(Path(directory))
        bonus = read_manifest(Path(directory))[0].get("entropy_bonus")
        if bonus is not None and self._entropy_target is not None:
            self.entropy_bonus = EntropyBonus(**bonus)
        reference = Path(directory) / REFERENCE_NAME
        if self._reference is not None and reference.is_dir():
            with self._reference.in_place():
                self._load_hf(reference)
            self._refreshed = True

    def close(self) -> None:
        """Leave the ranks."""
        if hasattr(self, "_engine"):
            self._engine.release()
        leave_ranks()

    def _load_initial(self, path: Path | None, *, with_optimizer: bool) -> None:
        """The weights that training begins with, and the optimizer that takes them up."""

        source = None if path is None else find_source(path)
        if source is not None and source.kind == "hf":
            ours, theirs = read_config(self.model_path), read_config(source.path)
            same_computation(ours, theirs, source=source.path, what="checkpoint.load")
            self._load_hf(source.path)
        elif source is not None and source.kind == "torch_dist":
            check_args(source.path, read_config(self.model_path))
            load_torch_dist(self._engine.chunks, source.path, vocab_size=self._engine.architecture.vocab_size)
        else:
            self._load_hf(self.model_path)
        self._engine.build_optimizer()
        if source is not None and source.kind == "checkpoint":
            self.checkpoints.load(source.path, with_optimizer=with_optimizer)

    def _load_hf(self, directory: Path) -> None:
        """Fill the model with a Hugging Face directory's weights; adapters stay as they are."""

        base: Any = [BaseWeights(chunk) for chunk in self._engine.chunks]
        with closing(HFWeights(directory)) as weights:
            load_hf_weights(base, self._engine.architecture, weights)

    def _make_reference(self, config: RunConfig) -> Reference:
        if config.model.reference_path is None:
            return Reference(self._engine.chunks, keep_weights=self.lora is None)
        path = resolve_model_path(config.model.reference_path)
        ours, theirs = read_config(self.model_path), read_config(path)
        same_computation(ours, theirs, source=path, what="model.reference_path")
        reference = Reference(self._engine.chunks)
        with reference.in_place():
            self._load_hf(path)
        return reference


def _prepare(hf_config: Mapping[str, Any], config: RunConfig, model: GPTModel) -> None:
    """What is changed in a chunk of the model before it is wrapped."""
    if config.trainer.lora is not None:
        architecture = read_architecture(hf_config, tensor_parallel=1)
        add_adapters(model, architecture, config.trainer.lora, seed=config.seed)
    if config.trainer.shared_prefix == "tree":
        allow_trees(model)


class Reference:
    """The reference's weights of this rank. Starts as what the models hold when it is made."""

    def __init__(self, models: Sequence[GPTModel], *, keep_weights: bool = True) -> None:
        """`keep_weights=False`: the policy's own base weights, which then must be frozen, without its adapters."""
        self._models = models
        self._waiting: list[torch.Tensor] = []
        if keep_weights:
            self._waiting = [_on_cpu(param) for param in self._params()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The models are the reference for as long as the context lasts, then bitwise what they were."""
        with adapters_off(self._models):
            self._swap()
            try:
                yield
            finally:
                self._swap()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the policy as it is for the reference from now on."""
        assert self._waiting, "with adapters the reference is the base model"
        for waiting, param in zip(self._waiting, self._params(), strict=True):
            waiting.copy_(param)

    @torch.no_grad()
    def _swap(self) -> None:
        if not self._waiting:
            return
        for waiting, param in zip(self._waiting, self._params(), strict=True):
            present = param.detach().clone()
            param.copy_(waiting)
            waiting.copy_(present)

    def _params(self) -> list[torch.Tensor]:
        return [param for model in self._models for _, param in BaseWeights(model).named_parameters()]


def _on_cpu(param: torch.Tensor) -> torch.Tensor:
    copy = param.detach().cpu().clone()
    # Pinned memory is what a GPU reads and writes at full speed.
    return copy.pin_memory() if param.is_cuda else copy
