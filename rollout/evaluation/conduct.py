"""A whole evaluation in a directory of its own: it is planned, played in one sitting or several, and reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Episode
from polyturn.agents.ledger import UNSAMPLED_VERSION
from polyturn.agents.policies.named import make_policy
from polyturn.configs.loading.suites import LoadedEntry, LoadedSuite
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.suite import Budget
from polyturn.envs.played_env import PlayedEnv
from polyturn.rollout.evaluation.control import answer_requests, sole_player
from polyturn.rollout.evaluation.directory import read_evaluation
from polyturn.rollout.evaluation.fingerprint import deciding, model_files, named_files, tasks_digest
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.evaluation.plan import EvaluationPlan, PlannedEntry, Player
from polyturn.rollout.evaluation.play import PlayedEntry, Sitting
from polyturn.rollout.evaluation.recorder import Recorder
from polyturn.rollout.evaluation.records import EvaluatedEntry, Evaluation, Failure, ScoredEpisode
from polyturn.rollout.evaluation.report import Report, report_of, scored_tasks
from polyturn.rollout.evaluation.report_files import write_report
from polyturn.rollout.evaluation.scoring import Prices
from polyturn.rollout.evaluation.statistics import interval
from polyturn.rollout.evaluation.who_plays import MODEL, Playable, WhoPlays, opened, served
from polyturn.rollout.factory import tasks_of
from polyturn.rollout.user_faults import share_of_user_faults


def plan_of(
    suite: LoadedSuite,
    who: WhoPlays,
    *,
    package: str,
    policy: str,
    options: Mapping[str, Any],
    model: Path | None = None,
    prices: Prices | None = None,
    source: str | None = None,
    overrides: Sequence[str] = (),
) -> EvaluationPlan:
    """What `evaluation.yaml` says: all that decides the result.

    Args:
        package: The version of Polyturn.
        policy: What was named as the policy, with its options.
        model: What was named as the model, where that is no Hugging Face directory itself.
        source: The suite or recipe that was named, and its overrides.

    Raises `ValueError` where tasks or policy cannot be had.
    """
    return EvaluationPlan(
        suite=suite.name,
        player=Player(
            name=policy,
            label=label_of(who, model=model),
            options=dict(options),
            model=None if who.model_path is None else str((model or who.model_path).absolute()),
            files={
                **named_files(policy, options),
                **({} if who.model_path is None else model_files(who.model_path)),
            },
            prices=None if prices is None else asdict(prices),
        ),
        package=package,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source,
        overrides=list(overrides),
        entries=[planned(entry) for entry in suite.entries],
    )


def planned(entry: LoadedEntry) -> PlannedEntry:
    """What the plan says of an entry. Raises `ValueError` where its tasks cannot be had."""
    config, settings = entry.config, entry.config.evaluation
    tasks = tasks_of(config, settings.split)
    num_tasks = min(settings.num_tasks, len(tasks))
    decides = deciding(config)
    return PlannedEntry(
        name=entry.name,
        environment=config.environment.id,
        split=settings.split,
        num_tasks=num_tasks,
        samples_per_task=settings.samples_per_task,
        success_score=entry.success_score,
        tasks_digest=tasks_digest(tasks, num_tasks),
        budget=entry.budget.model_dump(),
        config=config.model_dump(mode="json"),
        files=named_files(*(decides[name] for name in ("environment", "agent", "reward", "evaluation"))),
    )


def label_of(who: WhoPlays, *, model: Path | None = None) -> str:
    """Who plays, for people; `model` is as of `plan_of`. Raises `ValueError` where the policy cannot be had."""
    called = who.url or str(model or who.model_path)
    if who.name == MODEL:
        return called
    made_of = None if who.model_path is None else _Label(label=called)
    return make_policy(who.name, who.options, model=made_of).label


@dataclass(frozen=True, kw_only=True)
class _Label:
    """The model of a policy that is asked for nothing but what it is called."""

    label: str
    max_at_once: int | None = None

    def check(self, env: PlayedEnv) -> None:
        """It plays any."""

    async def play(self, *, env: PlayedEnv, limits: EpisodeLimits, **episode: Any) -> Episode:
        """Nobody asks it to."""
        del env, limits, episode
        raise AssertionError("it has a label alone")

    async def aclose(self) -> None:
        """It holds nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What a sitting counted of an entry beside its lines."""

    num_user_faults: int = 0
    versions: tuple[int, int] = (UNSAMPLED_VERSION, UNSAMPLED_VERSION)


@dataclass(frozen=True, kw_only=True, slots=True)
class Conducted:
    """How a sitting ended."""

    evaluation: Evaluation
    report: Report
    num_left: int
    """Episodes that were asked for and are not scored: failed, or not played."""
    was_stopped: bool
    tallies: Mapping[str, Tally]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watching:
    """Who is told of a sitting."""

    begin: Callable[[int], object] = lambda _: None
    """Called with the number of episodes that are to be played."""
    line: Callable[[ScoredEpisode], object] = lambda _: None
    """Called with each as it is written."""
    tell: Callable[[str], object] = lambda _: None
    """Called with sentences for people."""
    on_stop: Callable[[Callable[[], object]], object] = lambda _: None
    """Given what lets no further episode start, from whatever thread or signal handler."""


def conduct(
    directory: Path,
    plan: EvaluationPlan,
    configs: Sequence[RunConfig],
    who: WhoPlays,
    *,
    watching: Watching | None = None,
) -> Conducted:
    """Play what an evaluation lacks, write its report, and give both. Nothing starts where it lacks nothing.

    Args:
        directory: Holds `plan`.
        configs: One for each entry.

    Raises:
        EngineError, RolloutError: it cannot be played on; what is written stays, and the report is of that.
        ValueError: another process plays it, or what plays cannot be had.
    """
    watching = watching or Watching()
    prices = prices_of(plan)
    names = [entry.name for entry in plan.entries]
    tallies: dict[str, Tally] = {}
    was_stopped = False
    with sole_player(directory):
        try:
            with closing(Recorder(directory, names, prices=prices)) as recorder:
                left = [
                    (entry, config)
                    for entry, config in zip(plan.entries, configs, strict=True)
                    if _num_left(entry, recorder)
                ]
                watching.begin(sum(_num_left(entry, recorder) for entry, _ in left))
                if left:
                    was_stopped, tallies = _sit(directory, left, who, recorder, watching)
        finally:
            report = report_on(directory)
    evaluation = read_evaluation(directory)
    num_asked = sum(entry.num_asked for entry in evaluation.entries)
    num_scored = sum(
        episode.failure is Failure.NONE for entry in evaluation.entries for episode in entry.episodes
    )
    return Conducted(
        evaluation=evaluation,
        report=report,
        num_left=num_asked - num_scored,
        was_stopped=was_stopped,
        tallies=tallies,
    )


def prices_of(plan: EvaluationPlan) -> Prices | None:
    """What tokens cost; None: nobody said."""
    return None if plan.player.prices is None else Prices(**plan.player.prices)


def _num_left(entry: PlannedEntry, recorder: Recorder) -> int:
    """Episodes of an entry that have no score."""
    num_scored = sum(
        line.failure is Failure.NONE
        for (name, task_index, sample), line in recorder.lines.items()
        if name == entry.name and task_index < entry.num_tasks and sample < entry.samples_per_task
    )
    return entry.num_tasks * entry.samples_per_task - num_scored


def _sit(
    directory: Path,
    left: Sequence[tuple[PlannedEntry, RunConfig]],
    who: WhoPlays,
    recorder: Recorder,
    watching: Watching,
) -> tuple[bool, dict[str, Tally]]:
    """Play in one sitting; whether it was stopped, and what it counted."""
    configs = [config for _, config in left]
    with served(configs, who, log_directory=directory / "logs") as (at_judges, url):

        async def play() -> tuple[bool, dict[str, Tally]]:
            async with opened(at_judges, who, url) as playables:
                entries = [
                    _played(entry, playable) for (entry, _), playable in zip(left, playables, strict=True)
                ]
                sitting = Sitting(
                    entries,
                    recorder,
                    on_line=watching.line,
                    tell=watching.tell,
                    poll=partial(answer_requests, directory),
                )
                loop = asyncio.get_running_loop()
                watching.on_stop(lambda: loop.call_soon_threadsafe(sitting.stop))
                await sitting.play()
            counted = {
                entry.planned.name: Tally(num_user_faults=entry.num_user_faults, versions=entry.versions)
                for entry in entries
            }
            return sitting.was_stopped, counted

        return asyncio.run(play())


def _played(entry: PlannedEntry, playable: Playable) -> PlayedEntry:
    return PlayedEntry(
        planned=entry,
        player=playable.player,
        policy=playable.policy,
        budget=Budget.model_validate(entry.budget),
    )


def report_on(directory: Path) -> Report:
    """Write the files of the report of an evaluation as far as it has got, and give it."""
    evaluation = read_evaluation(directory)
    report = report_of(evaluation)
    write_report(directory, evaluation, report)
    return report


def result_of(entry: EvaluatedEntry, *, policy: str, tally: Tally | None = None) -> EvaluationResult:
    """How a policy did on one entry. Raises `ValueError` where no episode is scored."""
    tally = tally or Tally()
    tasks = [[episode.score or 0.0 for episode in task] for task in scored_tasks(entry)]
    episodes = [episode for task in scored_tasks(entry) for episode in task]
    if not episodes:
        why = next((episode.error for episode in entry.episodes if episode.error), "none was played")
        raise ValueError(f"{entry.name}: every episode failed, so there is nothing to score: {why}")
    found = interval(tasks)
    names = sorted({name for episode in episodes for name in episode.metrics})
    oldest, newest = tally.versions
    return EvaluationResult(
        mean=found.mean,
        low=found.mean if found.low is None else found.low,
        high=found.mean if found.high is None else found.high,
        method=found.method,
        num_tasks=len(tasks),
        num_episodes=len(episodes),
        num_failed=sum(episode.failure is not Failure.NONE for episode in entry.episodes),
        num_truncated=sum(episode.outcome == "truncated" for episode in episodes),
        mean_turns=fmean(episode.num_turns for episode in episodes),
        metrics={
            name: fmean(episode.metrics[name] for episode in episodes if name in episode.metrics)
            for name in names
        },
        user_fault_share=share_of_user_faults((each.metrics, each.score) for each in episodes) or 0.0,
        num_user_faults=tally.num_user_faults,
        oldest_version=oldest,
        newest_version=newest,
        policy=policy,
    )
