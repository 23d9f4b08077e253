"""A run that is fine-tuned on rows: its config, what must hold for it, and what is told of its steps."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.algorithm import AlgorithmConfig, NoAdvantage
from polyturn.configs.schema.branching import NoBranching
from polyturn.configs.schema.objective import SupervisedLoss
from polyturn.configs.schema.rollout import SamplingConfig
from polyturn.configs.schema.run import EvaluationConfig, RunConfig
from polyturn.configs.schema.supervised import SupervisedConfig
from polyturn.configs.schema.trainer import CriticConfig

KEY = "supervised"
OF_SAMPLING = (
    "offpolicy/",
    "correction/",
    "staleness/",
    "policy/staleness_max",
    "train/initial_kl",
    "train/policy_kl",
    "train/behavior_kl",
    "train/clip_fraction",
    "train/logprob_difference_max",
    "advantage/",
    "reward/",
    "success/",
    "outcome/",
    "tool/",
    "episode/tool",
    "episode/recovered_calls",
    "group/",
    "ledger/lost_tokens",
    "rollout/",
    "sync/",
    "truncated/",
    "shaping/",
)
"""Figures that compare a policy with what it sampled, and mean nothing of rows that nobody sampled."""


def supervised_run(config: RunConfig, num_rows: int, *, num_steps: int | None = None) -> RunConfig:
    """The config by which a recipe is fine-tuned on so many rows.

    A step has a row for each episode that the recipe trains on in one (fewer where there are fewer rows), and the
    steps are those of all epochs. The algorithm is cross-entropy over the mean of all taught tokens, at temperature 1.

    Args:
        num_steps: End after so many.

    Raises:
        ConfigError: there are not so many steps in the epochs.
    """
    section = _section(config)
    per_step = min(config.trainer.global_batch_size * config.trainer.updates_per_step, num_rows)
    updates = config.trainer.updates_per_step if per_step % config.trainer.updates_per_step == 0 else 1
    most = math.ceil(num_rows * section.epochs / per_step)
    if num_steps is not None and num_steps > most:
        raise ConfigError(
            f"trainer.num_steps is {num_steps}, and {num_rows:,} rows in {section.epochs} epoch(s) of {per_step} a "
            f"step are {most} steps; raise supervised.epochs"
        )
    trainer = config.trainer.model_copy(
        update={
            "num_steps": num_steps or most,
            "global_batch_size": per_step // updates,
            "updates_per_step": updates,
            "algorithm": AlgorithmConfig(
                advantage=NoAdvantage(kind="none"),
                loss=SupervisedLoss(kind="supervised"),
                proximal="behavior",
            ),
            "algorithm_by_environment": [],
            "critic": CriticConfig(),
            "refresh_reference_every_steps": 0,
        }
    )
    rollout = config.rollout.model_copy(
        update={
            "prompts_per_step": per_step,
            "samples_per_prompt": 1,
            "max_staleness": 0,
            "branching": NoBranching(),
            "sampling": SamplingConfig(),
        }
    )
    evaluation = config.evaluation.model_copy(
        update={"before": False, "after": False, "every_steps": 0, "suites": []}
    )
    checks = config.checks.model_copy(update={"max_initial_kl": None, "max_logprob_difference": None})
    return config.model_copy(
        update={
            "trainer": trainer,
            "rollout": rollout,
            "evaluation": evaluation,
            "checks": checks,
            "group_rewards": [],
            "teachers": [],
        }
    )


def check_supervised(config: RunConfig) -> None:
    """Whether a config with the section is one that `supervised_run` made. Raises ConfigError."""
    _section(config)
    made = supervised_run(config, config.rollout.prompts_per_step)
    same = (
        made.trainer.algorithm == config.trainer.algorithm
        and config.rollout.samples_per_prompt == 1
        and _evaluates_nothing(config.evaluation)
    )
    if not same:
        raise ConfigError(
            f"{KEY}: a recipe is fine-tuned by `polyturn sft RECIPE --data FILE`, which sets the algorithm and the "
            "steps"
        )


def data_digest(config: RunConfig) -> str:
    """What tells the rows of a run from others: of the files' contents, wherever they lie."""
    section = _section(config)
    digest = hashlib.sha256()
    for path in (*section.data, *section.heldout):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"{KEY}: {path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]


def figures_of_supervised(row: Mapping[str, float]) -> dict[str, float]:
    """The figures of a step that mean something of rows."""
    return {name: value for name, value in row.items() if not name.startswith(OF_SAMPLING)}


def _section(config: RunConfig) -> SupervisedConfig:
    assert config.supervised is not None, "nothing is fine-tuned"
    return config.supervised


def _evaluates_nothing(evaluation: EvaluationConfig) -> bool:
    return not (evaluation.before or evaluation.after or evaluation.every_steps or evaluation.suites)
