"""The rollout worker of a training run: an event loop in a thread of its own, where episodes are played while the
driver trains.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from polyturn.agents.episode import Episode
from polyturn.agents.policy import Policy
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks import make_curriculum
from polyturn.envs.tasks.order import task_digest
from polyturn.rollout.branching import make_branching
from polyturn.rollout.engines.fleet import Ailment
from polyturn.rollout.engines.load import Loads
from polyturn.rollout.engines.membership import Membership
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.evaluation.worker import play_suite
from polyturn.rollout.factory import build_player, open_engines, training_sampling
from polyturn.rollout.filters import make_filter
from polyturn.rollout.groups import Prompt, PromptCursor, journal_of, position_of
from polyturn.rollout.limits import spare_what_stays
from polyturn.rollout.order import make_order
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.remote_players import RemotePlayers
from polyturn.rollout.scheduler import Scheduler, StepGroups
from polyturn.rollout.source import OnEpisode, RolloutStart, Standing
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.suites import Suite
from polyturn.rollout.waiting import Meanwhile, awaited, nothing

DRAIN_S = 60.0
"""How long what is under way has to end when the run is asked to stop."""
Value = TypeVar("Value")


class RolloutWorker:
    """The `StepSource` that plays training prompts, and held-out tasks, through engines; a context manager.

    Its methods are called by the driver's thread, and return when what they ask for is done.
    """

    _stop: asyncio.Event
    """Ends what is under way; another one after each `halt`."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model_path: Path,
        url: str | Sequence[str],
        engine_urls: Sequence[str] = (),
    ) -> None:
        """`url` and `engine_urls` as for `open_engines`.

        Raises `ValueError` where the config's parts cannot be had.
        """
        self._config = config
        self._model_path = model_path
        self._url, self._engine_urls = url, engine_urls
        self._order = make_order(config.rollout)
        self._filter = make_filter(config.rollout.filter)
        self._branching = make_branching(config.rollout, seed=config.seed)
        self._player: EpisodePlayer | RemotePlayers = build_player(
            config,
            model_path=model_path,
            split=config.environment.train_split,
            sampling=training_sampling(config, model_path=model_path),
            with_group_rewards=True,
            with_teachers=not config.rollout.num_workers,
        )
        self._serves = self._player.serves
        if config.rollout.num_workers:
            self._serves = nullcontext()
            self._player = RemotePlayers(self._player, config, model_path=model_path, url=url)
        self._scheduler: Scheduler | None = None
        self._on_episode: OnEpisode | None = None
        self._evaluating: set[asyncio.Task[Any]] = set()
        self._is_asked_to_stop = False
        self._thread = threading.Thread(target=self._run_loop, name="rollout", daemon=True)
        self._opened: Future[None] = Future()

    def __enter__(self) -> Self:
        self._thread.start()
        self._opened.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self._player.close()

    def begin(self, start: RolloutStart, store: TrajectoryStore) -> None:
        """Say where the run stands; episodes are played from the first `take` on.

        What the store has in its journals is not played again; what is played goes there.
        """
        tasks, config = self._player.tasks, self._config
        order = make_curriculum(config.curriculum, tasks, seed=config.seed)
        cursor = PromptCursor(len(tasks), seed=config.seed, order=order)
        if cursor.curriculum is not None and start.curriculum is not None:
            cursor.curriculum.restore(start.curriculum)
        if cursor.curriculum is not None:
            cursor.curriculum.keep_draws(store.draws_path)
        journals = _Journals(
            store,
            prompts_per_step=config.rollout.prompts_per_step,
            tasks=tasks if cursor.curriculum is not None else None,
        )

        def tell(episode: Episode) -> None:
            if self._on_episode is not None:
                self._on_episode(episode)

        async def make() -> Scheduler:
            return Scheduler(
                player=self._player,
                policy=self._policy,
                cursor=cursor,
                config=config.rollout,
                order=self._order,
                keep_group=self._filter,
                num_steps=config.trainer.num_steps,
                updates_per_step=config.trainer.updates_per_step,
                branching=self._branching,
                step=start.step,
                version=start.version,
                frontier=start.frontier,
                finished=journals.finished,
                keep=journals.keep,
                on_episode=tell,
                stop=self._stop,
            )

        self._scheduler = self._run(make())

    def take(self, *, on_episode: OnEpisode, meanwhile: Meanwhile = nothing) -> StepGroups | None:
        """See `StepSource`; `on_episode` is called in the thread of rollout."""
        self._on_episode = on_episode
        try:
            taking = asyncio.run_coroutine_threadsafe(self._running.take(), self._loop)
            return awaited(taking, meanwhile)
        finally:
            self._on_episode = None

    def advance(self, *, version: int, engine_step: int, engine_version: int) -> None:
        """A step is finished; see `Scheduler.advance`."""

        async def advance() -> None:
            self._running.advance(version=version, engine_step=engine_step, engine_version=engine_version)

        self._run(advance())

    def standing(self) -> Standing:
        """Where rollout stands, all of it at one moment."""

        async def stand() -> Standing:
            running = self._running
            curriculum = running.curriculum
            return Standing(
                frontier=running.frontier,
                curriculum=None if curriculum is None else curriculum.state(),
                figures={} if curriculum is None else curriculum.metrics,
            )

        return self._run(stand())

    def rest(self) -> None:
        """Let no further request begin; nobody's time runs until `go_on`."""
        self._loop.call_soon_threadsafe(self._running.collection.slots.may_request.clear)
        if isinstance(self._player, RemotePlayers):
            self._player.rest()

    def go_on(self) -> None:
        """End a rest."""
        self._loop.call_soon_threadsafe(self._running.collection.slots.may_request.set)
        if isinstance(self._player, RemotePlayers):
            self._player.go_on()

    def stop(self) -> None:
        """Let no further episode start. May be called from a signal handler or another thread."""

        def stop() -> None:
            self._is_asked_to_stop = True
            self._stop.set()

        self._loop.call_soon_threadsafe(stop)

    def drain(self) -> None:
        """Wait for what is under way, so that it is kept; what takes too long is given up."""
        if self._scheduler is not None:
            self._run(self._scheduler.close(drain_s=DRAIN_S))

    def halt(self, *, wait: bool) -> None:
        """See `StepSource`."""

        async def halt() -> None:
            await self._close_scheduler(drain_s=DRAIN_S if wait else 0.0)
            self._stop.set()
            if self._evaluating:
                await asyncio.wait(self._evaluating)
            self._stop = asyncio.Event()
            if self._is_asked_to_stop:
                self._stop.set()

        self._run(halt())

    def evaluate(
        self, suite: Suite, *, step: int, trajectories: Path, on_episode: OnEpisode | None = None
    ) -> Future[EvaluationResult | None]:
        """See `StepSource`; `on_episode` is called in the thread of rollout."""

        async def play() -> EvaluationResult | None:
            playing = asyncio.current_task()
            assert playing is not None
            self._evaluating.add(playing)
            playing.add_done_callback(self._evaluating.discard)
            return await play_suite(
                suite,
                policy=self._policy,
                model_path=self._model_path,
                step=step,
                trajectories=trajectories,
                stop=self._stop,
                on_episode=on_episode,
            )

        return asyncio.run_coroutine_threadsafe(play(), self._loop)

    def engine_figures(self) -> dict[str, float]:
        """Metrics of the engines since the last call."""

        async def take() -> dict[str, float]:
            player = self._player
            if not isinstance(player, RemotePlayers):
                return await self._watch.take_figures(())
            figures = await self._watch.take_figures(await player.take_traffic())
            return {**figures, "rollout/worker_deaths": float(player.num_deaths)}

        return self._run(take())

    def engine_loads(self) -> list[tuple[float, Loads]]:
        """See `StepSource`."""

        async def take() -> list[tuple[float, Loads]]:
            return self._watch.take_loads()

        return self._run(take())

    def set_engines(self, members: Membership) -> None:
        """From now on these engines are asked; returns at once, from any thread."""

        def tell() -> None:
            self._watch.set_engines(members)
            if isinstance(self._player, RemotePlayers):
                self._player.set_engines(members)

        self._loop.call_soon_threadsafe(tell)

    def ailments(self) -> dict[int, Ailment]:
        """By engine, what is the matter with those that failed their last requests; from any thread."""

        async def find() -> dict[int, Ailment]:
            found = dict(self._watch.ailments)
            others = await self._player.ailments() if isinstance(self._player, RemotePlayers) else ()
            for number, ailment in ((key, value) for other in others for key, value in other.items()):
                if number not in found or found[number].num_faults < ailment.num_faults:
                    found[number] = ailment
            return found

        return self._run(find())

    def num_requests(self) -> Counter[int]:
        """Under way, by engine; from any thread."""

        async def count() -> Counter[int]:
            found = Counter(self._watch.fleet.num_requests)
            others = await self._player.num_requests() if isinstance(self._player, RemotePlayers) else ()
            for other in others:
                found.update(other)
            return found

        return self._run(count())

    @property
    def _running(self) -> Scheduler:
        assert self._scheduler is not None, "rollout has not begun"
        return self._scheduler

    def _run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _run_loop(self) -> None:
        try:
            asyncio.run(self._live())
        except BaseException as fault:
            if self._opened.done():
                raise
            self._opened.set_exception(fault)

    async def _live(self) -> None:
        """Hold the policy open until the worker is closed."""
        self._loop = asyncio.get_running_loop()
        self._closing, self._stop = asyncio.Event(), asyncio.Event()
        engines = open_engines(
            self._config, model_path=self._model_path, url=self._url, engine_urls=self._engine_urls
        )
        async with engines as watch, self._serves:
            self._watch = watch
            self._policy: Policy = watch.fleet
            if isinstance(self._player, RemotePlayers):
                await self._player.wait_ready()
            with spare_what_stays():
                self._opened.set_result(None)
                await self._closing.wait()
                await self._close_scheduler()

    async def _close_scheduler(self, *, drain_s: float = 0.0) -> None:
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            await scheduler.close(drain_s=drain_s)
            if scheduler.curriculum is not None:
                scheduler.curriculum.close()


