"""Real files for the viewer: two runs of training and two evaluations, small, with everything that a page has to show.

`python -m tests.viewer.fixture DIR` writes them. Tokens are those of the shipped model, so that they can be read.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.configs.loading.loader import dump_config, load_config
from polyturn.envs.messages import Message
from polyturn.rollout.evaluation.directory import EpisodeLog, entry_directory, write_plan
from polyturn.rollout.evaluation.plan import EvaluationPlan, PlannedEntry, Player
from polyturn.rollout.evaluation.scoring import evaluation_prompt, scored
from polyturn.rollout.groups import episode_id
from polyturn.rollout.store import TrajectoryStore, write_episodes
from polyturn.rollout.token_credit import TokenCredit, token_credit_path, write_token_credit
from polyturn.tools.types import ToolUsage

MODEL = Path(__file__).parents[2] / "configs" / "models" / "tiny-searcher"
NUM_STEPS = 6
GROUPS_PER_STEP = 4
EPISODES_PER_GROUP = 4
HOSTILE_TEXTS = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x00\x08\x7f bell",
    "right-to-left: \u202eevil\u202c, zero width: a\u200bb\ufeffc, combining: Z\u0351\u036b\u0343",
    "{{constructor.constructor('return 1')()}} ${7*7} <!-- ]]> &lt;b&gt; \u2028 \u2029",
    "a" * 60_000,
)
PLACES = ("Zurich", "Lima", "Oslo", "Kyoto", "Accra", "Quito", "Turin", "Perth")


@dataclass(frozen=True, kw_only=True, slots=True)
class FixtureRun:
    """What was written."""

    folder: Path
    run: Path
    """Under way: its last step is in the journal. With branches, failures and hostile text."""
    other_run: Path
    """Finished."""
    evaluation: Path
    other_evaluation: Path


@dataclass(kw_only=True)
class _Script:
    """One episode while it is made up."""

    messages: list[Message] = field(default_factory=list)
    pieces: list[tuple[str, bool, int]] = field(default_factory=list)
    """A text, whether it was sampled, and its turn."""
    num_calls: int = 0
    num_errors: int = 0
    turn: int = 0

    def hear(self, message: Message) -> None:
        self.messages.append(message)
        self.pieces.append((f"{message['role']} {message['content'][:400]} ", False, self.turn))

    def say(
        self, content: str, *, reasoning: str | None = None, call: tuple[str, dict[str, Any]] | None = None
    ) -> None:
        message: Message = {"role": "assistant", "content": content}
        text = content[:400]
        if reasoning is not None:
            message["reasoning"] = reasoning
            text = f"<think>{reasoning[:400]}</think> {text}"
        if call is not None:
            name, arguments = call
            function = {"name": name, "arguments": arguments}
            message["tool_calls"] = [
                {"id": f"call_{self.num_calls}", "type": "function", "function": function}
            ]
            text += json.dumps(function)[:400]
            self.num_calls += 1
        self.messages.append(message)
        self.pieces.append((text, True, self.turn))
        self.turn += 1

    def result(self, name: str, content: str, *, ok: bool = True) -> None:
        self.num_errors += not ok
        self.hear(
            {"role": "tool", "name": name, "tool_call_id": f"call_{self.num_calls - 1}", "content": content}
        )


def write_fixture(folder: Path, *, seed: int = 0) -> FixtureRun:
    """Write all of it under `folder`."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    made = FixtureRun(
        folder=folder,
        run=folder / "search-20260101-120000",
        other_run=folder / "search-20260101-130000",
        evaluation=folder / "eval-base",
        other_evaluation=folder / "eval-trained",
    )
    _write_run(made.run, tokenizer, random.Random(seed), is_finished=False)
    _write_run(made.other_run, tokenizer, random.Random(seed + 1), is_finished=True)
    _write_evaluation(made.evaluation, tokenizer, random.Random(seed + 2), policy="base", skill=0.35)
    _write_evaluation(made.other_evaluation, tokenizer, random.Random(seed + 2), policy="trained", skill=0.75)
    return made


