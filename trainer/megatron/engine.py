"""Forward passes and updates of one rank's Megatron-core model.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from polyturn.configs.optimizer import OptimizerConfig
from polyturn.trainer.algorithms.objective import Objective, ObjectiveSums, evaluate_objective
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.megatron.logprob_head import LogprobHead, LogprobRequest, split_scores
from polyturn.trainer.megatron.logprobs import Entropy
from polyturn.trainer.megatron.model import (
    Architecture,
    build_model,
    read_architecture,
    transformer_config,
)
from polyturn.trainer.megatron.optimizer import make_optimizer
from polyturn.trainer.megatron.packed import PackedBatch
from polyturn.trainer.megatron.tokens import find_bad_samples, token_batch
from polyturn.trainer.megatron.weights import mark_split_params


class Engine:
    """The model of this rank with its gradients' buffers and its share of the optimizer."""

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        *,
        dtype: str,
        device: str,
        optimizer: OptimizerConfig,
        megatron: Mapping[str, Any],
        prepare: Callable[[GPTModel], None] | None = None,
    ) -> None:
        """`prepare` changes a chunk of the model before it is wrapped: adapters, another head."""
        tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
        self.architecture: Architecture = read_architecture(hf_config, tensor_parallel=tensor_parallel)
        self.config = transformer_config(
            hf_config, dtype=dtype, device=device, extra=megatron
        )
        self.device = (
            torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        )
        self.model = build_model(self.config, self.architecture, device=device)
        mark_split_params([self.model], self.architecture)
        if prepare is not None:
            prepare(self.model)
        self._head = LogprobHead(self.model, vocab_size=self.architecture.vocab_size)
        wrapped = Float16Module(self.config, self.model) if dtype == "bfloat16" else self.model
        self._parallel_model = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            wrapped,
        )
        self._optimizer_config = optimizer
        self._bad_samples: list[str] = []
        self.optimizer: Any = None

    def build_optimizer(self) -> None:
        """Make the optimizer; in bfloat16 its float32 weights are taken from the model's, so load those before."""
        self.optimizer = make_optimizer(self._parallel_model, self.config, self._optimizer_config)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = self._finalize

    def forward(self, batch: PackedBatch, temperature: float) -> torch.Tensor:
        """Logprobs [N] of the pack's trainable tokens."""
        return split_scores(self._scores(batch, temperature, "none"))[0]

    def update(
        self,
        batches: Sequence[PackedBatch],
        *,
        objective: Objective,
        counts: GlobalCounts,
        learning_rate: float,
    ) -> dict[str, float]:
        """One optimizer update over this rank's micro-batches and those of all data-parallel ranks.

        Returns the metrics of the global batch, the same on every rank.

        Raises:
            FloatingPointError: a number that is not finite on a trainable token; names the sample.
        """
        self._bad_samples.clear()
        self._parallel_model.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts: list[ObjectiveSums] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, objective=objective, counts=counts),
            data_iterator=iter(batches),
            model=[self._parallel_model],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm is {grad_norm}, though every trainable token is finite"
            )
        metrics = self._reduce(parts, counts)
        return {**metrics, "grad_norm": float(grad_norm), "learning_rate": learning_rate}

    def share_params(self) -> None:
        """Make the optimizer's float32 weights, each rank's share of them, the weights of the model."""
        for optimizer in self.optimizers:
            optimizer._copy_main_params_to_model_params()
        self._parallel_model.start_param_sync(force_sync=True)

    def raise_together(self, faults: Sequence[str]) -> None:
        """Raise what any data-parallel rank found, on all of them: one that went on alone would wait for ever.

        Raises:
            FloatingPointError: one or more ranks have a fault.
        """
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        num_faults = torch.tensor(float(len(faults)), device=self.device)
        dist.all_reduce(num_faults, group=group)
        if num_faults.item() == 0:
            return
        by_rank: list[list[str]] = [[] for _ in range(group.size())]
        dist.all_gather_object(by_rank, list(faults), group=group)
        raise FloatingPointError("; ".join(fault for rank_faults in by_rank for fault in rank_faults))

    @property
    def optimizers(self) -> list[Any]:
        """Megatron-core's distributed optimizers, whose inner torch optimizers hold the state."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def _scores(self, batch: PackedBatch, temperature: float, entropy: Entropy) -> torch.Tensor:
        """What `split_scores` takes apart."""
        self._head.request = LogprobRequest(
            rows=batch.rows, targets=batch.targets, temperature=temperature, entropy=entropy
        )
        return self._parallel_model(
            batch.input_ids, batch.position_ids, None, packed_seq_params=batch.sequences
        )

    def _forward_step(
        self,
        batches: Iterator[PackedBatch],
        _model: torch.nn.Module,
        *,
        objective: Objective,
        counts: GlobalCounts,
    ) -> tuple[torch.Tensor, Any]:
        """What Megatron-core's schedule calls for each micro-batch."""
        batch = next(batches)
        entropy: Entropy = "gradient" if objective.entropy_coefficient > 0 else "value"
        scores = self._scores(batch, objective.temperature, entropy)
        return scores, partial(self._loss, batch, objective, counts)

    def _loss(
        self, batch: PackedBatch, objective: Objective, counts: GlobalCounts, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ObjectiveSums]:
        logprobs, entropies = split_scores(scores)
        assert entropies is not None
        tokens = token_batch(batch, objective, counts, logprobs, entropies)
        self._bad_samples.extend(find_bad_samples(batch, tokens))
        result = evaluate_objective(tokens, objective, counts)
        # The count would be a divisor of the gradient; ours is in the loss already, and `_finalize` ignores this one.
        return result.loss, torch.zeros((), dtype=torch.int, device=self.device), result

    def _finalize(
        self, model: list[torch.nn.Module], _num_tokens: torch.Tensor | None, **kwargs: Any
    ) -> None:
        """Sum the gradients over the data-parallel ranks, unless one of them has a number that is not finite."""
        self.raise_together(self._bad_samples)
        finalize_model_grads(model, None, **kwargs)

    def _reduce(self, parts: Sequence[ObjectiveSums], counts: GlobalCounts) -> dict[str, float]:
        """Add the parts up over micro-batches and data-parallel ranks; means are over trainable tokens."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        names = list(parts[0].sums)
        sums = torch.stack(
            [torch.stack([part.sums[name].double() for part in parts]).sum() for name in names]
        )
        dist.all_reduce(sums, group=group)
        max_names = list(parts[0].maxima)
        maxima = torch.stack([torch.stack([part.maxima[name] for part in parts]).max() for name in max_names])
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        totals = dict(zip(names, sums.tolist(), strict=True))
        num_tokens = totals.pop("num_tokens")
        assert num_tokens == counts.num_tokens, (
            f"the ranks trained on {num_tokens:.0f} tokens, the denominator of the update is {counts.num_tokens}"
        )
        loss = totals.pop("loss")
        means = {name: total / max(num_tokens, 1) for name, total in totals.items()}
        return {
            "loss": loss,
            **means,
            **dict(zip(max_names, maxima.tolist(), strict=True)),
            "num_tokens": num_tokens,
            "num_sequences": float(counts.num_sequences),
        }
