"""The answers of the HTTP API, by path: the same for the server and for an exported file.

Their shapes are those of `viewer/web/src/api.ts`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from polyturn import __version__
from polyturn.agents.episode import Episode
from polyturn.rollout.evaluation.compare import compare
from polyturn.rollout.evaluation.report import report_of
from polyturn.rollout.token_credit import (
    TokenCredit,
    read_all_token_credit,
    read_token_credit,
    token_credit_path,
)
from polyturn.viewer.catalogue import Catalogue, ViewedRun, summary_of
from polyturn.viewer.conversation import num_common, parts_at, shown_messages
from polyturn.viewer.curves import metrics_of
from polyturn.viewer.episode_sets import LEFT_OUT, EpisodeSet, StepPart
from polyturn.viewer.episode_table import (
    Selection,
    episode_page,
    episode_row,
    histogram,
    problems_of,
    rows_of,
    select,
    version_range,
)
from polyturn.viewer.parameters import NotThere, Parameters
from polyturn.viewer.plain_json import Json, finite
from polyturn.viewer.renderers import Renderer, renderer_of
from polyturn.viewer.run_files import alarms_of, held_out_results, read_object, seconds_of
from polyturn.viewer.step_rows import DamagedFile
from polyturn.viewer.token_columns import (
    Compared,
    mismatch_map,
    num_shared,
    segment_tree,
    token_page,
    turns_of,
)

MAX_GROUP = 256
NOT_STORED = " (groups, which are stored until the next checkpoint, and not shown after it)"
"""Behind why a filter took groups."""
"""Episodes of a group that are shown side by side."""
GROUP_CHARS = 20_000
NO_CREDIT = "the run did not record what its trainer made of each token (logging.token_credit)"


class Conflict(ValueError):
    """What was asked for cannot be answered as things stand; one sentence."""


class Answers:
    """Answers requests about the runs of a catalogue. Not for several threads at once."""

    def __init__(self, catalogue: Catalogue, *, renderers: Mapping[str, Renderer] | None = None) -> None:
        self._catalogue = catalogue
        self._renderers = renderers or {}
        self.policy: Json | None = None
        """Who plays turns on, as `Runs.policy` has it."""
        self._serial = 0
        self._session = secrets.token_hex(4)
        self._changes: dict[str, tuple[tuple[float, int], int]] = {}
        self._handlers: dict[str, Callable[[Parameters], Any]] = {
            "/api/runs": self.runs,
            "/api/run": self.run,
            "/api/metrics": self.metrics,
            "/api/steps": self.steps,
            "/api/step": self.step,
            "/api/episodes": self.episodes,
            "/api/group": self.group,
            "/api/episode": self.episode,
            "/api/tokens": self.tokens,
            "/api/mismatch": self.mismatch,
            "/api/report": self.report,
            "/api/compare": self.compare,
            "/api/live": self.live,
        }

    @property
    def paths(self) -> list[str]:
        """What can be asked for."""
        return list(self._handlers)

    def answer(self, path: str, parameters: Parameters) -> Any:
        """The answer, which `plain_json.dumps` takes.

        Raises:
            NotThere, BadParameter, Conflict: the answer is a sentence.
        """
        if path not in self._handlers:
            raise NotThere(f"there is no {path[:200]}")
        while True:
            try:
                return self._handlers[path](parameters)
            except DamagedFile as damage:
                # Once for each file at most: what is read of it from now on is in memory.
                self._catalogue.cache.distrust(damage.path)

    # ------------------------------------------------------------------------------------------------ runs

    def runs(self, parameters: Parameters) -> Json:
        del parameters
        self._catalogue.refresh()
        return {
            "runs": [summary_of(run) for run in self._catalogue.runs()],
            "problems": self._catalogue.problems,
            "policy": self.policy,
            "version": __version__,
        }

    def run(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        summary = read_object(run.path / "summary.json")
        rows = run.metrics.rows()
        versions = found if isinstance(found := summary.get("versions"), dict) else {}
        problems = []
        if run.metrics.num_damaged:
            problems.append(f"{run.metrics.path}: {run.metrics.num_damaged} lines are no rows of metrics")
        return {
            "summary": summary_of(run),
            "config": run.config()[0],
            "alarms": alarms_of(rows),
            "evaluations": held_out_results(run.path, summary, [one.name for one in run.sets.sets()]),
            "seconds": seconds_of(summary, rows),
            "versions": {str(name): str(value) for name, value in versions.items()},
            "problems": problems,
        }

    def metrics(self, parameters: Parameters) -> Json:
        runs = [self._catalogue.run(name) for name in dict.fromkeys(parameters.every("run"))]
        num_points = parameters.integer("points", 1_000, low=2, high=20_000)
        return metrics_of(runs, parameters.every("name"), num_points=num_points)

    def live(self, parameters: Parameters) -> Json:
        session, _, number = (parameters.text("cursor") or "").partition(".")
        is_ours = session == self._session and number.isascii() and number.isdigit() and len(number) < 16
        since = int(number) if is_ours else -1
        running = []
        self._catalogue.refresh()
        for run in self._catalogue.runs():
            mark = run.changed_at()
            if run.id not in self._changes or self._changes[run.id][0] != mark:
                self._serial += 1
                self._changes[run.id] = (mark, self._serial)
            if summary_of(run)["state"] == "running":
                running.append(run.id)
        changed = [run.id for run in self._catalogue.runs() if self._changes[run.id][1] > since]
        return {"cursor": f"{self._session}.{self._serial}", "changed": changed, "running": running}

    # ----------------------------------------------------------------------------------------------- steps

    def steps(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        one = run.sets.find(parameters.text("set"))
        return {"set": one.name, "steps": [_step_summary(run, one, step) for step in one.steps]}

    def step(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        one = run.sets.find(parameters.text("set"))
        step = parameters.integer("step", 0)
        parts = run.sets.parts(one, step)
        row = run.metrics.row(step) if one.kind == "train" else {}
        if not parts and not row:
            raise NotThere(f"nothing is kept of step {step}")
        reasons: dict[str, int] = {}
        for part in parts:
            for place in range(len(part.rows) if part.dropped else 0):
                if (why := part.why_dropped(place)) is not None:
                    reasons[why] = reasons.get(why, 0) + 1
        for name, value in row.items():
            for prefix in ("rollout/filtered/", "rollout/failed/"):
                if name.startswith(prefix) and finite(value):
                    reason = name.removeprefix("rollout/").replace("/", ": ")
                    if prefix == "rollout/filtered/" and LEFT_OUT not in reasons:
                        reason += NOT_STORED
                    reasons.setdefault(reason, int(value))
        rewards = select(parts, Parameters()).rewards()
        return {
            "summary": _step_summary(run, one, step),
            "histogram": histogram(rewards, num_bins=parameters.integer("bins", 20, low=1, high=1_000)),
            "dropped": reasons,
            "metrics": {name: finite(value) for name, value in row.items() if name != "step"},
            "problems": problems_of(parts),
        }

    # -------------------------------------------------------------------------------------------- episodes

    def episodes(self, parameters: Parameters) -> Json:
        return episode_page(self._run(parameters).sets, parameters)

    def group(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        one = run.sets.find(parameters.text("set"))
        group_id = parameters.required("group")
        selection = self._in_group(run, one, parameters, group_id)
        if not len(selection):
            raise NotThere(f"there is no group {group_id[:200]!r}")
        rows = rows_of(selection, one.name)
        whole = [
            (row, episode)
            for row, (part, place) in zip(rows, selection.places(), strict=True)
            if (episode := part.rows.episode(place)) is not None
        ]
        conversations = [episode.messages for _, episode in whole]
        firsts = [episode.segments[0].token_ids for _, episode in whole if episode.segments]
        rewards = np.array([row["reward"] for row in rows if row["reward"] is not None], dtype=np.float64)
        show = self.renderer_of(rows[0]["env_id"])
        return {
            "run": run.id,
            "set": one.name,
            "step": rows[0]["step"],
            "group_id": group_id,
            "task_id": rows[0]["task_id"],
            "env_id": rows[0]["env_id"],
            "episodes": [
                {
                    "row": {**row, **version_range([s.policy_versions[s.sampled] for s in episode.segments])},
                    "messages": shown_messages(
                        episode.messages, num_turns=episode.num_turns, show=show, max_chars=GROUP_CHARS
                    ),
                    "parts_at_message": parts_at(conversations[0], episode.messages),
                    "parts_at_token": _parts_at_token(whole[0][1], episode),
                }
                for row, episode in whole
            ],
            "num_common_messages": num_common(conversations),
            "num_common_tokens": min((num_shared(firsts[0], ids) for ids in firsts), default=0)
            if firsts and len(firsts) == len(whole)
            else None,
            "reward_mean": finite(rewards.mean()) if len(rewards) else None,
            "reward_std": finite(rewards.std()) if len(rewards) else None,
            "problems": [
                *problems_of(selection.parts),
                *(["an episode of the group is damaged"] if len(whole) < len(rows) else []),
            ],
        }

    def _in_group(self, run: ViewedRun, one: EpisodeSet, parameters: Parameters, group_id: str) -> Selection:
        only = Parameters([("group", group_id)])
        step = parameters.maybe_integer("step")
        for number in [step] if step is not None else reversed(one.steps):
            selection = select(run.sets.parts(one, number), only)
            if len(selection):
                return selection[np.arange(min(len(selection), MAX_GROUP))]
        return select([], only)

    def episode(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        one, part, place = self._place(run, parameters)
        episode = _whole(part, place)
        row = episode_row(part.rows.rows([place])[0], one.name, part.step, part.why_dropped(place))
        credit = self._credit(run, one, part.step, episode)
        group = self._in_group(run, one, Parameters([("step", str(part.step))]), episode.group_id)
        siblings = rows_of(group, one.name)
        return {
            "row": {**row, **version_range([s.policy_versions[s.sampled] for s in episode.segments])},
            "error": None if episode.error is None else episode.error[:GROUP_CHARS],
            "failed_part": episode.failed_part[:2_000] or None,
            "messages": shown_messages(
                episode.messages,
                num_turns=episode.num_turns,
                show=self.renderer_of(episode.env_id),
            ),
            "turns": turns_of(episode, credit),
            "segments": segment_tree(episode, part.rows.advantages(place)),
            "tools": [
                {"name": name[:200], **{key: finite(value) for key, value in asdict(usage).items()}}
                for name, usage in list(episode.tools.items())[:500]
            ],
            "role_rewards": {role: finite(value) for role, value in episode.role_rewards.items()},
            "group_reward": finite(episode.group_reward),
            "num_recovered_calls": episode.num_recovered_calls,
            "num_lost_tokens": episode.num_lost_tokens,
            "relatives": _relatives(siblings, episode),
            "siblings": [sibling["episode_id"] for sibling in siblings],
            "not_playable": None
            if self.policy is not None
            else "no policy is served; give one with --policy-url",
            "problems": problems_of([part]),
        }

    def tokens(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        one, part, place = self._place(run, parameters)
        episode = _whole(part, place)
        number = parameters.integer("segment", 0, high=2**31)
        if number >= len(episode.segments):
            raise NotThere(f"the episode has {len(episode.segments)} segments, and no segment {number}")
        return token_page(
            episode.segments[number],
            number,
            self._credit(run, one, part.step, episode).get(number),
            run.texts(),
            start=parameters.integer("start", 0),
            count=parameters.integer("count", 2_000, high=20_000),
        )

    def mismatch(self, parameters: Parameters) -> Json:
        run = self._run(parameters)
        last = parameters.integer("last", 50, low=1, high=1_000)
        train = run.sets.sets()[0] if run.kind != "evaluation" else None
        steps = train.steps if train is not None else ()
        kept = [step for step in steps if token_credit_path(run.path, step).exists()][-last:]
        return mismatch_map(
            ((step, self._credited(run, train, step)) for step in kept if train is not None), reason=NO_CREDIT
        )

    def _credited(self, run: ViewedRun, one: EpisodeSet, step: int) -> Iterator[Compared]:
        """The segments that a step was trained on, with what the trainer said of them."""
        credits = {
            (name, number): credit
            for name, number, credit in read_all_token_credit(token_credit_path(run.path, step))
        }
        for part in run.sets.parts(one, step):
            for name, number, sampled, logprobs in part.rows.behavior():
                if (name, number) in credits:
                    yield sampled, logprobs, credits[name, number]

    # ----------------------------------------------------------------------------------------- evaluations

    def report(self, parameters: Parameters) -> Json:
        run = self._evaluation(parameters.required("run"))
        return self._computed(lambda: asdict(report_of(run.evaluation())))

    def compare(self, parameters: Parameters) -> Json:
        a, b = (self._evaluation(parameters.required(name)) for name in ("a", "b"))
        return self._computed(lambda: asdict(compare(a.evaluation(), b.evaluation())))

    def _computed(self, compute: Callable[[], Json]) -> Json:
        try:
            return compute()
        except (ValueError, OSError, ArithmeticError, TypeError) as fault:
            raise Conflict(str(fault) or type(fault).__name__) from fault

    def _evaluation(self, identity: str) -> ViewedRun:
        run = self._catalogue.run(identity)
        if run.kind != "evaluation":
            raise Conflict(f"{run.id} is no evaluation")
        return run

    # ---------------------------------------------------------------------------------------------- finding

    def renderer_of(self, env_id: str) -> Renderer:
        """What shows the messages of an environment."""
        return renderer_of(env_id, self._renderers)

    def stored_episode(self, parameters: Parameters) -> tuple[ViewedRun, EpisodeSet, Episode]:
        """The episode that parameters name. Raises as `answer`."""
        run = self._run(parameters)
        one, part, place = self._place(run, parameters)
        return run, one, _whole(part, place)

    def _run(self, parameters: Parameters) -> ViewedRun:
        return self._catalogue.run(parameters.required("run"))

    def _place(self, run: ViewedRun, parameters: Parameters) -> tuple[EpisodeSet, StepPart, int]:
        """Where an episode stands. Raises `NotThere`."""
        one = run.sets.find(parameters.text("set"))
        identity, step = parameters.required("id"), parameters.maybe_integer("step")
        for number in [step] if step is not None else reversed(one.steps):
            for part in run.sets.parts(one, number):
                names = part.rows.column("episode_id").to_pylist()
                if identity in names:
                    return one, part, names.index(identity)
        raise NotThere(f"there is no episode {identity[:200]!r}")

    def _credit(self, run: ViewedRun, one: EpisodeSet, step: int, episode: Episode) -> dict[int, TokenCredit]:
        if one.kind != "train":
            return {}
        return read_token_credit(token_credit_path(run.path, step), episode.episode_id)


def _whole(part: StepPart, place: int) -> Episode:
    episode = part.rows.episode(place)
    if episode is None:
        raise Conflict("the episode is damaged: its bytes are not those that were written")
    return episode


def _parts_at_token(first: Episode, other: Episode) -> int | None:
    if not first.segments or not other.segments:
        return None
    one, two = first.segments[0].token_ids, other.segments[0].token_ids
    shared = num_shared(one, two)
    return shared if shared < max(len(one), len(two)) else None


def _relatives(siblings: Sequence[Json], episode: Episode) -> list[Json]:
    """The rows of its group that belong to one tree with it: its trunk, and the branches of that or of itself."""
    trunk = episode.parent_id or episode.episode_id
    return [
        {name: row[name] for name in ("episode_id", "parent_id", "branch_turn", "reward")}
        for row in siblings
        if row["episode_id"] != episode.episode_id and trunk in (row["episode_id"], row["parent_id"])
    ]


def _step_summary(run: ViewedRun, one: EpisodeSet, step: int) -> Json:
    parts = run.sets.parts(one, step)
    every = select(parts, Parameters())
    rewards = every.rewards()
    there = rewards[np.isfinite(rewards)]
    outcomes, counts = np.unique(every.texts("outcome").astype(str), return_counts=True)
    groups = every.texts("group_id").astype(str)
    turns = every.numbers("num_turns")
    row = run.metrics.row(step) if one.kind == "train" else {}
    return {
        "step": step,
        "num_episodes": len(every),
        "num_groups": len(np.unique(groups)),
        "reward_mean": finite(there.mean()) if len(there) else None,
        "reward_low": finite(there.min()) if len(there) else None,
        "reward_high": finite(there.max()) if len(there) else None,
        "num_uniform_groups": _num_uniform(groups, rewards),
        "outcomes": dict(zip(outcomes.tolist(), counts.tolist(), strict=True)),
        "num_tool_errors": int(np.nansum(every.numbers("num_tool_errors"))),
        "num_turns_mean": finite(turns.mean()) if len(turns) else None,
        "alarms": [
            name.removeprefix("alarm/") for name, value in row.items() if name.startswith("alarm/") and value
        ],
        "is_live": any(part.is_live for part in parts),
    }


def _num_uniform(groups: np.ndarray[Any, Any], rewards: np.ndarray[Any, Any]) -> int:
    """Groups of several rewards that are all the same."""
    there = np.isfinite(rewards)
    names, inverse, counts = np.unique(groups[there], return_inverse=True, return_counts=True)
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    np.minimum.at(low, inverse, rewards[there])
    np.maximum.at(high, inverse, rewards[there])
    return int(((counts > 1) & (low == high)).sum())
