"""Held-out evaluations of a run as they are played, and the worker that plays them on engines of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from anyio.from_thread import start_blocking_portal

from polyturn.agents.episode import Episode
from polyturn.agents.policy import Policy
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.weight_sync import BroadcastSync
from polyturn.rollout.evaluation.held_out import EvaluationResult, Tell, evaluate
from polyturn.rollout.factory import build_player, evaluation_sampling, open_engines
from polyturn.rollout.player import RolloutError
from polyturn.rollout.store import write_episodes
from polyturn.rollout.suites import Suite


async def play_suite(
    suite: Suite,
    *,
    policy: Policy,
    model_path: Path,
    step: int,
    trajectories: Path,
    stop: asyncio.Event,
    on_episode: Tell | None = None,
) -> EvaluationResult | None:
    """Play an evaluation of a run, and write its episodes; None where it was stopped.

    Args:
        model_path: of the policy's tokenizer.
        step: the finished step whose weights play, for the file `trajectories`.
        on_episode: called with every attempt that ends.

    Raises:
        RolloutError: every episode failed.
    """
    settings = suite.config.evaluation
    episodes: list[Episode] = []

    def note(episode: Episode) -> None:
        episodes.append(episode)
        if on_episode is not None:
            on_episode(episode)

    # Opening tasks and a tokenizer, and closing environments, may take seconds.
    player = await asyncio.to_thread(
        build_player,
        suite.config,
        model_path=model_path,
        split=settings.split,
        sampling=evaluation_sampling(settings),
    )
    try:
        async with player.serves:
            result = await evaluate(
                player=player,
                policy=policy,
                num_tasks=settings.num_tasks,
                samples_per_task=settings.samples_per_task,
                on_episode=note,
                stop=stop,
            )
    except RolloutError:
        if stop.is_set():
            return None
        raise
    finally:
        await asyncio.to_thread(player.close)
    await asyncio.to_thread(write_episodes, trajectories, episodes, step=step)
    return result


def on_own_engines(config: RunConfig) -> RunConfig:
    """The config of a run whose engines are those of `evaluation.engines`: they serve whole weights, whatever the run's
    own are sent."""
    assert config.evaluation.engines is not None, "evaluations have engines of their own"
    servers = config.evaluation.engines.model_dump()
    own = EnginesConfig(**servers, request_timeout_s=config.engines.request_timeout_s)
    return config.model_copy(update={"engines": own, "weight_sync": BroadcastSync()})


class EvaluationWorker:
    """Plays evaluations through engines that play nothing else, in a thread of its own; a context manager.

    Its methods return at once, from any thread, but for `halt`.
    """

    def __init__(self, config: RunConfig, *, model_path: Path, urls: Sequence[str]) -> None:
        """`urls` are those of the engines of `evaluation.engines`."""
        self._config = on_own_engines(config)
        self._model_path = model_path
        self._urls = list(urls)
        self._is_asked_to_stop = False
        self._under_way: set[Future[Any]] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            engines = open_engines(self._config, model_path=self._model_path, url=self._urls)
            watch = stack.enter_context(self._portal.wrap_async_context_manager(engines))
            self._policy: Policy = watch.fleet
            self._stop = self._portal.call(asyncio.Event)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            self._end()

    def evaluate(
        self,
        suite: Suite,
        *,
        step: int,
        trajectories: Path,
        on_episode: Tell | None = None,
        after: Future[Any] | None = None,
    ) -> Future[EvaluationResult | None]:
        """Begin an evaluation; what comes of it, None where it was stopped. See `play_suite`.

        Args:
            on_episode: called in the thread of the worker.
            after: what has to have ended before; what it raises is raised.
        """

        async def play() -> EvaluationResult | None:
            if after is not None:
                await asyncio.shield(asyncio.wrap_future(after))
            return await play_suite(
                suite,
                policy=self._policy,
                model_path=self._model_path,
                step=step,
                trajectories=trajectories,
                stop=self._stop,
                on_episode=on_episode,
            )

        playing = self._portal.start_task_soon(play)
        self._under_way.add(playing)
        playing.add_done_callback(self._under_way.discard)
        return playing

    def stop(self) -> None:
        """End what is under way, and whatever is begun from now on. May be called from a signal handler."""
        self._is_asked_to_stop = True
        self._portal.start_task_soon(self._set_stop)

    def halt(self) -> None:
        """End what is under way; more may be begun afterwards."""
        self._end()
        if not self._is_asked_to_stop:
            self._stop = self._portal.call(asyncio.Event)

    def _end(self) -> None:
        self._portal.call(self._set_stop)
        for playing in list(self._under_way):
            playing.exception()

    async def _set_stop(self) -> None:
        self._stop.set()
