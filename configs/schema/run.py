"""Every option of a run, typed. Unknown keys are errors; the loader adds file, line and the nearest key.

The sections that all of a run shares are here with the checks between them, so that the module is long.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from polyturn.configs.dialects import check_dialect
from polyturn.configs.schema.agent import AgentConfig
from polyturn.configs.schema.alarms import AlarmsConfig
from polyturn.configs.schema.algorithm import AlgorithmConfig, EnvironmentAlgorithm
from polyturn.configs.schema.branching import NoBranching
from polyturn.configs.schema.concurrency import AdaptiveConcurrency
from polyturn.configs.schema.curriculum import CurriculumConfig
from polyturn.configs.schema.engines import EnginesConfig, ServedModel, ServersConfig, TeacherConfig
from polyturn.configs.schema.metrics import MetricsConfig
from polyturn.configs.schema.rollout import MinP, RolloutConfig, TopP
from polyturn.configs.schema.section import Section
from polyturn.configs.schema.supervised import SupervisedConfig
from polyturn.configs.schema.tasks import (
    EnvironmentReward,
    GroupRewardConfig,
    OptionalReward,
    RewardChoice,
    TaskSources,
)
from polyturn.configs.schema.trainer import (
    BalanceConfig,
    CheckpointConfig,
    CriticConfig,
    LoraConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    SharedPrefix,
    StopAt,
)
from polyturn.configs.schema.weight_sync import BroadcastSync, WeightSync
from polyturn.configs.sizing.hardware import GpuName


class EnvironmentConfig(Section):
    """Which environment the episodes play, and their limits."""

    id: str
    """A registered id, as `polyturn env list` shows them."""
    options: dict[str, Any] = {}
    """Keyword arguments of the environment's constructor."""
    tasks: TaskSources | None = None
    """In place of the environment's own tasks: a file's path, a source, or a list of such as a mixture."""
    train_split: str = "train"
    """The split whose tasks are trained on."""
    train_on_heldout: bool = False
    """Say true to train on a split that is held out by its name, or that the evaluation plays."""
    max_turns: PositiveInt = 8
    """An episode is truncated after so many assistant messages."""
    max_tokens_per_turn: PositiveInt = 256
    """The longest assistant message."""
    max_tokens_per_episode: PositiveInt = 4096
    """Prompt, observations and answers together."""
    episode_timeout_s: PositiveFloat = 600.0
    """An episode is truncated when its generation and its tool calls took so many seconds. Waiting for slots, engines
    that do not answer, setting up and grading do not count: they have deadlines of their own, and fail."""
    hook_timeout_s: PositiveFloat | None = None
    """Making an environment, its `begin`, `follow_up` and grade, and group rewards, each fail after so many seconds,
    and the episode is played again; null: as `episode_timeout_s`."""
    max_tool_calls_per_turn: PositiveInt | None = 32
    """Further calls of one message are not made, and the model is told; null: no limit."""
    max_tool_calls_per_episode: PositiveInt | None = 256
    """As `max_tool_calls_per_turn`, over all turns; an episode that calls again after it was told is truncated."""
    max_tool_result_chars: PositiveInt | None = 32_768
    """A longer result is cut in the middle and says so, where its tool sets no limit of its own; null: no limit."""


class ModelConfig(Section):
    """The policy's weights and tokenizer."""

    path: str
    """A Hugging Face directory, or `builtin:NAME` for one that the package ships; `preset:NAME`, a published model's
    shape, serves --dry-run."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights, in trainer and engines."""
    reference_path: str | None = None
    """The reference of a KL penalty, written like `path`; null: the weights that the run begins with."""
    dialect: str = "hermes"
    """How the model writes its actions: `hermes`, `json` or `pythonic` tool calls; the tags of a style of search
    (`search_r1`, `asearcher`, `r1_searcher`, `research`); a parser of SGLang (`sglang:NAME`, or with a reasoning parser
    `sglang:NAME/REASONING`); `module:Class` or `file.py:Class` of one's own; auto: as its chat template does."""
    malformed_calls: Literal["recover", "explain"] = "recover"
    """What becomes of a tool call with a slip that leaves one meaning, such as a comma too many: it is made, or the
    model is told."""
    template: Path | None = None
    """A chat template in place of the model's own, a Jinja file (docs/templates.md); the trained policy gets it too."""
    template_date: date | None = None
    """The day that a chat template is told that asks for it (`strftime_now`), such as 2026-01-31; null: that on which
    the run began, which a resume keeps."""
    template_options: dict[str, Any] = {}
    """Further variables of the chat template in every rendering, such as `enable_thinking: false`."""
    tool_prompt: Literal["auto", "template", "text"] = "auto"
    """Who writes tool specs, calls and results: the chat template, or Polyturn as text in system and user messages;
    auto: the template where it can."""
    history: Literal["template", "sampled"] = "template"
    """What becomes of earlier turns: what the chat template makes of them (where it rewrites them, as by dropping
    thoughts, the episode goes on in a new segment), or what they were when they were sampled."""

    @field_validator("dialect")
    @classmethod
    def _dialect_exists(cls, dialect: str) -> str:
        check_dialect(dialect)
        return dialect


