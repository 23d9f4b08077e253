"""The held-out evaluations of a run: what each plays, and when it is due."""

from __future__ import annotations

from dataclasses import dataclass

from polyturn.configs.schema.run import EvaluatedTasks, EvaluationConfig, EvaluationSuite, RunConfig

HELDOUT = "heldout"
"""Begins the name of every figure of an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """One evaluation."""

    name: str
    """Empty for the section `evaluation` itself."""
    config: RunConfig
    """The run's, with the environment, reward and evaluation of this one."""
    every_steps: int

    @property
    def prefix(self) -> str:
        """What its figures are under: `heldout`, or `heldout/NAME`."""
        return f"{HELDOUT}/{self.name}" if self.name else HELDOUT

    @property
    def title(self) -> str:
        """What people are told of: `held-out`, or `held-out NAME`."""
        return f"held-out {self.name}" if self.name else "held-out"

    @property
    def num_episodes(self) -> int:
        """At most: a split may have fewer tasks."""
        return self.config.evaluation.num_tasks * self.config.evaluation.samples_per_task

    def is_due(self, step: int) -> bool:
        """Whether it is played after a step."""
        return self.every_steps > 0 and step % self.every_steps == 0


def suites_of(config: RunConfig) -> list[Suite]:
    """The evaluations of a run: that of the section `evaluation`, and its suites."""
    main = config.evaluation
    return [
        Suite(name="", config=config, every_steps=main.every_steps),
        *(
            Suite(
                name=suite.name,
                config=_config_of(config, suite),
                every_steps=main.every_steps if suite.every_steps is None else suite.every_steps,
            )
            for suite in main.suites
        ),
    ]


def _config_of(config: RunConfig, suite: EvaluationSuite) -> RunConfig:
    played = suite.model_dump(include=set(EvaluatedTasks.model_fields))
    return config.model_copy(
        update={
            "environment": suite.environment or config.environment,
            "reward": suite.reward or config.reward,
            "evaluation": EvaluationConfig(**played),
        }
    )
