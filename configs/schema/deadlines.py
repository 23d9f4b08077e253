"""The deadlines of a run, and how they must stand to one another.

Each kind of time has an owner. Only the policy's own, `environment.episode_timeout_s`, can truncate an episode; the
deadlines of everything that it waits for end in an attempt that failed and is made again.
"""

from __future__ import annotations

from collections.abc import Iterator

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.tasks import JudgeReward, RemoteReward, RubricReward

MIN_INTERRUPTION_S = 600.0


def hook_timeout_s(config: RunConfig) -> float:
    """Of each hook of an environment that the policy does not cause."""
    return config.environment.hook_timeout_s or config.environment.episode_timeout_s


def interruption_timeout_s(config: RunConfig) -> float:
    """How long engines may abort what they are asked for: longer than they take for new weights."""
    return max(MIN_INTERRUPTION_S, 2 * getattr(config.weight_sync, "timeout_s", 0.0))


def stall_timeout_s(config: RunConfig) -> float:
    """By when one of all episodes under way must have ended: more than an episode can wait for any one thing.

    A queue moves as the requests in it end, so its own deadline is not part of this.
    """
    waits = config.engines.request_timeout_s + 2 * hook_timeout_s(config) + interruption_timeout_s(config)
    waits += max((teacher.request_timeout_s for teacher in config.teachers), default=0.0)
    return 2 * config.environment.episode_timeout_s + waits


def check_times(config: RunConfig) -> None:
    """Raise ConfigError, in one sentence, where a deadline can never be met or comes before one that it contains."""
    request_s, episode_s = config.engines.request_timeout_s, config.environment.episode_timeout_s
    if request_s >= episode_s:
        raise ConfigError(
            f"engines.request_timeout_s ({request_s:g}) must be below environment.episode_timeout_s ({episode_s:g}): a "
            f"request that an engine never answers must fail before its episode is out of time; set "
            f"engines.request_timeout_s={episode_s / 2:g}, say, or a longer environment.episode_timeout_s"
        )
    queue_s = config.rollout.queue_timeout_s
    if queue_s <= request_s:
        raise ConfigError(
            f"rollout.queue_timeout_s ({queue_s:g}) must be above engines.request_timeout_s ({request_s:g}): whoever "
            "waits for a slot waits for whole requests of others"
        )
    hook_s = hook_timeout_s(config)
    for key, deadline_s in _service_deadlines(config):
        if deadline_s >= hook_s:
            name = "environment.hook_timeout_s" if config.environment.hook_timeout_s else "episode_timeout_s"
            raise ConfigError(
                f"{key} ({deadline_s:g}) must be below environment.hook_timeout_s ({hook_s:g}, from {name}): grading "
                f"is over by then, and the service's own deadline would never come; set one of them anew"
            )


def _service_deadlines(config: RunConfig) -> Iterator[tuple[str, float]]:
    """The deadlines of the services that grade, with their keys."""
    for key, grader in [("reward", config.reward), *_rewards_of_tasks(config)]:
        if isinstance(grader, RemoteReward | JudgeReward):
            yield f"{key}.deadline_s", grader.deadline_s
        elif isinstance(grader, RubricReward):
            for index, part in enumerate(grader.parts):
                if isinstance(part.reward, RemoteReward | JudgeReward):
                    yield f"{key}.parts.{index}.reward.deadline_s", part.reward.deadline_s


def _rewards_of_tasks(config: RunConfig) -> Iterator[tuple[str, object]]:
    """What the sources of tasks declare for their rows."""
    for section in ("environment", "evaluation"):
        tasks = getattr(config, section).tasks
        sources = tasks if isinstance(tasks, list) else [tasks]
        for source in sources:
            for name, reward in getattr(source, "rewards", {}).items():
                yield f"{section}.tasks.rewards.{name}", reward