class TrainerConfig(Section):
    """The optimisation."""

    num_steps: PositiveInt
    """Steps of the run: episodes, updates, weight sync."""
    stop_at: StopAt | None = None
    """End the run earlier, when a metric has come so far."""
    global_batch_size: PositiveInt
    """Episodes per optimizer update, over all ranks."""
    updates_per_step: PositiveInt = 1
    """Optimizer updates of one step."""
    max_tokens_per_gpu: PositiveInt = 8192
    """Tokens packed into one forward pass of a rank; with context parallelism a micro-batch holds so many for each
    context-parallel rank. A longer sample makes a micro-batch of its own."""
    device: Literal["cpu", "cuda"] = "cuda"
    """What the trainer's ranks run on."""
    max_restarts: NonNegativeInt = 3
    """How often in a row, without a new checkpoint in between, the trainer's ranks are started again within the run
    when one of them has died; then the run ends."""
    threads_per_rank: PositiveInt = 1
    """CPU threads of a rank."""
    balance: BalanceConfig = BalanceConfig()
    shared_prefix: SharedPrefix = "off"
    """Samples that begin alike: each by itself, gathered in one micro-batch (`group`), or there with what they share
    computed once (`tree`). Gradients are the same."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    algorithm_by_environment: list[EnvironmentAlgorithm] = []
    """Environments of a mixture whose episodes are trained by an algorithm of their own; the loss is the weighted sum
    of theirs and of that of all others together."""
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()

    @property
    def own_algorithms(self) -> dict[str, AlgorithmConfig]:
        """By the ids of environments that have one of their own, the whole algorithm."""
        return {own.environment: own.over(self.algorithm) for own in self.algorithm_by_environment}

    @property
    def algorithms(self) -> list[AlgorithmConfig]:
        """All that episodes are trained by: that of environments without one of their own, then theirs."""
        return [self.algorithm, *self.own_algorithms.values()]

    @property
    def needs_reference(self) -> bool:
        """Whether any of them needs the logprobs of a frozen reference policy."""
        return any(algorithm.needs_reference for algorithm in self.algorithms)

    @property
    def total_updates(self) -> int:
        """Optimizer updates of the whole run."""
        return self.num_steps * self.updates_per_step

    lora: LoraConfig | None = None
    """Train adapters in place of the weights; `{}` takes the defaults. The reference is the policy without them."""
    refresh_reference_every_steps: NonNegativeInt = 0
    """Make the policy the reference after every so many steps; 0: the reference stays what it is."""
    critic: CriticConfig = CriticConfig()
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _profiled_ranks_and_steps_exist(self) -> Self:
        num_ranks, profile = self.parallel.world_size, self.profile
        for rank in profile.ranks if profile.steps else []:
            if rank >= num_ranks:
                raise ValueError(
                    f"profile.ranks: there is no rank {rank}; the policy has {num_ranks}, counted from 0"
                )
        for step in profile.steps:
            if step > self.num_steps:
                raise ValueError(f"profile.steps: there is no step {step}; num_steps is {self.num_steps}")
        return self

    @model_validator(mode="after")
    def _own_algorithms_stand_beside_it(self) -> Self:
        names = [own.environment for own in self.algorithm_by_environment]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"algorithm_by_environment: {name!r} has two entries")
        for name, algorithm in self.own_algorithms.items():
            if getattr(algorithm.advantage, "needs_critic", False) != self.uses_critic:
                raise ValueError(
                    f"algorithm_by_environment: the advantage {algorithm.advantage.kind!r} of {name!r} and "
                    f"{self.algorithm.advantage.kind!r} of trainer.algorithm must both need a critic, or neither"
                )
        return self

    @model_validator(mode="after")
    def _trees_are_whole(self) -> Self:
        if self.shared_prefix == "tree" and self.parallel.context > 1:
            raise ValueError(
                "shared_prefix: tree needs whole sequences on a rank, and parallel.context divides them; "
                "use shared_prefix: group, which computes samples one by one, or parallel.context: 1"
            )
        return self

    @property
    def uses_critic(self) -> bool:
        """Whether there is a critic at all."""
        return bool(getattr(self.algorithm.advantage, "needs_critic", False))

    @property
    def critic_has_ranks(self) -> bool:
        """Whether there is a critic, in processes of its own."""
        return self.uses_critic and self.critic.placement == "own"

    def critic_warms_up(self, num_critic_updates: int) -> bool:
        """Whether the step that follows so many updates of the critic trains the critic alone."""
        return self.uses_critic and num_critic_updates < self.critic.warmup_steps * self.updates_per_step

    @property
    def num_ranks(self) -> int:
        """All processes that train a model: on GPUs, each has one."""
        return self.parallel.world_size + (self.critic.parallel.world_size if self.critic_has_ranks else 0)


EVALUATION_ENGINES = "evaluation"
"""What the engines of `evaluation.engines` are called among those beside the policy."""


class EvaluatedTasks(Section):
    """What is played in an evaluation, and how it is sampled."""

    split: str = "heldout"
    """The split whose tasks are played; never trained on."""
    tasks: TaskSources | None = None
    """The held-out tasks, written as `environment.tasks`; null: the split of that, or of the environment."""
    num_tasks: PositiveInt = 256
    """The first so many tasks of the split; all of them if there are fewer."""
    samples_per_task: PositiveInt = 1
    """Episodes of each task."""
    temperature: NonNegativeFloat = 1.0
    """Of the evaluation's episodes; 0 takes the likeliest token each time."""
    top_p: TopP = 1.0
    """As `rollout.sampling.top_p`, of the evaluation's episodes."""
    top_k: Literal[-1] | PositiveInt = -1
    """As `rollout.sampling.top_k`; nothing is recorded of an evaluation, so any number goes."""
    min_p: MinP = 0.0
    """As `rollout.sampling.min_p`."""


