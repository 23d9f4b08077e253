"""The rollout worker of a training run: an event loop, a policy behind the router, and the collectors."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from polyturn.agents.episode import Episode
from polyturn.agents.policy import Policy
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.tasks import draw_order
from polyturn.rollout.collector import Group, RolloutError
from polyturn.rollout.evaluation import EvaluationResult, evaluate
from polyturn.rollout.factory import (
    build_collector,
    evaluation_sampling,
    open_policy,
    training_sampling,
)
from polyturn.rollout.groups import Prompt, PromptCursor
from polyturn.rollout.store import TrajectoryStore, write_episodes

Value = TypeVar("Value")
OnEpisode = Callable[[Episode], None]


class RolloutWorker:
    """Plays training prompts and held-out tasks through one router; a context manager."""

    def __init__(self, config: RunConfig, *, model_path: Path, url: str | Sequence[str]) -> None:
        """`url` is the router's, or the engines'."""
        self._config = config
        self._model_path = model_path
        self._url = url
        self._runner = asyncio.Runner()
        self._open = AsyncExitStack()
        self._collector = build_collector(
            config,
            model_path=model_path,
            split=config.environment.train_split,
            sampling=training_sampling(config, model_path=model_path),
            with_group_rewards=True,
        )

    def __enter__(self) -> Self:
        self._stop = asyncio.Event()
        self._policy: Policy = self._run(
            self._open.enter_async_context(
                open_policy(self._config, model_path=self._model_path, url=self._url)
            )
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run(self._open.aclose())
        self._collector.close()
        self._runner.close()

    def stop(self) -> None:
        """Let no further episode start. May be called from a signal handler or another thread."""
        self._runner.get_loop().call_soon_threadsafe(self._stop.set)

    def cursor(self, position: int) -> PromptCursor:
        """The prompts of the training split from a position on."""
        tasks, seed = self._collector.tasks, self._config.seed
        return PromptCursor(len(tasks), seed=seed, position=position, order=draw_order(tasks, seed=seed))

    def prefetch(self, prompts: Sequence[Prompt]) -> None:
        """Read the tasks of prompts that are played later, in the background."""
        self._collector.prefetch(prompts)

    def collect(
        self, prompts: Sequence[Prompt], *, step: int, store: TrajectoryStore, on_episode: OnEpisode
    ) -> list[Group]:
        """The groups of a step. What the store has in its journal is not played again; what is played goes there."""
        return self._run(
            self._collector.collect(
                prompts,
                samples_per_prompt=self._config.rollout.samples_per_prompt,
                policy=self._policy,
                finished=store.journaled(step),
                keep=functools.partial(store.keep, step),
                on_episode=on_episode,
                stop=self._stop,
            )
        )

    def evaluate(self, *, step: int, trajectories: Path, on_episode: OnEpisode) -> EvaluationResult | None:
        """The held-out evaluation after `step`; None when it was stopped. Episodes go to `trajectories`."""
        settings = self._config.evaluation
        episodes: list[Episode] = []

        def keep(episode: Episode) -> None:
            episodes.append(episode)
            on_episode(episode)

        collector = build_collector(
            self._config,
            model_path=self._model_path,
            split=settings.split,
            sampling=evaluation_sampling(settings),
        )
        try:
            result = self._run(
                evaluate(
                    collector=collector,
                    policy=self._policy,
                    num_tasks=settings.num_tasks,
                    samples_per_task=settings.samples_per_task,
                    on_episode=keep,
                    stop=self._stop,
                )
            )
        except RolloutError:
            if self._stop.is_set():
                return None
            raise
        finally:
            collector.close()
        write_episodes(trajectories, episodes, step=step)
        return result

    def _run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        return self._runner.run(coroutine)