def _write_run(path: Path, tokenizer: Tokenizer, rng: random.Random, *, is_finished: bool) -> None:
    store = TrajectoryStore(path)
    path.mkdir(parents=True, exist_ok=True)
    config = load_config("quickstart").model_copy(update={"run_dir": path})
    (path / "config.yaml").write_text(dump_config(config))
    with (path / "metrics.jsonl").open("wb") as file:
        for step in range(1, NUM_STEPS + 1):
            is_under_way = step == NUM_STEPS and not is_finished
            groups = [list(_group(tokenizer, rng, step, place)) for place in range(GROUPS_PER_STEP)]
            episodes = [episode for group in groups for episode in group]
            for episode in episodes:
                store.journal(step, episode)
            if is_under_way:
                continue
            trained = [episode for episode in episodes if episode.outcome is not Outcome.FAILED]
            advantages = _advantages(trained)
            store.write_step(step, trained, advantages=advantages)
            write_token_credit(token_credit_path(path, step), _credit(rng, trained, advantages))
            file.write(orjson.dumps({"step": step, **_metrics(rng, step)}) + b"\n")
        if not is_finished:
            file.write(b'{"step": 6, "reward/me')
    store.close()
    evaluation = path / "evaluation"
    heldout = [episode for place in range(4) for episode in _group(tokenizer, rng, 0, place)][::4]
    write_episodes(evaluation / "before.parquet", heldout, step=0)
    result = {"suite": "heldout", "step": 3, "version": 3, "lag": 0, "mean": 0.5, "low": 0.3, "high": 0.7}
    (evaluation / "results.jsonl").write_bytes(
        orjson.dumps({**result, "num_tasks": 4, "num_episodes": 4}) + b"\n"
    )
    if is_finished:
        heldout_results = {"before": {"mean": 0.25, "low": 0.1, "high": 0.5, "num_tasks": 4}, "after": None}
        summary = {
            "status": "finished",
            "name": "search",
            "steps": NUM_STEPS,
            "heldout": heldout_results,
            "suites": {},
            "seconds": {"generate": 30.0, "tools": 4.0, "train": 22.5, "sync": 1.5, "total": 60.0},
            "versions": {"polyturn": "0.1.0"},
        }
        (path / "summary.json").write_bytes(orjson.dumps(summary))


def _group(tokenizer: Tokenizer, rng: random.Random, step: int, place: int) -> Iterator[Episode]:
    """The episodes of a prompt: from the second step on one fails, one is cut off, and one is a branch."""
    position = (step - 1) * GROUPS_PER_STEP + place if step else place
    group_id = f"g{position:08d}" if step else f"eval{position:06d}"
    trunk = ""
    for sample in range(EPISODES_PER_GROUP):
        episode_id = f"{group_id}-{sample}"
        kind = "plain"
        if step and place == 0:
            kind = ("hostile", "branching", "truncated", "failed")[sample]
        if place == 1 and sample == 3:
            kind = "tool error"
        skill = min(0.9, 0.25 + 0.1 * step)
        episode = _episode(tokenizer, rng, step, position, episode_id, group_id, kind=kind, skill=skill)
        if place == 2 and sample == 2 and step:
            episode = replace(episode, parent_id=trunk, branch_turn=1)
        trunk = trunk or episode_id
        yield episode


