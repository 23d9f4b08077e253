"""Sections of the trainer: how ranks share a model and samples, what they optimise and how, the critic, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from polyturn.configs.schema.section import Section


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlace:
    """Where a rank stands on each axis of the layout."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    """The part of the experts that it holds."""


class ProfileConfig(Section):
    """torch's profiler on some ranks of the policy in some steps: `profile/step_000003_rank_0.json.gz` of the run
    directory, for ui.perfetto.dev. What is trained is the same."""

    steps: list[PositiveInt] = []
    """Which steps, scoring and updates."""
    ranks: list[NonNegativeInt] = [0]
    """Which ranks."""
    activities: list[Literal["cpu", "cuda"]] = ["cpu", "cuda"]
    """What is recorded; cuda only where the trainer is on GPUs."""
    record_shapes: bool = False
    """The shapes of each operation's inputs, too."""
    profile_memory: bool = False
    """What each operation allocates, too."""
    with_stack: bool = False
    """The lines of Python that each operation comes from, too; slow."""


class ParallelConfig(Section):
    """The layout of the trainer's ranks: tensor x context x data x pipeline of them."""

    tensor: PositiveInt = 1
    """Ranks that share each layer's weights. Above 1 they share the sequence, too, where a layer is not split."""
    pipeline: PositiveInt = 1
    """Stages that the layers are divided into."""
    virtual_pipeline: PositiveInt = 1
    """Chunks of layers on each pipeline stage. More of them shorten the pipeline's idle time."""
    context: PositiveInt = 1
    """Ranks that share the tokens of each sequence."""
    expert: PositiveInt = 1
    """Parts that a layer's experts are divided into, over ranks of the tensor, context and data axes."""
    expert_tensor: PositiveInt = 1
    """Ranks that share one expert's weights."""
    data: PositiveInt = 1
    """Copies of the model, each trained on a part of the batch."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline is {self.virtual_pipeline}, but pipeline is 1: chunks take turns on the stages of a "
                "pipeline, so set pipeline to at least 2 or virtual_pipeline to 1"
            )
        if self._stage_size % (self.expert * self.expert_tensor):
            raise ValueError(
                f"expert x expert_tensor = {self.expert} x {self.expert_tensor} must divide tensor x context x data = "
                f"{self.tensor} x {self.context} x {self.data}, the ranks of one pipeline stage"
            )
        return self

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self._stage_size * self.pipeline

    def place(self, rank: int) -> RankPlace:
        """Where a rank stands, as Megatron-core numbers them: tensor fastest, then context, data, pipeline.

        The experts are laid over the ranks of a stage by themselves: expert_tensor fastest, then expert.
        """
        assert 0 <= rank < self.world_size, rank
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        expert = rank % self._stage_size // self.expert_tensor % self.expert
        return RankPlace(tensor=tensor, context=context, data=data, pipeline=pipeline, expert=expert)

    def first_ranks(self) -> list[int]:
        """Of each data-parallel copy, in order, the first rank."""
        return [data * self.tensor * self.context for data in range(self.data)]

    def sequence_multiple(self) -> int:
        """What every sequence of a pack is padded to a multiple of: two chunks for each rank that shares it."""
        return 2 * self.context if self.context > 1 else 1

    def pack_multiple(self) -> int:
        """What the tokens of a pack must be a multiple of, so that each rank holds as many of them."""
        return self.tensor * self.sequence_multiple()

    def micro_batch_multiple(self) -> int:
        """What the number of micro-batches must be a multiple of: interleaved stages take so many in turn."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def describe(self) -> str:
        """The axes that are not 1, for people."""
        axes = (
            "tensor",
            "pipeline",
            "virtual_pipeline",
            "context",
            "expert",
            "expert_tensor",
            "data",
        )
        return (
            " x ".join(f"{axis} {getattr(self, axis)}" for axis in axes if getattr(self, axis) > 1)
            or "one rank"
        )

    @property
    def _stage_size(self) -> int:
        return self.tensor * self.context * self.data


Fraction = Annotated[float, Field(ge=0, le=1)]


class ConstantSchedule(Section):
    """The learning rate as it is, after the warm-up."""

    kind: Literal["constant"] = "constant"


class CosineSchedule(Section):
    """From the peak down along half a cosine (arXiv 1608.03983)."""

    kind: Literal["cosine"]
    num_updates: PositiveInt | None = None
    """The update at which it ends; None: the last one of the run."""
    final_fraction: Fraction = 0.1
    """Where it ends, as a fraction of the peak."""


class LinearSchedule(Section):
    """From the peak down along a straight line."""

    kind: Literal["linear"]
    num_updates: PositiveInt | None = None
    """The update at which it ends; None: the last one of the run."""
    final_fraction: Fraction = 0.0
    """Where it ends, as a fraction of the peak."""


class StableDecaySchedule(Section):
    """Warm-up, stable, decay: the peak until a straight line down at the end (arXiv 2404.06395)."""

    kind: Literal["wsd"]
    num_updates: PositiveInt | None = None
    """The update at which it ends; None: the last one of the run."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The part of all updates that the line down takes."""
    final_fraction: Fraction = 0.0
    """Where it ends, as a fraction of the peak."""