class EvaluationSuite(EvaluatedTasks):
    """A further held-out evaluation of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    """Its figures are `heldout/NAME/mean` and so on."""
    environment: EnvironmentConfig | None = None
    """What is played, and its limits; null: what is trained on."""
    reward: OptionalReward = None
    """What grades; null: what grades the training."""
    every_steps: NonNegativeInt | None = None
    """Evaluate after every so many steps; 0: only before and after; null: as `evaluation.every_steps`."""


class EvaluationConfig(EvaluatedTasks):
    """The held-out evaluation."""

    before: bool = True
    """Evaluate before the first step."""
    after: bool = True
    """Evaluate after the last step."""
    every_steps: NonNegativeInt = 0
    """Evaluate after every so many steps, too; 0: only before and after."""
    training_waits: Literal["until_done", "before_sync", "never"] | None = None
    """Episodes are played on beside an evaluation between steps. until_done: the next step is trained when it is done.
    before_sync: the next step is trained, and its weights wait for it. never: weights may change meanwhile, and the
    versions that answered are reported. null: never where `engines` are given, else until_done."""
    engines: ServersConfig | None = None
    """Engines for the evaluations alone, which take the newest weights when one begins and keep them until it ends, so
    that nothing waits; arguments as in `sglang`. null: evaluations are played on the run's engines."""
    suites: list[EvaluationSuite] = []
    """Further evaluations, by name, each with tasks and sampling of its own."""

    @field_validator("suites")
    @classmethod
    def _names_differ(cls, suites: list[EvaluationSuite]) -> list[EvaluationSuite]:
        names = [suite.name for suite in suites]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two suites have the name {name!r}")
        return suites

    @model_validator(mode="after")
    def _own_engines_keep_their_weights(self) -> Self:
        if self.engines is not None and self.training_waits == "before_sync":
            raise ValueError(
                "training_waits: before_sync keeps new weights from the run's engines, and the evaluations have their "
                "own; leave it out"
            )
        return self

    @property
    def waits(self) -> Literal["until_done", "before_sync", "never"]:
        """What `training_waits` comes to."""
        return self.training_waits or ("until_done" if self.engines is None else "never")

    @property
    def mixes_versions(self) -> bool:
        """Whether weights may change under an evaluation."""
        return self.waits == "never" and self.engines is None


class ChecksConfig(Section):
    """In-run checks. A failing check stops the run with one sentence; None turns one off."""

    enabled: bool = False
    """Whether any check runs."""
    max_initial_kl: PositiveFloat | None = 1e-6
    """Largest |policy KL| of the first update of a step, before any weight changed."""
    max_logprob_difference: PositiveFloat | None = None
    """Largest |trainer - engine| logprob of a sampled token."""
    weights_equal: bool = True
    """Compare a checksum of every tensor on both sides after each weight sync."""

    @property
    def compares_weights(self) -> bool:
        """Whether checksums are taken of what is sent."""
        return self.enabled and self.weights_equal