def _episode(
    tokenizer: Tokenizer,
    rng: random.Random,
    step: int,
    position: int,
    episode_id: str,
    group_id: str,
    *,
    kind: str,
    skill: float,
) -> Episode:
    place = PLACES[position % len(PLACES)]
    script = _Script()
    hostile = HOSTILE_TEXTS[step % len(HOSTILE_TEXTS)] if kind == "hostile" else ""
    script.hear(
        {"role": "system", "content": "Find the answer with the search tool, then answer in \\boxed{}."}
    )
    script.hear({"role": "user", "content": f"Who founded the company whose head office is in {place}?"})
    script.say(
        "",
        reasoning=f"First I need the company with its head office in {place}. {hostile}",
        call=("search", {"query": f"head office {place}", **({"note": hostile} if hostile else {})}),
    )
    script.result("search", _passages(place, hostile))
    if kind == "tool error":
        script.say("", call=("search", {"quarry": "typo"}))
        script.result("search", "Invalid arguments: 'query' is missing; unknown argument 'quarry'.", ok=False)
    branch_at = len(script.pieces)
    script.say(
        f"Now the founder.{hostile}",
        reasoning="Two hops." if rng.random() < 0.5 else None,
        call=("search", {"query": f"founder of {place} Works"}),
    )
    script.result("search", _passages(f"{place} Works", ""))
    is_right = rng.random() < skill
    if kind != "truncated":
        script.say(f"The founder is \\boxed{{{'Ada' if is_right else 'Bob'} {place}son}}.{hostile}")
    outcome = {"truncated": Outcome.TRUNCATED, "failed": Outcome.FAILED}.get(kind, Outcome.COMPLETED)
    reward = (
        None
        if outcome is Outcome.FAILED
        else float(is_right and outcome is Outcome.COMPLETED) - 0.05 * script.num_errors
    )
    segments = [_segment(tokenizer, rng, script.pieces, step)]
    if kind == "branching":
        later = [
            (text, False, turn) if place < branch_at else (text, True, turn)
            for place, (text, _, turn) in enumerate(script.pieces)
        ]
        compacted = [
            later[0],
            later[1],
            ("user Summary of what was found so far. ", False, 1),
            *later[branch_at:],
        ]
        segments = [
            _segment(tokenizer, rng, script.pieces[:branch_at], step),
            _segment(tokenizer, rng, compacted, step),
        ]
    spans = _spans(rng, script.turn)
    seconds = {
        f"{kind}_s": sum(ended - started for of, started, ended in spans if of == kind)
        for kind in ("generate", "tools", "queue")
    }
    sampled = sum(segment.num_sampled for segment in segments)
    error = None
    if outcome is Outcome.FAILED:
        error = f"tool 'search' failed: the server at http://127.0.0.1:1 does not answer\nTraceback: {hostile or '...'}"
    return Episode(
        episode_id=episode_id,
        group_id=group_id,
        env_id="polyturn/TwoHopSearch-v0",
        task_id=f"two-hop-{position % 16}",
        task_digest=f"{position % 16:016x}",
        seed=position * 31 + 2**40,
        outcome=outcome,
        answer=None if outcome is Outcome.FAILED else script.messages[-1]["content"],
        stop_reason={"truncated": "max_turns", "failed": "environment_fault"}.get(kind, "terminated"),
        reward=reward,
        reward_parts={} if reward is None else {"answer": float(is_right), "format": 0.0},
        metrics={"searches": float(script.num_calls), "hops_found": float(rng.randint(0, 2))},
        num_turns=script.turn,
        turn_records=()
        if outcome is Outcome.FAILED
        else tuple(TurnRecord(reward=0.0, anchor=f"{turn:016x}") for turn in range(script.turn)),
        num_tool_calls=script.num_calls,
        num_tool_errors=script.num_errors,
        tools={
            "search": ToolUsage(
                num_calls=script.num_calls,
                num_failures=script.num_errors,
                seconds=seconds["tools_s"],
                max_seconds=seconds["tools_s"],
            )
        },
        messages=tuple(script.messages),
        segments=tuple(segments),
        num_drawn_tokens=sampled,
        timings=EpisodeTimings(**seconds, total_s=spans[-1][2] + 0.01, spans=spans),
        error=error,
        failed_part="tool 'search'" if outcome is Outcome.FAILED else "",
    )


def _spans(rng: random.Random, num_turns: int) -> tuple[tuple[str, float, float], ...]:
    """A reset, and in each turn a wait, what is generated, and a step."""
    found, now = [], 0.0
    for kind in ["tools", *["queue", "generate", "tools"] * num_turns]:
        ended = now + rng.uniform(0.01, {"generate": 1.5}.get(kind, 0.2))
        found.append((kind, now, ended))
        now = ended
    return tuple(found)


def _passages(place: str, extra: str) -> str:
    """Search results as the environment gives them."""
    first = f"[1] {place} Works\n{place} Works is a company in {place}. {extra}"
    return f"{first}\n\n[2] Ada {place}son\nFounded {place} Works in 1901."


def _segment(
    tokenizer: Tokenizer, rng: random.Random, pieces: Sequence[tuple[str, bool, int]], step: int
) -> Segment:
    columns: dict[str, list[Any]] = {
        "token_ids": [],
        "sampled": [],
        "logprobs": [],
        "policy_versions": [],
        "turns": [],
    }
    for text, sampled, turn in pieces:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        changed_at = rng.randrange(len(ids) + 1) if turn and rng.random() < 0.3 else len(ids)
        columns["token_ids"] += ids
        columns["sampled"] += [sampled] * len(ids)
        columns["logprobs"] += [min(0.0, -rng.expovariate(2)) if sampled else 0.0 for _ in ids]
        versions = [max(0, step - 2) + (at >= changed_at) for at in range(len(ids))]
        columns["policy_versions"] += versions if sampled else [-1] * len(ids)
        columns["turns"] += [turn] * len(ids)
    return Segment(**{name: np.asarray(values) for name, values in columns.items()})


