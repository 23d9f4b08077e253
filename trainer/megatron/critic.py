"""The critic as the trainer sees it: one `MegatronCritic` in a rank's process, beside the policy or alone.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from polyturn.configs.schema.trainer import OptimizerConfig, ParallelConfig, SharedPrefix
from polyturn.trainer.algorithms.objective import ObjectiveSums
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.algorithms.value_loss import value_loss
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.checkpoints.state import num_optimizer_steps
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.hf_directory import HFWeights, read_config
from polyturn.trainer.megatron.lora import BaseWeights
from polyturn.trainer.megatron.micro_batches import finite_columns, make_micro_batches
from polyturn.trainer.megatron.packed import PackedBatch, gather_rows
from polyturn.trainer.megatron.schedule import LearningRateSchedule
from polyturn.trainer.megatron.tree_attention import allow_trees
from polyturn.trainer.megatron.value_head import ValueHead, attach_value_head
from polyturn.trainer.megatron.weights import OUTPUT_WEIGHT, load_hf_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueObjective:
    """What an update of the critic minimises: the mean of its loss over the trainable tokens of the global batch."""

    clip: float | None = None
    """How far a value may move in one step before it stops to count; see `value_loss`."""
    temperature: float = 1.0
    """Values have none; what asks for logprobs asks for it."""
    entropy_coefficient: float = 0.0


class CriticEngine(Engine):
    """An engine whose model gives values, and whose loss is theirs."""

    def _make_head(self, chunk: Any) -> Any:
        assert isinstance(chunk.output_layer, ValueHead)
        return chunk.output_layer

    def _loss(
        self, batch: PackedBatch, objective: Any, counts: GlobalCounts, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, ObjectiveSums]:
        values = self._of_all_rows(batch, scores).flatten()
        returns = gather_rows(batch, [_column(sample, "returns") for sample in batch.samples])
        old_values = gather_rows(batch, [_column(sample, "values") for sample in batch.samples])
        self._bad_samples.extend(_find_bad_samples(batch, values, returns, old_values))
        token_loss = value_loss(
            values,
            returns,
            torch.ones_like(values, dtype=torch.bool),
            old_values=old_values,
            clip=objective.clip,
        )
        loss = token_loss.values.sum() / max(counts.num_tokens, 1)
        errors = (values.detach() - returns).abs()
        # Before a value has moved at all, rounding alone tells the clipped error from the plain one.
        moved = (values.detach() - old_values).abs() > (objective.clip or 0.0)
        result = ObjectiveSums(
            loss=loss,
            sums={
                "loss": loss.detach(),
                "num_tokens": torch.tensor(float(len(values)), device=values.device),
                "clip_fraction": (token_loss.clipped & moved).sum().float(),
                "error": errors.sum(),
                "value": values.detach().sum(),
                "return": returns.sum(),
            },
            maxima={"error_max": errors.max() if errors.numel() else errors.new_zeros(())},
        )
        return loss, torch.zeros((), dtype=torch.int, device=self.device), result


class MegatronCritic:
    """One rank of the value model. Every method is collective, as `MegatronPolicy`'s are."""

    def __init__(
        self,
        model_path: Path,
        *,
        dtype: str,
        device: str,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        megatron: Mapping[str, Any],
        max_tokens_per_gpu: int,
        total_updates: int | None = None,
        value_clip: float | None,
        seed: int,
        shared_prefix: SharedPrefix = "off",
    ) -> None:
        """Load the backbone of a Hugging Face directory and give it a new value head.

        The process must be a rank already: `join_ranks`, or a `MegatronPolicy` of the same layout, whose groups the
        critic then shares.

        Raises:
            ValueError: the directory cannot be used; one sentence says why.
        """
        hf_config = {**read_config(model_path), "tie_word_embeddings": False}
        self.parallel = parallel
        self._max_tokens = max_tokens_per_gpu
        self._objective = ValueObjective(clip=value_clip)
        self._schedule = LearningRateSchedule.from_config(optimizer, num_updates=total_updates)
        self._shared_prefix: SharedPrefix = shared_prefix
        prepare: Callable[[Any], None] = partial(_prepare, seed, shared_prefix)
        self.engine = CriticEngine(
            hf_config, dtype=dtype, device=device, optimizer=optimizer, megatron=megatron, prepare=prepare
        )
        architecture = self.engine.architecture
        output_names = architecture.family.rows[OUTPUT_WEIGHT].hf_names
        chunks: list[Any] = [BaseWeights(chunk, hidden="output_layer.") for chunk in self.engine.chunks]
        with closing(HFWeights(model_path, without=output_names)) as weights:
            load_hf_weights(chunks, architecture, weights)
        self.engine.build_optimizer()

    @property
    def num_updates(self) -> int:
        """Updates so far, those of the run that was resumed among them."""
        return num_optimizer_steps(self.engine)

    def values(self, samples: Sequence[TrainSample]) -> list[npt.NDArray[np.float32]]:
        """The values of this rank's samples, in their order.

        Entry t of a sample's column [T] is the value of all before token t; 0 where the token was not sampled.

        Raises:
            FloatingPointError: one of them is not finite; names the sample. All ranks raise it.
        """
        batches = self._pack(samples)
        found = [scores.flatten() for scores in self.engine.score(batches, temperature=1.0)]
        return finite_columns(self.engine, samples, batches, found, what="value")

    def train(self, samples: Sequence[TrainSample], *, global_counts: GlobalCounts) -> dict[str, float]:
        """One optimizer update; returns the metrics of the global batch, the same on every rank.

        Raises:
            FloatingPointError: a number on a trainable token is not finite; names the sample. All ranks raise it.
            ValueError: a sample has no values or returns.
        """
        objective: Any = self._objective
        return self.engine.update(
            self._pack(samples),
            objective=objective,
            counts=global_counts,
            learning_rate=self._schedule(self.num_updates),
        )

    def _pack(self, samples: Sequence[TrainSample]) -> list[PackedBatch]:
        return make_micro_batches(
            samples,
            max_tokens=self._max_tokens,
            parallel=self.parallel,
            device=self.engine.device,
            shared_prefix=self._shared_prefix,
        )


def _prepare(seed: int, shared_prefix: SharedPrefix, model: Any) -> None:
    """What is changed in a chunk of the model before it is wrapped."""
    attach_value_head(model, seed=seed)
    if shared_prefix == "tree":
        allow_trees(model)


def _column(sample: TrainSample, name: str) -> npt.NDArray[np.float32]:
    column: npt.NDArray[np.float32] | None = getattr(sample, name)
    if column is None:
        raise ValueError(f"sample {sample.sample_id} has no {name}, which the critic's loss needs")
    return column


def _find_bad_samples(batch: PackedBatch, *columns: torch.Tensor) -> list[str]:
    """A sentence for each sample with a value or return that is not finite."""
    bad = ~torch.isfinite(torch.stack([column.detach() for column in columns])).all(0)
    numbers = batch.sample_of_row[bad].unique().tolist()
    return [
        f"sample {batch.samples[number].sample_id}: a value or return is not finite" for number in numbers
    ]
