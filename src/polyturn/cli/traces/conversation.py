"""An episode as lines: a head with what is known of it, then the conversation, message by message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from polyturn.agents.episode import Episode
from polyturn.cli.traces.paper import Paper, one_line
from polyturn.rollout.traces.files import Trace
from polyturn.rollout.traces.selection import call_text
from polyturn.tools.plain import printable

LINES_SHOWN = 40
"""Of one message, where not all is asked for."""
INDENT = 4
ROLE_COLOURS = {"system": "magenta", "user": "blue", "assistant": "green", "tool": "yellow"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What is shown of an episode."""

    thinking: bool = False
    full: bool = False

    @property
    def limit(self) -> int | None:
        return None if self.full else LINES_SHOWN


def episode_lines(trace: Trace, paper: Paper, shown: Shown) -> Iterator[str]:
    """The head and the conversation."""
    yield from _head(trace, paper, shown)
    turn = 0
    for number, message in enumerate(trace.episode.messages):
        is_answer = message["role"] == "assistant"
        turn += is_answer
        yield ""
        yield from _message(number, message, turn if is_answer else None, trace.episode, paper, shown)


def _head(trace: Trace, paper: Paper, shown: Shown) -> Iterator[str]:
    episode = trace.episode
    title = f"{printable(episode.episode_id)}  {printable(trace.file.part)}"
    if trace.file.step:
        title += f"  step {trace.file.step}"
    yield paper.ink(f"━━ {title}  {trace.state} ".ljust(paper.width, "━"), bold=True)
    yield from paper.lines(f"task {episode.task_id}, {episode.env_id}, seed {episode.seed}")
    yield from paper.lines("; ".join(_facts(trace)))
    for name, values in (("reward parts", episode.reward_parts), ("metrics", episode.metrics)):
        if values:
            yield from paper.lines(
                f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in values.items())
            )
    if episode.error:
        about = f"{episode.failed_part}: " if episode.failed_part else ""
        yield from paper.lines(about + episode.error, colour="red", limit=shown.limit)


def _facts(trace: Trace) -> Iterator[str]:
    episode = trace.episode
    yield "no reward" if episode.reward is None else f"reward {episode.reward:g}"
    for role, reward in episode.role_rewards.items():
        yield f"{role} {reward:g}"
    for role, advantage in trace.advantages.items():
        yield f"advantage {f'of {role} ' if role else ''}{advantage:g}"
    yield f"{episode.outcome} ({episode.stop_reason})"
    if episode.parent_id:
        yield f"branch of {episode.parent_id} from turn {episode.branch_turn + 1}"
    yield f"{episode.num_turns} turns"
    yield f"{episode.num_tool_calls} tool calls, {episode.num_tool_errors} with errors"
    yield f"{episode.num_drawn_tokens or episode.num_sampled_tokens:,} tokens"
    times = episode.timings
    yield (
        f"{times.total_s:.1f} s (generate {times.generate_s:.1f}, tools {times.tools_s:.1f}, queue {times.queue_s:.1f})"
    )


def _message(
    number: int, message: Mapping[str, Any], turn: int | None, episode: Episode, paper: Paper, shown: Shown
) -> Iterator[str]:
    role = str(message["role"])
    title = f"[{number}] {role}"
    if message.get("name"):
        title += f" {message['name']}"
    if turn is not None:
        title += f", turn {turn}"
        if turn <= len(episode.turn_records):
            record = episode.turn_records[turn - 1]
            title += f", {record.role}" if record.role else ""
            title += f", paid {record.reward:g}" if record.reward else ""
    yield paper.ink(printable(title), ROLE_COLOURS.get(role), bold=True)
    thought = str(message.get("reasoning") or "")
    if thought and shown.thinking:
        yield from paper.lines(thought, indent=INDENT, limit=shown.limit, colour="cyan")
    elif thought:
        about = f"(thought {len(thought):,} characters; --thinking shows them) "
        begun = one_line(thought, max(1, paper.width - INDENT - len(about)))
        yield " " * INDENT + paper.ink(about + begun, dim=True)
    if message.get("content"):
        yield from paper.lines(str(message["content"]), indent=INDENT, limit=shown.limit)
    for call in message.get("tool_calls") or ():
        yield from paper.lines(f"→ {call_text(call)}", indent=INDENT, limit=shown.limit, colour="yellow")
