"""Proves a suite before a model sees it: its tasks can be solved, pay for nothing else, and are not trained on.

Scripts play some tasks of each entry as an evaluation does; what tasks say is compared over all of them.
"""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from polyturn.agents.episode import Episode
from polyturn.agents.episode_loop import play_messages
from polyturn.agents.policies.named import make_policy
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.suite import Accepted, CheckName
from polyturn.envs.messages import AssistantMessage, Task, TaskSource, script_of
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.rewards.answers import Where, place_answer
from polyturn.envs.tasks.order import source_digest
from polyturn.rollout.checks import check_rewards, check_tasks
from polyturn.rollout.collection import play_groups
from polyturn.rollout.engines.groups import judged
from polyturn.rollout.evaluation.duplicates import (
    Found,
    TaskText,
    answers_in_prompt,
    answers_of,
    duplicates,
    leaks,
    near_duplicates,
    other_answers,
)
from polyturn.rollout.factory import tasks_of
from polyturn.rollout.groups import Prompt
from polyturn.rollout.named_play import named_player
from polyturn.rollout.player import EpisodePlayer, RolloutError

FULL = 1.0 - 1e-6
"""What the oracle must score."""
MAX_COMPARED = 1_000_000
"""So many tasks of a split are compared, of a source that makes them without end `MAX_MADE`."""
MAX_MADE = 2_000
NUM_SHOWN = 3