ScheduleChoice = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | StableDecaySchedule, Field(discriminator="kind")
]


class OptimizerConfig(Section):
    """AdamW with linear warm-up and a schedule."""

    learning_rate: PositiveFloat = 1e-6
    """The peak, which the warm-up ends at."""
    schedule: ScheduleChoice = ConstantSchedule()
    warmup_updates: NonNegativeInt = 0
    """Updates over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled from the gradient (AdamW)."""
    decay_vectors: bool = False
    """Whether norms and biases decay, too."""
    no_decay: list[str] = []
    """What does not decay either: patterns of Megatron-core's parameter names, such as `*word_embeddings*`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay of the squared gradient's running mean."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the squared gradient's mean."""
    clip_grad: PositiveFloat = 1.0
    """Largest global norm of the gradient; a longer one is scaled down to it."""
    max_grad_norm: PositiveFloat | None = None
    """A gradient whose norm, before it is clipped, is larger than this has exploded; so has one that is not finite."""
    on_exploding: Literal["stop", "skip"] = "stop"
    """stop ends the run; skip leaves weights and optimizer as they are and counts the update as skipped."""


class CriticOptimizerConfig(OptimizerConfig):
    """The critic's optimizer and learning rate."""

    learning_rate: PositiveFloat = 1e-5
    """After the warm-up."""


class CriticConfig(Section):
    """A value model for PPO (arXiv 1707.06347). Only used where `advantage` needs one (`ppo_gae`)."""

    path: str | None = None
    """The Hugging Face directory whose backbone it starts from, written like `model.path`; null: the policy's."""
    placement: Literal["shared", "own"] = "shared"
    """shared: in the processes of the policy's ranks, in their layout; own: ranks of its own, in `critic.parallel`."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout of ranks of its own."""
    optimizer: CriticOptimizerConfig = CriticOptimizerConfig()
    max_tokens_per_gpu: PositiveInt | None = None
    """Tokens packed into one forward pass of a rank; null: as many as the policy's."""
    value_clip: PositiveFloat | None = 0.2
    """The loss counts a value as moved by at most so much in one step, unless it moved away; null: any change."""
    warmup_steps: NonNegativeInt = 0
    """Steps at the beginning in which the critic is trained and the policy is not."""


class LoraConfig(Section):
    """LoRA (arXiv 2106.09685): W + alpha / rank · B A, with A and B trained and W frozen.

    Without dropout: the engines serve W + alpha / rank · B A, and the trainer computes the same.
    """

    rank: PositiveInt = 32
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 64.0
    """The product B A is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] = ()
    """The linear layers that get adapters, by the last part of their Hugging Face names (`q_proj`); empty: all of
    attention, MLP and shared experts. Routed experts get none."""

    def adapts(self, name: str) -> bool:
        """Whether a linear layer gets an adapter; `name` is that of its Hugging Face module."""
        return not self.target_modules or name.rpartition(".")[2] in self.target_modules

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank


class BalanceConfig(Section):
    """How the samples of an update are shared out over the data-parallel ranks, by what they cost."""

    method: Literal["greedy", "karmarkar_karp"] = "karmarkar_karp"
    """greedy gives the costliest sample to the lightest rank; karmarkar_karp evens out differences, mostly better."""
    attention_tokens: PositiveInt | None = None
    """The length at which a sample's attention costs as much as all other layers: about the parameters of a layer
    (the active ones) / (attention heads x head size). None: a sample costs its tokens."""


SharedPrefix = Literal["off", "group", "tree"]
"""off: every sample by itself. group: samples with a common prefix on one rank and in one micro-batch, each computed by
itself. tree: there, and the prefix computed once."""


class KeepBest(Section):
    """The checkpoint of the step that is best by a metric is kept, however old it grows; `best.json` names it."""

    metric: str
    """A key of `metrics.jsonl`, such as `heldout/mean` or `reward/mean`."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less is better; of equal ones the earlier is kept."""


class StopAt(Section):
    """The run ends, as after its last step, when a metric has come so far."""

    metric: str
    """A key of `metrics.jsonl`, such as `heldout/mean`."""
    at_least: FiniteFloat | None = None
    """It ends at this value or more."""
    at_most: FiniteFloat | None = None
    """It ends at this value or less."""

    @model_validator(mode="after")
    def _has_one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("stop_at takes a metric and either at_least or at_most")
        return self


class CheckpointConfig(Section):
    """When the run can be resumed from, and what it begins with."""

    every_steps: PositiveInt = 1
    """Steps between checkpoints; the last step always has one."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_best: KeepBest | None = None
    """Keep the best one, too."""
    asynchronous: bool = True
    """Write while the next step is played: a save then costs one copy of the state, in the memory of the host."""
    load: Path | None = None
    """What a new run begins with instead of `model.path`'s weights: a run, one of its checkpoints (with the optimizer's
    state), a torch_dist directory or a Hugging Face directory. An empty directory, into which nothing was saved yet:
    the weights at `model.reference_path`, if it is given."""
    load_optimizer: bool = True
    """Take the optimizer's state, too, if `load` is a checkpoint."""