class _Journals:
    """What is kept of groups until a step is trained on them: in one journal for each step's worth of prompts."""

    def __init__(
        self, store: TrajectoryStore, *, prompts_per_step: int, tasks: TaskSource | None = None
    ) -> None:
        """With `tasks`, what is kept of another task than a prompt is of now is passed over."""
        self._store = store
        self._prompts_per_step = prompts_per_step
        self._tasks = tasks
        self._found: dict[int, dict[str, list[Episode]]] = {}

    def finished(self, prompt: Prompt) -> list[Episode]:
        """The attempts of a prompt that are kept."""
        number = self._number(prompt.position)
        if number not in self._found:
            by_group: dict[str, list[Episode]] = {}
            for episode in self._store.journaled(number):
                by_group.setdefault(episode.group_id, []).append(episode)
            # Those before are asked for no more, but for one or two that others overtook.
            self._found = {key: value for key, value in self._found.items() if value} | {number: by_group}
        found = self._found[number].pop(prompt.group_id, [])
        if self._tasks is None or not found:
            return found
        digest = task_digest(self._tasks[prompt.task_index])
        return [episode for episode in found if episode.task_digest == digest]

    async def keep(self, episode: Episode) -> None:
        """Keep an attempt."""
        await self._store.keep(self._number(position_of(episode.group_id)), episode)

    def _number(self, position: int) -> int:
        return journal_of(position, prompts_per_step=self._prompts_per_step)