Severity = Literal["fail", "look", "ok"]
Script = Literal["oracle", "nothing", "random", "gold"]
_FAILS: frozenset[CheckName] = frozenset({"oracle", "do_nothing", "random", "duplicates", "leaks"})
"""What refuses a suite. The rest is for somebody to look at, since what is published has it: a question with two
answers, a comparison that names both."""
_SAID: Mapping[CheckName, str] = {
    "oracle": "the oracle does not solve {n} of {of}",
    "do_nothing": "who says nothing solves {n} of {of}",
    "random": "the random player scores as much as an oracle, on {n} of {of}",
    "duplicates": "{n} of {of} stand there before",
    "leaks": "{n} of {of} are trained on",
    "other_answers": "{n} of {of} stand there before with another answer",
    "near_duplicates": "{n} of {of} are nearly the same as one before",
    "near_leaks": "{n} of {of} are nearly the same as one that is trained on",
    "gold_answer": "the right answer alone earns less than 1 on {n} of {of}",
    "answer_in_prompt": "{n} of {of} name an answer in the prompt",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found in one entry."""

    check: CheckName | Literal["tasks", "played", "not_compared"]
    """`tasks`: they cannot be had; `played`: episodes failed; `not_compared`: there is no training split."""
    severity: Severity
    """`ok`: it is known, and accepted."""
    num_tasks: int
    """Tasks of which it is so."""
    sentence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryProof:
    """What is known of one entry."""

    name: str
    environment: str
    split: str
    num_tasks: int = 0
    """Tasks that an evaluation plays, all of which are compared."""
    num_played: int = 0
    """Of those, the ones that scripts played."""
    num_training: int | None = None
    """Tasks of the training split that they were compared with; None: there is none."""
    scores: Mapping[Script, float] = field(default_factory=dict)
    """The mean of each script that could play. `gold` is told the right answer and does nothing but give it."""
    counts: Mapping[CheckName, int] = field(default_factory=dict)
    """Tasks by check."""
    findings: tuple[Finding, ...] = ()
    """What is not well, the worst first."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong that was not accepted."""
        return all(finding.severity != "fail" for finding in self.findings)


def validate_entry(
    name: str,
    config: RunConfig,
    *,
    num_played: int,
    success_score: float = 1.0,
    has_oracle: bool = True,
    accepts: Sequence[Accepted] = (),
) -> EntryProof:
    """Look at one entry of a suite.

    Args:
        name: What reports call it.
        config: What it is played by.
        num_played: So many tasks are played, spread evenly over those that an evaluation plays.
        success_score: A score that makes a success.
        has_oracle: Whether the environment's oracle solves every task.
        accepts: What is known to be odd.
    """
    split = config.evaluation.split
    proof = EntryProof(name=name, environment=config.environment.id, split=split)
    try:
        check_rewards(config)
        source = tasks_of(config, split)
        check_tasks(config, source)
        texts = _texts(source, min(config.evaluation.num_tasks, len(source)))
    except ValueError as error:
        return replace(proof, findings=(_broken("tasks", str(error)),))
    training, told = _training(config, source)
    counted = _compare(texts, training)
    played = _spread(len(texts), num_played)
    with tempfile.TemporaryDirectory(prefix="polyturn-validate-") as scratch:
        scripts = _Scripts(config, source, played, success_score=success_score, has_oracle=has_oracle)
        scripts.play(Path(scratch))
    findings = [
        _finding(check, found, len(texts), accepts) for check, found in counted.items() if found.num_tasks
    ]
    findings += [
        _finding(check, found, len(played), accepts)
        for check, found in scripts.found.items()
        if found.num_tasks
    ]
    findings += [*told, *scripts.broken]
    ranks: list[Severity] = ["fail", "look", "ok"]
    return replace(
        proof,
        num_tasks=len(texts),
        num_played=len(played),
        num_training=len(training) or None,
        scores=scripts.scores,
        counts={check: found.num_tasks for check, found in (counted | scripts.found).items()},
        findings=tuple(sorted(findings, key=lambda finding: ranks.index(finding.severity))),
    )


def _texts(source: TaskSource, num_tasks: int) -> list[TaskText]:
    is_made = getattr(source, "is_endless", False) or num_tasks > 10 * MAX_COMPARED
    return [
        TaskText.of(source[index]) for index in range(min(num_tasks, MAX_MADE if is_made else MAX_COMPARED))
    ]


def _training(config: RunConfig, evaluated: TaskSource) -> tuple[list[TaskText], list[Finding]]:
    """The tasks that are trained on, or what is said where there are none to compare with."""
    split = config.environment.train_split
    why = ""
    if split == config.evaluation.split:
        why = f"there is no split beside {split!r} to look for its tasks in"
    else:
        try:
            source = tasks_of(config, split)
        except ValueError as error:
            why = f"there is nothing to look for its tasks in: {error}"
        else:
            if source_digest(source) != source_digest(evaluated):
                return _texts(source, len(source)), []
            why = f"the split {split!r} has the same tasks: train on others"
    return [], [Finding(check="not_compared", severity="look", num_tasks=0, sentence=why)]


def _compare(texts: Sequence[TaskText], training: Sequence[TaskText]) -> dict[CheckName, Found]:
    found: dict[CheckName, Found] = {
        "duplicates": duplicates(texts),
        "other_answers": other_answers(texts),
        "near_duplicates": near_duplicates(texts),
        "answer_in_prompt": answers_in_prompt(texts),
    }
    if training:
        found |= {"leaks": leaks(texts, training), "near_leaks": near_duplicates(texts, training)}
    return found


def _spread(num_tasks: int, num_played: int) -> list[int]:
    count = min(num_tasks, num_played)
    return [place * num_tasks // count for place in range(count)]


def _finding(check: CheckName, found: Found, of: int, accepts: Sequence[Accepted]) -> Finding:
    sentence = _SAID[check].format(n=found.num_tasks, of=f"{of:,} tasks")
    shown = (f"{one} ({other})" if other else one for one, other in found.pairs[:NUM_SHOWN])
    sentence += f", such as {', '.join(shown)}"
    severity: Severity = "fail" if check in _FAILS else "look"
    for known in accepts:
        if known.check == check:
            accepted = found.num_tasks <= known.num_tasks
            severity = "ok" if accepted else "fail"
            sentence += f"; {known.num_tasks} are accepted: {known.why}"
    return Finding(check=check, severity=severity, num_tasks=found.num_tasks, sentence=sentence)


def _broken(check: Literal["tasks", "played"], sentence: str) -> Finding:
    return Finding(check=check, severity="fail", num_tasks=0, sentence=sentence)


class _Says:
    """Says one thing of each task, turn after turn."""

    max_at_once = None

    def __init__(self, label: str, say: Callable[[Task], str]) -> None:
        self.label = label
        self._say = say

    def check(self, env: PlayedEnv) -> None:
        """It plays any."""

    async def play(self, **episode: Any) -> Episode:
        """Play one episode."""
        message = AssistantMessage(content=self._say(episode["task"]))
        return await play_messages(policy=ScriptedPolicy(script_of(lambda: message)), **episode)

    async def aclose(self) -> None:
        """It holds nothing."""


class _Scripts:
    """What scripts score on some tasks of an entry. `found`, `scores` and `broken` are there once they have played."""

    def __init__(
        self,
        config: RunConfig,
        source: TaskSource,
        played: Sequence[int],
        *,
        success_score: float,
        has_oracle: bool,
    ) -> None:
        self._config = config
        self._tasks = [source[index] for index in played]
        self._prompts = [
            Prompt(task_index=index, epoch=0, position=index, group_id=f"valid{index:06d}")
            for index in played
        ]
        self._success = success_score
        self._has_oracle = has_oracle
        self.found: dict[CheckName, Found] = {}
        self.scores: dict[Script, float] = {}
        self.broken: list[Finding] = []

    def play(self, scratch: Path) -> None:
        """Play all of them."""
        try:
            with (
                judged(self._config, log_directory=scratch) as graded,
                closing(named_player(graded)) as player,
            ):
                asyncio.run(self._play(player))
        except ValueError as error:
            self.broken.append(_broken("played", str(error)))

    async def _play(self, player: EpisodePlayer) -> None:
        everything = range(len(self._prompts))
        if self._has_oracle:
            rewards = await self._rewards(player, "oracle", make_policy("oracle"), everything)
            self._score("oracle", rewards)
            self._find("oracle", {i: r for i, r in rewards.items() if r < FULL}, shows_reward=True)
        nothing = await self._rewards(player, "nothing", _Says("nothing", lambda _: ""), everything)
        self._score("nothing", nothing)
        self._find("do_nothing", {i: r for i, r in nothing.items() if r >= self._success})
        chance = await self._rewards(player, "random", make_policy("random"), everything)
        self._score("random", chance)
        all_paid = bool(chance) and fmean(chance.values()) >= FULL
        self._find("random", chance if all_paid else {})
        await self._play_gold(player)

    async def _play_gold(self, player: EpisodePlayer) -> None:
        """The right answer in each form in which answers are looked for; the best of them counts."""
        left = [index for index, task in enumerate(self._tasks) if answers_of(task.label)]
        best: dict[int, float] = {}
        forms: tuple[Where, ...] = ("all", "boxed", "tag")
        for form in forms:

            def say(task: Task, form: Where = form) -> str:
                return place_answer(answers_of(task.label)[0], form)

            rewards = await self._rewards(player, "gold", _Says("gold", say), left)
            best |= {i: max(r, best.get(i, -math.inf)) for i, r in rewards.items()}
            left = [index for index in left if best.get(index, 0.0) < FULL]
        self._score("gold", best)
        # Where no right answer is paid by itself, it is what is done that counts.
        unpaid = {i: r for i, r in best.items() if r < FULL}
        self._find("gold_answer", unpaid if len(unpaid) < len(best) else {}, shows_reward=True)

    async def _rewards(
        self, player: EpisodePlayer, name: Script, policy: Any, places: Sequence[int]
    ) -> dict[int, float]:
        """The reward of each task, by its place; tasks whose episode failed are missing, and told."""
        if not places:
            return {}
        errors: list[str] = []

        def note(episode: Episode) -> None:
            if episode.error is not None:
                errors.append(episode.error.partition("\n")[0])

        try:
            groups = await play_groups(
                player,
                [self._prompts[place] for place in places],
                samples_per_prompt=1,
                policy=policy,
                on_episode=note,
            )
        except RolloutError as error:
            why = f": {errors[-1]}" if errors and errors[-1] not in str(error) else ""
            self.broken.append(_broken("played", f"{name}: {error}{why}"))
            return {}
        lost = sum(group.num_dropped for group in groups)
        if lost:
            self.broken.append(
                _broken(
                    "played", f"{name}: {lost} of {len(groups)} episodes failed, such as with: {errors[-1]}"
                )
            )
        return {
            place: group.episodes[0].reward
            for place, group in zip(places, groups, strict=True)
            if group.episodes and group.episodes[0].reward is not None
        }

    def _score(self, name: Script, rewards: Mapping[int, float]) -> None:
        if rewards:
            self.scores[name] = fmean(rewards.values())

    def _find(self, check: CheckName, rewards: Mapping[int, float], *, shows_reward: bool = False) -> None:
        pairs = (
            (self._tasks[i].task_id, f"scores {r:g}" if shows_reward else "") for i, r in rewards.items()
        )
        self.found[check] = Found(pairs=tuple(pairs))
