"""The critic as the trainer sees it: one `MegatronCritic` in a rank's process, beside the policy or alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn import functional

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import SharedPrefix
from polyturn.trainer.algorithms.losses import value_loss
from polyturn.trainer.algorithms.objective import ObjectiveSums
from polyturn.trainer.algorithms.tokens import GlobalCounts
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.checkpoint_state import num_optimizer_steps
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.lora import BaseWeights
from polyturn.trainer.megatron.optimizer import LearningRateSchedule
from polyturn.trainer.megatron.packing import PackedBatch, make_micro_batches, rows_of
from polyturn.trainer.megatron.tree_attention import allow_trees
from polyturn.trainer.megatron.weights import OUTPUT_WEIGHT, load_hf_weights
from polyturn.trainer.models.hf_directory import HFWeights, read_config


class ValueHead(torch.nn.Module):
    """One number for each token that is asked for: the value of having read everything before it.

    The value of token t comes from the hidden state at t - 1, from which the policy predicts it. The head is whole on
    every tensor-parallel rank, and all of them compute all values. `ask` it before each forward pass; the output
    is [1, N, 1], float32.
    """

    def __init__(self, model: GPTModel, *, seed: int) -> None:
        """Draw the weight from N(0, 1 / (hidden size + 1)²), the same at any layout, and start the bias at 0."""
        super().__init__()
        config = model.config
        self._rows: torch.Tensor | None = None
        self._sequence_parallel = bool(config.sequence_parallel)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, config.hidden_size, generator=generator) / (config.hidden_size + 1)
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda")
        self.weight = torch.nn.Parameter(weight.to(device, config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=config.params_dtype, device=device))
        for param in (self.weight, self.bias):
            param.tensor_model_parallel = False  # type: ignore[attr-defined]
            param.partition_dim = -1  # type: ignore[attr-defined]
            param.partition_stride = 1  # type: ignore[attr-defined]

    def ask(self, rows: torch.Tensor, _targets: torch.Tensor, **_how: Any) -> None:
        """As `LogprobHead.ask`: what is predicted at a row makes no difference."""
        self._rows = rows

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, **_kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, H], of this rank's tokens under sequence parallelism -> [N, 1, 1]."""
        assert weight is None, "a value head shares no weight with the embedding"
        assert self._rows is not None, "the forward pass was not told which tokens to score"
        if self._sequence_parallel:
            # Every rank has the whole gradient: each takes its tokens' part of it.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        rows = hidden.squeeze(1).index_select(0, self._rows).float()
        return functional.linear(rows, self.weight.float(), self.bias.float())[:, None], None


def attach_value_head(model: GPTModel, *, seed: int) -> None:
    """Replace the output layer of the last pipeline stage, before anything wraps the model."""
    assert not model.share_embeddings_and_output_weights
    if model.post_process:
        model.output_layer = ValueHead(model, seed=seed)


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
        returns = rows_of(batch, "returns")
        old_values = rows_of(batch, "values")
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

    def __init__(self, config: RunConfig) -> None:
        """Load the backbone of a Hugging Face directory and give it a new value head.

        The process must be a rank already: of the critic's own layout (`join_ranks`), or of the policy's, whose groups
        the critic then shares.

        Raises:
            ValueError: the directory cannot be used; one sentence says why.
        """
        trainer, critic = config.trainer, config.trainer.critic
        model_path = resolve_model_path(critic.path or config.model.path)
        hf_config = {**read_config(model_path), "tie_word_embeddings": False}
        parallel = critic.parallel if trainer.critic_has_ranks else trainer.parallel
        shared_prefix: SharedPrefix = "group" if parallel.context > 1 else trainer.shared_prefix
        self._objective = ValueObjective(clip=critic.value_clip)
        self._schedule = LearningRateSchedule.from_config(critic.optimizer, num_updates=trainer.total_updates)
        self.engine = CriticEngine(
            hf_config,
            config,
            optimizer=critic.optimizer,
            pack=partial(
                make_micro_batches,
                max_tokens=critic.max_tokens_per_gpu or trainer.max_tokens_per_gpu,
                parallel=parallel,
                shared_prefix=shared_prefix,
            ),
            prepare=partial(_prepare, config.seed, shared_prefix),
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
        return self.engine.score(samples, temperature=1.0, what="value")

    def train(self, samples: Sequence[TrainSample], *, global_counts: GlobalCounts) -> dict[str, float]:
        """One optimizer update; returns the metrics of the global batch, the same on every rank.

        Raises:
            FloatingPointError: a number on a trainable token is not finite; names the sample. All ranks raise it.
            ValueError: a sample has no values or returns.
        """
        objective: Any = self._objective
        return self.engine.update(
            samples,
            objective=objective,
            counts=global_counts,
            learning_rate=self._schedule(self.num_updates),
        )


def _prepare(seed: int, shared_prefix: SharedPrefix, model: Any) -> None:
    """What is changed in a chunk of the model before it is wrapped."""
    attach_value_head(model, seed=seed)
    if shared_prefix == "tree":
        allow_trees(model)


def _find_bad_samples(batch: PackedBatch, *columns: torch.Tensor) -> list[str]:
    """A sentence for each sample with a value or return that is not finite."""
    bad = ~torch.isfinite(torch.stack([column.detach() for column in columns])).all(0)
    numbers = batch.sample_of_row[bad].unique().tolist()
    return [
        f"sample {batch.samples[number].sample_id}: a value or return is not finite" for number in numbers
    ]
