"""The policy as the trainer sees it: one `MegatronPolicy` in each rank's process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from polyturn.configs.schema.trainer import LoraConfig, OptimizerConfig, ParallelConfig, SharedPrefix
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.data.prefix_tree import Sharing
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.cpu import install_cpu_compatibility
from polyturn.trainer.megatron.optimizer import LearningRateSchedule
from polyturn.trainer.models.families import same_computation
from polyturn.trainer.models.hf_directory import HFWeights, read_config, write_hf_directory
from polyturn.trainer.models.weight_files import linear_layers

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

    from polyturn.trainer.megatron.engine import Engine
    from polyturn.trainer.megatron.model import LayerFlops
    from polyturn.trainer.megatron.packing import PackedBatch
    from polyturn.trainer.megatron.reference import Reference

REFERENCE_NAME = "reference"
"""The folder of a checkpoint that holds a reference which is no longer the run's first."""


class MegatronPolicy:
    """One rank of the trained policy.

    Every method is collective: all ranks call it, with the samples of their data-parallel rank, which
    `data_parallel_rank` says. All ranks that share one copy of the model get the same samples and the same results.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        parallel: ParallelConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        megatron: Mapping[str, Any] | None = None,
        max_tokens_per_gpu: int = 8192,
        total_updates: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        master_address: str = "127.0.0.1",
        master_port: int = 0,
        keep_reference: bool = False,
        reference_path: Path | None = None,
        initial_path: Path | None = None,
        load_optimizer: bool = True,
        lora: LoraConfig | None = None,
        shared_prefix: SharedPrefix = "off",
        routing_replay: bool = False,
    ) -> None:
        """Meet the other ranks and load the weights of a Hugging Face directory.

        Args:
            dtype: "float32" or "bfloat16" (with float32 weights in the optimizer).
            device: "cpu" (gloo) or "cuda" (nccl). A process is one or the other for good.
            megatron: further fields of Megatron-core's TransformerConfig; under `ddp` and `optimizer`, of its
                DistributedDataParallelConfig and OptimizerConfig.
            total_updates: of the run, where a learning rate schedule ends if it does not say.
            master_port: where rank 0 listens; of no meaning for a single rank.
            keep_reference: keep a frozen copy of the weights for `reference_logprobs`.
            reference_path: a Hugging Face directory with the reference's weights instead; of the same architecture.
            initial_path: a checkpoint, a torch_dist or a Hugging Face directory to begin with instead of `model_path`.
            load_optimizer: take the optimizer's state, too, if that is a checkpoint.
            lora: train adapters in place of the weights. The reference is then the policy without them.
            shared_prefix: "tree" computes what samples of a micro-batch begin with once; see docs/shared_prefix.md.
            routing_replay: send each token to the experts that the engine recorded (`TrainSample.routed_experts`).

        Raises:
            ValueError: the directory, the config or the layout cannot be used; one sentence says why.
        """
        install_cpu_compatibility(device)
        from polyturn.trainer.checkpoints.manifest import describe_adapters
        from polyturn.trainer.megatron.engine import Engine
        from polyturn.trainer.megatron.policy_checkpoints import PolicyCheckpoints
        from polyturn.trainer.megatron.process_groups import join_ranks
        from polyturn.trainer.megatron.routing_replay import RoutingReplay

        self.model_path = Path(model_path)
        self.dtype = dtype
        self.lora = lora
        self._refreshed = False
        self.parallel = parallel or ParallelConfig()
        self._max_tokens = max_tokens_per_gpu
        self._shared_prefix: SharedPrefix = shared_prefix
        self._sharing = Sharing()
        self._arrived: Any = None
        hf_config = read_config(self.model_path)
        optimizer = optimizer or OptimizerConfig()
        self.schedule = LearningRateSchedule.from_config(optimizer, num_updates=total_updates)
        self.num_updates = 0
        join_ranks(
            device=device,
            parallel=self.parallel,
            seed=seed,
            rank=rank,
            world_size=world_size,
            master_address=master_address,
            master_port=master_port,
        )
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._engine = Engine(
                hf_config,
                dtype=dtype,
                device=device,
                optimizer=optimizer,
                megatron=megatron or {},
                prepare=partial(_prepare, hf_config, lora, seed, shared_prefix),
            )
            if routing_replay:
                self._engine.replay = RoutingReplay(self._engine.chunks)
            self._engines = {"policy": self._engine}
            self._checkpoints = PolicyCheckpoints(
                self._engines,
                hf_config=hf_config,
                parallel=self.parallel,
                dtype=dtype,
                adapters=describe_adapters(lora, linear_layers(self._engine.architecture.shape)),
            )
            self._load_initial(initial_path, with_optimizer=load_optimizer)
            self._reference = self._make_reference(reference_path) if keep_reference else None
            on_failure.pop_all()

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
        from polyturn.trainer.megatron.logprob_head import split_scores
        from polyturn.trainer.megatron.micro_batches import finite_columns

        batches = self._pack(samples)
        found = self._engine.score(batches, temperature=temperature)
        logprobs = [split_scores(scores)[0] for scores in found]
        return finite_columns(self._engine, samples, batches, logprobs, what="logprob")

    def reference_logprobs(
        self, samples: Sequence[TrainSample], *, temperature: float = 1.0
    ) -> list[npt.NDArray[np.float32]]:
        """The same of the frozen reference: another model's weights, or those that this policy began with."""
        if self._reference is None:
            raise ValueError("this policy keeps no reference: construct it with keep_reference=True")
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
        rate = self.schedule(self.num_updates) if learning_rate is None else learning_rate
        batches = self._pack(samples)
        metrics = self._engine.update(batches, objective=objective, counts=global_counts, learning_rate=rate)
        self._sharing = sum((batch.sharing for batch in batches), self._sharing)
        self.num_updates += 1
        return metrics

    def take_sharing(self) -> tuple[Sharing, LayerFlops]:
        """What updates computed on this rank since the last call, and would have without shared prefixes; its costs."""
        from polyturn.trainer.megatron.model import layer_flops

        sharing, self._sharing = self._sharing, Sharing()
        return sharing, layer_flops(self._engine.chunks)

    def named_hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its Hugging Face name, whole on every rank, in the same order on all; adapters merged.

        Collective: all ranks go through it to its end. A tensor may be a view of the weight
        itself, to be read before the next update.
        """
        from polyturn.trainer.megatron.lora import Arrived, BaseWeights
        from polyturn.trainer.megatron.weights import named_hf_tensors

        self._arrived = Arrived() if self.lora is not None else None
        merged: Any = [
            BaseWeights(chunk, merged=True, arrived=self._arrived) for chunk in self._engine.chunks
        ]
        return named_hf_tensors(merged, self._engine.architecture)

    def adapter_correlation(self) -> float | None:
        """Between what the adapters add and what was left of it in the last `named_hf_tensors`, after its rounding.

        None without adapters, or where they add nothing. Collective.
        """
        return None if self._arrived is None else self._arrived.correlation(self._engine.device)

    def save_hf(self, directory: Path) -> None:
        """Write a Hugging Face directory, adapters merged: rank 0 writes, the others wait for it."""
        tensors = self.named_hf_tensors()
        if self.rank == 0:
            write_hf_directory(Path(directory), source=self.model_path, tensors=tensors, dtype=self.dtype)
        else:
            for _ in tensors:
                pass
        dist.barrier()

    def save_adapter(self, directory: Path) -> None:
        """Write the adapters as a PEFT directory: rank 0 writes, the others wait for it."""
        from polyturn.trainer.megatron.lora import named_adapter_tensors, save_adapter

        assert self.lora is not None, "there are no adapters to save"
        tensors = named_adapter_tensors(self._engine.chunks)
        if self.rank == 0:
            save_adapter(Path(directory), tensors, lora=self.lora, base_model=self.model_path)
        dist.barrier()

    def keep_in_checkpoints(self, name: str, engine: Engine) -> None:
        """Write and load another engine of this rank, a critic's, with every checkpoint."""
        self._engines[name] = engine

    def save_checkpoint(self, directory: Path) -> None:
        """Write a checkpoint, from which the next update will be bitwise the same at the same layout."""
        self.begin_checkpoint(directory)
        self.finish_checkpoint()

    def begin_checkpoint(self, directory: Path) -> None:
        """Copy what a checkpoint holds, and write it while training goes on; `finish_checkpoint` must follow."""
        if self._refreshed:
            assert self._reference is not None
            with self._reference.in_place():
                self.save_hf(Path(directory) / REFERENCE_NAME)
        self._checkpoints.begin(Path(directory), num_updates=self.num_updates)

    def checkpoint_written(self) -> bool:
        """Whether `finish_checkpoint` would not have to wait for this rank's disk."""
        return self._checkpoints.written()

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that was begun; without it the directory does not count as one.

        Raises:
            CheckpointError: a rank could not write; raised on all of them.
        """
        self._checkpoints.finish()

    def find_checkpoint_faults(self, directory: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files: together the ranks read them all."""
        return self._checkpoints.find_faults(Path(directory))

    def load_checkpoint(self, directory: Path) -> None:
        """Go on from a checkpoint, whatever layout wrote it.

        The reference stays what this policy was constructed with, unless it was refreshed.

        Raises:
            ValueError: no finished checkpoint is there, or it is one of another model.
        """
        self.num_updates = self._checkpoints.load(Path(directory))
        reference = Path(directory) / REFERENCE_NAME
        if self._reference is not None and reference.is_dir():
            with self._reference.in_place():
                self._load_hf(reference)
            self._refreshed = True

    def close(self) -> None:
        """Leave the ranks."""
        from polyturn.trainer.megatron.process_groups import leave_ranks

        leave_ranks()

    def _load_initial(self, path: Path | None, *, with_optimizer: bool) -> None:
        """The weights that training begins with, and the optimizer that takes them up."""
        from polyturn.trainer.checkpoints.sources import find_source
        from polyturn.trainer.megatron.torch_dist import load_torch_dist

        source = None if path is None else find_source(path)
        if source is not None and source.kind == "hf":
            ours, theirs = read_config(self.model_path), read_config(source.path)
            same_computation(ours, theirs, source=source.path, what="checkpoint.load")
            self._load_hf(source.path)
        elif source is not None and source.kind == "torch_dist":
            load_torch_dist(self._engine.chunks, source.path, vocab_size=self._engine.architecture.vocab_size)
        else:
            self._load_hf(self.model_path)
        self._engine.build_optimizer()
        if source is not None and source.kind == "checkpoint":
            self._checkpoints.load(source.path, with_optimizer=with_optimizer)

    def _load_hf(self, directory: Path) -> None:
        """Fill the model with a Hugging Face directory's weights; adapters stay as they are."""
        from polyturn.trainer.megatron.lora import BaseWeights
        from polyturn.trainer.megatron.weights import load_hf_weights

        base: Any = [BaseWeights(chunk) for chunk in self._engine.chunks]
        with closing(HFWeights(directory)) as weights:
            load_hf_weights(base, self._engine.architecture, weights)

    def _make_reference(self, path: Path | None) -> Reference:
        from polyturn.trainer.megatron.reference import Reference

        if path is None:
            return Reference(self._engine.chunks, keep_weights=self.lora is None)
        ours, theirs = read_config(self.model_path), read_config(path)
        same_computation(ours, theirs, source=path, what="model.reference_path")
        reference = Reference(self._engine.chunks)
        with reference.in_place():
            self._load_hf(path)
        return reference

    def _pack(self, samples: Sequence[TrainSample]) -> list[PackedBatch]:
        from polyturn.trainer.megatron.micro_batches import make_micro_batches

        return make_micro_batches(
            samples,
            max_tokens=self._max_tokens,
            parallel=self.parallel,
            device=self._engine.device,
            shared_prefix=self._shared_prefix,
        )


def _prepare(
    hf_config: Mapping[str, Any],
    lora: LoraConfig | None,
    seed: int,
    shared_prefix: SharedPrefix,
    model: GPTModel,
) -> None:
    """What is changed in a chunk of the model before it is wrapped."""
    from polyturn.trainer.megatron.lora import add_adapters
    from polyturn.trainer.megatron.model import read_architecture
    from polyturn.trainer.megatron.tree_attention import allow_trees

    if lora is not None:
        add_adapters(model, read_architecture(hf_config, tensor_parallel=1), lora, seed=seed)
    if shared_prefix == "tree":
        allow_trees(model)
