"""Forward passes and updates of one rank's Megatron-core model, through all stages of its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
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

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import OptimizerConfig
from polyturn.trainer.algorithms.objective import (
    FIGURES_BY_ENVIRONMENT,
    Objective,
    ObjectiveSums,
    evaluate_by_environment,
    evaluate_objective,
    figure_of,
)
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.data.prefix_tree import Sharing
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.attention import spread_rows
from polyturn.trainer.megatron.logprob_head import Entropy, LogprobHead, split_scores
from polyturn.trainer.megatron.model import (
    Architecture,
    MegatronOptions,
    build_chunks,
    read_architecture,
    transformer_config,
)
from polyturn.trainer.megatron.optimizer import make_optimizer, step
from polyturn.trainer.megatron.packing import (
    PackedBatch,
    find_bad_samples,
    rows_by_environment,
    scatter_rows,
    token_batch,
)
from polyturn.trainer.megatron.routing_replay import RoutingReplay
from polyturn.trainer.megatron.weights import mark_split_params


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Any],
    step: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run every micro-batch through all stages, with Megatron-core's schedule for this layout.

    Args:
        chunks: this rank's, wrapped.
        step: (iterator of the micro-batches, chunk) -> (output, function of it), called once for each chunk and
            micro-batch. On the last stage the function gives (loss, a count, what to return), or what to return when
            there is no backward pass.

    Returns:
        What the functions gave, by micro-batch; on the last stage only, elsewhere nothing.
    """
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        # Lengths vary, and the stages tell each other: these two are read by nobody.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def no_sync(chunks: Sequence[Any]) -> Any:
    """What the schedules call so that gradients are reduced with a chunk's last micro-batch alone.

    Without overlap they are reduced when all is done, and nothing needs to be held back.
    """
    if not chunks[0].ddp_config.overlap_grad_reduce:
        return None
    return [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync


def is_last_stage() -> bool:
    """Whether this rank holds the output layer."""
    return parallel_state.is_pipeline_last_stage()


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last stage's tensor, written into those of the other stages, which are of the same shape and type."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() > 1:
        dist.broadcast(tensor, group_src=group.size() - 1, group=group)
    return tensor


def object_from_last_stage(value: Any) -> Any:
    """The last stage's object; what the others hold does not matter."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, group_src=group.size() - 1, group=group)
    return holder[0]


class Engine:
    """The model of this rank with its gradients' buffers and its share of the optimizer."""

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        config: RunConfig,
        *,
        optimizer: OptimizerConfig,
        pack: Callable[..., list[PackedBatch]],
        prepare: Callable[[GPTModel], None],
    ) -> None:
        """
        Args:
            hf_config: of the model: a run's policy and its critic may differ.
            optimizer: the section of the model.
            pack: a rank's samples -> its micro-batches: `make_micro_batches`, told all but samples and device.
            prepare: changes a chunk of the model before it is wrapped: adapters, another head.
        """
        device = config.trainer.device
        self._options = MegatronOptions.of(config.megatron, device=device)
        tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
        self.architecture: Architecture = read_architecture(hf_config, tensor_parallel=tensor_parallel)
        self.config = transformer_config(
            hf_config, dtype=config.model.dtype, device=device, extra=self._options.transformer
        )
        self.device = (
            torch.device("cpu") if device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        )
        self.chunks = build_chunks(self.config, self.architecture, device=device)
        """This rank's parts of the model: several with virtual pipeline stages."""
        mark_split_params(self.chunks, self.architecture)
        self._head: LogprobHead | None = None
        for chunk in self.chunks:
            prepare(chunk)
            if chunk.post_process:
                self._head = self._make_head(chunk)
        self._wrapped = [self._wrap(chunk, first=index == 0) for index, chunk in enumerate(self.chunks)]
        self.config.no_sync_func = no_sync(self._wrapped)
        self.replay: RoutingReplay | None = None
        """Set to let the routers of experts choose what the engine chose."""
        self.sharing = Sharing()
        """What updates computed on this rank, and would have without shared prefixes; whoever reads it starts anew."""
        self._pack = partial(pack, device=self.device)
        self._optimizer_config = optimizer
        self._bad_samples: list[str] = []
        self.optimizer: Any = None

    def _make_head(self, chunk: GPTModel) -> LogprobHead:
        """What answers requests in place of the output layer of the last chunk."""
        return LogprobHead(chunk, vocab_size=self.architecture.vocab_size)

    def build_optimizer(self) -> None:
        """Make the optimizer; in bfloat16 its float32 weights are taken from the model's, so load those before."""
        self.optimizer = make_optimizer(
            self._wrapped, self.config, self._optimizer_config, extra=self._options.optimizer
        )
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = self._finalize

    def score(
        self, samples: Sequence[TrainSample], *, temperature: float, what: str
    ) -> list[npt.NDArray[np.float32]]:
        """What the head says of each trainable token: a column [T] for each sample, in their order, 0 elsewhere.

        The same on all ranks that share a data-parallel rank's samples.

        Args:
            what: the head's numbers, for messages.

        Raises:
            FloatingPointError: one of them is not finite; names the sample. All ranks raise it.
        """
        batches = self._pack(samples)
        with torch.no_grad():
            found = run_schedule(
                self._wrapped,
                batches,
                partial(self._score_step, temperature=temperature),
                forward_only=True,
            )
        num_rows = [batch.num_rows for batch in batches]
        if not is_last_stage():
            found = [torch.empty(1, count, 1, device=self.device) for count in num_rows]
        values = from_last_stage(torch.cat(found, 1)).flatten()
        columns: dict[int, npt.NDArray[np.float32]] = {}
        for batch, part in zip(batches, values.split(num_rows), strict=True):
            for sample, column in zip(batch.samples, scatter_rows(batch, part), strict=True):
                columns[id(sample)] = column
        self.raise_together(
            [
                f"sample {sample.sample_id}: a {what} is not finite"
                for sample in samples
                if not np.isfinite(columns[id(sample)]).all()
            ]
        )
        return [columns[id(sample)] for sample in samples]

    def update(
        self,
        samples: Sequence[TrainSample],
        *,
        objective: Objective,
        counts: GlobalCounts,
        learning_rate: float,
    ) -> dict[str, float]:
        """One optimizer update over this rank's samples and those of all data-parallel ranks.

        Returns the metrics of the global batch, the same on every rank.

        Raises:
            FloatingPointError: a number that is not finite on a trainable token; names the sample. Or the gradient has
                exploded, and the optimizer's config says stop.
        """
        batches = self._pack(samples)
        self.sharing = sum((batch.sharing for batch in batches), self.sharing)
        self._bad_samples.clear()
        if self.replay is not None:
            self.replay.clear()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts: list[ObjectiveSums] = run_schedule(
            self._wrapped,
            batches,
            partial(self._train_step, objective=objective, counts=counts),
            forward_only=False,
        )
        outcome = step(self.optimizer, self._optimizer_config, learning_rate=learning_rate)
        metrics = object_from_last_stage(_reduce(parts, counts) if is_last_stage() else None)
        return {
            **metrics,
            "grad_norm": outcome.grad_norm,
            "skipped": float(outcome.skipped),
            "learning_rate": learning_rate,
        }

    def share_params(self) -> None:
        """Make the optimizer's float32 weights, each rank's share of them, the weights of the model."""
        for optimizer in self.optimizers:
            optimizer._copy_main_params_to_model_params()
        for chunk in self._wrapped:
            chunk.start_param_sync(force_sync=True)

    def raise_together(self, faults: Sequence[str]) -> None:
        """Raise what any rank found, on all of them: one that went on alone would wait for ever.

        Raises:
            FloatingPointError: one or more ranks have a fault.
        """
        num_faults = torch.tensor(float(len(faults)), device=self.device)
        dist.all_reduce(num_faults)
        if num_faults.item() == 0:
            return
        by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(by_rank, list(faults))
        # Ranks that share samples find the same.
        distinct = dict.fromkeys(fault for rank_faults in by_rank for fault in rank_faults)
        raise FloatingPointError("; ".join(distinct))

    @property
    def model(self) -> GPTModel:
        """The only chunk."""
        (chunk,) = self.chunks
        return chunk

    @property
    def optimizers(self) -> list[Any]:
        """Megatron-core's distributed optimizers, whose inner torch optimizers hold the state."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    @property
    def grad_buffers(self) -> list[Any]:
        """Megatron-core's buffers, each of the gradients and the weights of many trained parameters."""
        return [
            buffer for chunk in self._wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]

    def release(self) -> None:
        """Let weights, optimizer and process groups go once nobody refers to this engine; it cannot train any more.

        The optimizer's shards are views of the weights, whose hooks hold the wrapped model, whose config holds the
        optimizer: a circle through autograd's graph, where no garbage player looks.
        """
        self.optimizer = None
        self.config.grad_scale_func = self.config.finalize_model_grads_func = self.config.no_sync_func = None
        for chunk in self._wrapped:
            chunk.grad_accs.clear()

    def _wrap(self, chunk: GPTModel, *, first: bool) -> DistributedDataParallel:
        inner = Float16Module(self.config, chunk) if self.config.bf16 else chunk
        return DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **self._options.ddp}
            ),
            inner,
            # Buckets let communication begin early. What later chunks send is hidden behind the first one's work.
            disable_bucketing=not first,
        )

    def _run(
        self, chunk: torch.nn.Module, batch: PackedBatch, temperature: float, entropy: Entropy
    ) -> torch.Tensor:
        """A chunk's output: hidden states, or from the last one [1, M, 1 or 2] scores of this rank's rows."""
        if self.replay is not None:
            self.replay.begin(batch.routed_experts)
        if self._head is not None:
            self._head.ask(
                batch.rows, batch.targets, temperature=temperature, entropy=entropy, support=batch.support
            )
        return chunk(batch.input_ids, batch.position_ids, None, packed_seq_params=batch.sequences)

    def _of_all_rows(self, batch: PackedBatch, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, M, ...] of this rank's rows -> [1, N, ...] of all rows of the pack."""
        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return scores
        return spread_rows(scores.squeeze(0), batch.own_rows, batch.num_rows, group)[None]

    def _score_step(
        self, batches: Iterator[PackedBatch], chunk: torch.nn.Module, *, temperature: float
    ) -> tuple[torch.Tensor, Any]:
        """What Megatron-core's schedule calls for each chunk and micro-batch in a forward pass alone."""
        batch = next(batches)
        scores = self._run(chunk, batch, temperature, "none")
        return scores, lambda found, **_: self._of_all_rows(batch, found)

    def _train_step(
        self,
        batches: Iterator[PackedBatch],
        chunk: torch.nn.Module,
        *,
        objective: Objective,
        counts: GlobalCounts,
    ) -> tuple[torch.Tensor, Any]:
        """What it calls in an update."""
        batch = next(batches)
        entropy: Entropy = "gradient" if objective.entropy_coefficient > 0 else "value"
        scores = self._run(chunk, batch, objective.temperature, entropy)
        return scores, partial(self._loss, batch, objective, counts)

    def _loss(
        self, batch: PackedBatch, objective: Objective, counts: GlobalCounts, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ObjectiveSums]:
        logprobs, entropies = split_scores(self._of_all_rows(batch, scores))
        assert entropies is not None
        if counts.by_environment:
            result = self._evaluate_by_environment(batch, objective, counts, logprobs, entropies)
        else:
            tokens = token_batch(batch, objective, counts, logprobs, entropies)
            self._bad_samples.extend(find_bad_samples(batch, tokens))
            result = evaluate_objective(tokens, objective, counts)
        # The count would be a divisor of the gradient; ours is in the loss already, and `_finalize` ignores this one.
        return result.loss, torch.zeros((), dtype=torch.int, device=self.device), result

    def _evaluate_by_environment(
        self,
        batch: PackedBatch,
        objective: Objective,
        counts: GlobalCounts,
        logprobs: torch.Tensor,
        entropies: torch.Tensor,
    ) -> ObjectiveSums:
        parts = {}
        for name, (samples, rows) in rows_by_environment(batch).items():
            own = counts.by_environment[name]
            tokens = token_batch(samples, objective, own, logprobs[rows], entropies[rows])
            self._bad_samples.extend(find_bad_samples(samples, tokens))
            parts[name] = tokens
        if not parts:
            # A micro-batch of nothing but padding, whose gradient is 0 all the same.
            parts[next(iter(counts.by_environment))] = token_batch(
                batch, objective, counts, logprobs, entropies
            )
        return evaluate_by_environment(parts, objective, counts)

    def _finalize(
        self, model: list[torch.nn.Module], _num_tokens: torch.Tensor | None, **kwargs: Any
    ) -> None:
        """Sum the gradients over the data-parallel ranks, unless one of them has a number that is not finite."""
        self.raise_together(self._bad_samples)
        finalize_model_grads(model, None, **kwargs)