def _advantages(episodes: Sequence[Episode]) -> dict[str, float]:
    by_group: dict[str, list[float]] = {}
    for episode in episodes:
        by_group.setdefault(episode.group_id, []).append(episode.reward or 0.0)
    return {
        episode.episode_id: float(
            ((episode.reward or 0.0) - np.mean(by_group[episode.group_id]))
            / (np.std(by_group[episode.group_id]) + 1e-6)
        )
        for episode in episodes
    }


def _credit(
    rng: random.Random, episodes: Sequence[Episode], advantages: Mapping[str, float]
) -> Iterator[tuple[str, int, TokenCredit]]:
    """A trainer that is close to its engine, and further from it the later in a segment."""
    for episode in episodes:
        for number, segment in enumerate(episode.segments):
            places = np.flatnonzero(segment.sampled)
            if not len(places):
                continue
            differences = np.asarray([rng.gauss(0, 0.01 + place / 5_000) for place in places])
            yield (
                episode.episode_id,
                number,
                TokenCredit(
                    proximal_logprobs=(segment.logprobs[places] + differences).astype(np.float32),
                    advantages=np.full(len(places), advantages[episode.episode_id], np.float32),
                    clipped=np.abs(differences) > 0.06,
                ),
            )


def _metrics(rng: random.Random, step: int) -> dict[str, float | None]:
    return {
        "reward/mean": 0.2 + 0.1 * step + rng.uniform(-0.05, 0.05),
        "reward/std": 0.4,
        "success/mean": 0.2 + 0.1 * step,
        "episode/num": 15.0,
        "episode/turns": 2.9,
        "train/loss": rng.uniform(-0.1, 0.1),
        "train/entropy": 1.5 - 0.1 * step,
        "train/grad_norm": rng.uniform(0.1, 2),
        "train/logprob_difference_max": rng.uniform(0, 1e-3),
        "rollout/failed_attempts": 1 / 16,
        "outcome/truncated": 1 / 15,
        "group/uniform": 0.25 * (step % 3),
        "seconds/step": 10.0,
        "seconds/generate": 5.0,
        "seconds/train": 4.0,
        "policy/version": float(step),
        "train/behavior_kl": None if step == 2 else 1e-4,
        "alarm/uniform_groups": float(step in (2, 3)),
        "alarm/failed_attempts": 0.0,
    }


def _write_evaluation(
    path: Path, tokenizer: Tokenizer, rng: random.Random, *, policy: str, skill: float
) -> None:
    """Two entries: of one an episode failed, and of the other one is missing."""
    planned = [
        PlannedEntry(
            name=name,
            environment="polyturn/TwoHopSearch-v0",
            split="heldout",
            num_tasks=num_tasks,
            samples_per_task=2,
            success_score=1.0,
        )
        for name, num_tasks in (("two-hop", 8), ("short", 4))
    ]
    plan = EvaluationPlan(
        suite="demo",
        player=Player(name="model", label=policy),
        package="0.1.0",
        created="2026-01-02T12:00:00Z",
        entries=planned,
    )
    write_plan(path, plan)
    with closing(EpisodeLog(path)) as log:
        for entry in planned:
            _write_entry(path, entry, log, tokenizer, rng, skill=skill)


def _write_entry(
    path: Path,
    entry: PlannedEntry,
    log: EpisodeLog,
    tokenizer: Tokenizer,
    rng: random.Random,
    *,
    skill: float,
) -> None:
    episodes = []
    for index in range(entry.num_tasks):
        for sample in range(entry.samples_per_task):
            if entry.name == "short" and (index, sample) == (2, 0):
                continue
            kind = "failed" if entry.name == "two-hop" and (index, sample) == (3, 1) else "plain"
            group_id = evaluation_prompt(index).group_id
            identity = episode_id(group_id, sample, 0)
            episode = _episode(tokenizer, rng, 0, index, identity, group_id, kind=kind, skill=skill)
            episodes.append(episode)
            log.append(scored(episode, entry=entry.name, prices=None))
    with closing(TrajectoryStore(entry_directory(path, entry.name))) as store:
        store.write_step(0, episodes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    print(write_fixture(parser.parse_args().directory).folder)