class LoggingConfig(Section):
    """What is shown while a run goes on."""

    progress: Literal["auto", "bar", "plain"] = "auto"
    """auto: a live display on a terminal, one line per step elsewhere."""
    token_credit: bool = True
    """Keep what a step made of each sampled token (the trainer's logprob, advantage, weight, whether it was bounded) in
    `token_credit/` of the run directory, for `polyturn view`; about 5 bytes a token."""


class ClusterConfig(Section):
    """Where the Ray actors run."""

    address: str | None = None
    """A Ray cluster to join, as `ray.init` takes it (`auto`, or host:port); None starts a private one here."""
    gpu: GpuName | None = None
    """The GPUs that memory is planned for; null: those of this machine, if it has any."""
    gpus_per_node: PositiveInt = 8
    """GPUs of a node of that cluster, where `hosts` does not say."""
    hosts: Path | None = None
    """A file of the nodes, a line each: `host`, `host slots=8` or `host:8`. The run keeps to them, in this order, and
    waits until they have joined; --dry-run plans for them. null: all nodes of the cluster."""
    start_timeout_s: PositiveFloat = 600.0
    """The run fails when the nodes have not joined by then, or do not give what it takes."""


class RunConfig(Section):
    """A training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Begins the run directory's name."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the order of prompts, the sampling and the initialisation."""
    output_dir: Path = Path("runs")
    """Where new run directories are made."""
    run_dir: Path | None = None
    """The run directory itself; None makes a new one in `output_dir`, or resumes the newest of this name."""
    resume: bool = False
    """Go on with an interrupted run from its newest checkpoint."""
    environment: EnvironmentConfig
    agent: AgentConfig | None = None
    curriculum: CurriculumConfig = CurriculumConfig()
    reward: RewardChoice = EnvironmentReward()
    group_rewards: list[GroupRewardConfig] = []
    model: ModelConfig
    rollout: RolloutConfig
    supervised: SupervisedConfig | None = None
    engines: EnginesConfig = EnginesConfig()
    teachers: list[TeacherConfig] = []
    """Models that the policy is distilled from."""
    judges: list[ServedModel] = []
    """Models that grade, by rewards of the kind `judge`."""
    trainer: TrainerConfig
    weight_sync: WeightSync = BroadcastSync()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    checks: ChecksConfig = ChecksConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    metrics: MetricsConfig = MetricsConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()
    sglang: dict[str, Any] = {}
    """Further arguments of the SGLang server, checked against the installed package's own."""
    megatron: dict[str, Any] = {}
    """Further fields of Megatron-core's TransformerConfig, checked against the installed package's own. Under `ddp`
    and `optimizer`, fields of its DistributedDataParallelConfig and OptimizerConfig."""

    @property
    def plays(self) -> bool:
        """Whether there are engines that its steps are played on."""
        return self.rollout.replay is None and self.supervised is None

    @model_validator(mode="after")
    def _one_source_of_steps(self) -> Self:
        if self.supervised is not None and self.rollout.replay is not None:
            raise ValueError(
                "supervised: rollout.replay gives the run its steps already; leave one of them out"
            )
        return self

    @property
    def served_models(self) -> list[ServedModel]:
        """The teachers, the judges, and the policy as evaluations have it; none where nothing is played."""
        return [*self.teachers, *self.judges, *self._evaluated_models] if self.plays else []

    @property
    def _evaluated_models(self) -> list[ServedModel]:
        engines, model = self.evaluation.engines, self.model
        if engines is None:
            return []
        return [
            ServedModel(
                name=EVALUATION_ENGINES,
                path=model.path,
                dtype=model.dtype,
                engines=engines,
                sglang=self.sglang,
            )
        ]

    @model_validator(mode="after")
    def _evaluations_on_engines_of_their_own_are_played(self) -> Self:
        if self.evaluation.engines is not None and not self.plays:
            raise ValueError("evaluation.engines: this run plays nothing; leave it out")
        return self

    @model_validator(mode="after")
    def _served_models_have_names_of_their_own(self) -> Self:
        names = [model.name for model in self.served_models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two teachers or judges have the name {name!r}"
                    if name != EVALUATION_ENGINES
                    else f"{name!r} is what the engines of evaluation.engines are called; choose another name"
                )
        return self

    @model_validator(mode="after")
    def _an_agent_is_not_branched(self) -> Self:
        if self.agent is not None and not isinstance(self.rollout.branching, NoBranching):
            raise ValueError(
                "rollout.branching: an agent of one's own (agent.target) cannot be taken back to a turn of another "
                "episode; set rollout.branching.kind: none"
            )
        return self

    @model_validator(mode="after")
    def _concurrency_can_follow(self) -> Self:
        concurrency, most = self.rollout.concurrency, self.rollout.max_concurrent_episodes
        if not isinstance(concurrency, AdaptiveConcurrency):
            return self
        if not self.asks_engines_directly:
            raise ValueError(
                "rollout.concurrency: adaptive must know on which engine an episode is; set "
                "engines.router.policy: sticky"
            )
        if concurrency.min_episodes > most:
            raise ValueError(
                f"rollout.concurrency.min_episodes ({concurrency.min_episodes}) must not be above "
                f"rollout.max_concurrent_episodes ({most})"
            )
        return self

    @model_validator(mode="after")
    def _others_find_the_weights(self) -> Self:
        if self.engines.updates == "external" and self.weight_sync.kind != "disk":
            raise ValueError(
                "engines.updates: external has others load the weights from a directory; set weight_sync.kind=disk"
            )
        return self

    @model_validator(mode="after")
    def _prefill_and_decode_rest_together(self) -> Self:
        if not self.engines.num_prefill:
            return self
        if self.rollout.sampling.is_restricted:
            raise ValueError(
                "engines.num_prefill: the router drops what rollout.sampling's top_p, top_k or min_p is replayed by"
            )
        if self.rollout.max_staleness or self.evaluation.mixes_versions:
            raise ValueError(
                "engines.num_prefill: weights are changed between prefill and decode of a request only where none is "
                "under way; set rollout.max_staleness: 0 and evaluation.training_waits: until_done"
            )
        return self

    @property
    def shares_gpus(self) -> bool:
        """Whether the engines, or some of them, are on the trainer's GPUs by turns."""
        return self.engines.num_sharing > 0 and self.plays

    @property
    def asks_engines_directly(self) -> bool:
        """Whether no router stands in front: Polyturn spreads the requests, or asks for what the router drops."""
        return (
            not self.engines.router.is_sglangs
            or self.engines.routing_replay
            or self.rollout.sampling.is_restricted
            or self.serves_adapters
        )

    @property
    def serves_adapters(self) -> bool:
        """Whether engines serve the base model with the policy's adapters, rather than the merged weights."""
        return self.weight_sync.kind == "adapter"

    @property
    def algorithm(self) -> AlgorithmConfig:
        """`trainer.algorithm` with what the ratio is against, where that depends on how old tokens may be.

        Against the sampler, what older tokens have taught already is not taught again: a policy that has moved beyond
        the clip range in the direction of an advantage since they were drawn gets no gradient from them.
        """
        return self._anchored(self.trainer.algorithm)

    @property
    def own_algorithms(self) -> dict[str, AlgorithmConfig]:
        """The same of each environment in `trainer.algorithm_by_environment`, by its id."""
        return {name: self._anchored(own) for name, own in self.trainer.own_algorithms.items()}

    @property
    def loss_weights(self) -> dict[str, float | None]:
        """Of the losses of those environments, by id; None: by their share of the tokens."""
        return {own.environment: own.weight for own in self.trainer.algorithm_by_environment}

    def _anchored(self, given: AlgorithmConfig) -> AlgorithmConfig:
        is_open = getattr(given.loss, "anchor", "proximal") is None
        if not (is_open and self.rollout.max_staleness):
            return given
        if any(getattr(correction, "weighs", True) for correction in given.corrections):
            return given
        return given.model_copy(update={"loss": given.loss.model_copy(update={"anchor": "behavior"})})

    @model_validator(mode="after")
    def _the_trainer_scores_what_the_engines_draw_from(self) -> Self:
        checks = self.checks
        if (
            self.rollout.kv_after_update == "keep"
            and checks.enabled
            and checks.max_logprob_difference is not None
        ):
            raise ValueError(
                "checks.max_logprob_difference cannot hold with rollout.kv_after_update: keep, where tokens are drawn "
                "from what older weights have computed; say null, or rollout.kv_after_update: recompute"
            )
        return self

    @model_validator(mode="after")
    def _engines_keep_up(self) -> Self:
        needed, given = self.weight_sync.every_steps - 1, self.rollout.max_staleness
        if given < needed:
            raise ValueError(
                f"weight_sync.every_steps {self.weight_sync.every_steps} leaves the engines up to {needed} steps "
                f"behind, and rollout.max_staleness allows {given}; set it to {needed} or more"
            )
        return self