def _reduce(parts: Sequence[ObjectiveSums], counts: GlobalCounts) -> dict[str, float]:
    """Add the parts up over micro-batches and data-parallel ranks; means are over trainable tokens.

    Context-parallel ranks have computed the same: one of them counts.
    """
    group = parallel_state.get_data_parallel_group()
    names = list(parts[0].sums)
    sums = torch.stack([torch.stack([part.sums[name].double() for part in parts]).sum() for name in names])
    dist.all_reduce(sums, group=group)
    max_names = list(parts[0].maxima)
    maxima = torch.stack([torch.stack([part.maxima[name] for part in parts]).max() for name in max_names])
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
    totals = dict(zip(names, sums.tolist(), strict=True))
    num_tokens = totals.pop("num_tokens")
    assert num_tokens == counts.num_tokens, (
        f"the ranks trained on {num_tokens:.0f} tokens, the denominator of the update is {counts.num_tokens}"
    )
    by_environment = {}
    for environment, own in counts.by_environment.items():
        for name in FIGURES_BY_ENVIRONMENT:
            total = totals.pop(figure_of(environment, name))
            by_environment[figure_of(environment, name)] = (
                total if name == "loss" else total / max(own.num_tokens, 1)
            )
    loss = totals.pop("loss")
    means = {name: total / max(num_tokens, 1) for name, total in totals.items()}
    return {
        "loss": loss,
        **means,
        **by_environment,
        **dict(zip(max_names, maxima.tolist(), strict=True)),
        "num_tokens": num_tokens,
        "num_sequences": float(counts.num_sequences),
    }
