"""What it takes to make tokens of a turn, against transformers on the whole conversation: CPU microseconds, by turns.

    python benchmarks/rendering.py [--short] [--model DIR]

Ours is what the episode loop does between two turns: ask whether the history goes on, and append what the template
writes behind the turn (`ChatRenderer.history`, `extend`). transformers' is `apply_chat_template` with `tokenize=True`
of all messages, as a server without a session does it for every request. Both get the same conversation: a system
message, tools, calls with results of 200 characters. Once with results whose delta is known by then, as most are, and
once with such as the template is asked about each time (they begin with a space). Both are timed in turn, round by
round; a figure is the median of the rounds, in CPU time of the thread. `ratio` is transformers' over ours.

The tokens are compared before anything is timed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyturn.agents.chat import ChatRenderer, load_tokenizer
from polyturn.configs.models import resolve_model_path
from polyturn.envs.messages import Message
from polyturn.tools.search.retrieval import SEARCH_SPEC

MODEL = "builtin:tiny-searcher"
TURNS = (4, 32, 128)
WORDS = "The mill of Ashford was built by Mara Lindqvist in the year of the flood, as its register says. "
RESULT_CHARS = 200
TURNS_AT_ONCE = 20
"""Of as many equal conversations: one alone would be timed with the caches that its own preparation left."""


@dataclass
class Row:
    """The times of one number of turns, of all rounds."""

    ours: list[float] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Medians in microseconds, and their ratios."""
        ours, asked, whole = (1e6 * statistics.median(times) for times in (self.ours, self.asked, self.whole))
        return {
            "us": round(ours, 1),
            "us_asked": round(asked, 1),
            "us_transformers": round(whole, 1),
            "ratio": round(whole / ours, 1),
            "ratio_asked": round(whole / asked, 1),
        }


def conversation(num_turns: int, renderer: ChatRenderer, *, lead: str) -> list[Message]:
    """A system message, a question, and so many calls with their results, each of which begins with `lead`."""
    messages: list[Message] = [
        {"role": "system", "content": "Answer with the town alone."},
        {"role": "user", "content": "In which town is the employer of Mara Lindqvist based?"},
    ]
    for number in range(num_turns):
        call_id = renderer.form.call_id("search", number)
        call = {"name": "search", "arguments": {"query": f"Mara Lindqvist {number}"}}
        text = (WORDS * (RESULT_CHARS // len(WORDS) + 1))[: RESULT_CHARS - len(f"{lead}{number} ")].strip()
        messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": call_id, "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": call_id, "name": "search", "content": f"{lead}{number} {text}"},
        ]
    return messages


def timed(*works: Callable[[], object]) -> float:
    """Seconds of CPU time of this thread for each, without what the garbage collector takes."""
    gc.collect()
    gc.disable()
    started = time.thread_time()
    for work in works:
        work()
    seconds = time.thread_time() - started
    gc.enable()
    return seconds / len(works)


def last_turn(renderer: ChatRenderer, messages: list[Message]) -> Callable[[], list[int]]:
    """What is done behind the last turn of a conversation that was followed so far."""
    history = renderer.history([SEARCH_SPEC])
    goes_on = all(
        history.continues(messages[:end])
        for end in range(4, len(messages), 2)
        if messages[end - 1]["role"] == "tool"
    )
    assert goes_on, "the template rewrites this conversation: there is no turn to append"

    def work() -> list[int]:
        assert history.continues(messages)
        return renderer.extend(messages[-1:], last_token_id=renderer.stop_token_ids[0], tools=[SEARCH_SPEC])

    return work


def measure(tokenizer: Any, num_turns: int, num_rounds: int) -> Row:
    """The rounds of one number of turns."""
    renderer, row = ChatRenderer(tokenizer), Row()
    tools = [SEARCH_SPEC.to_openai()]
    for lead, times in (("", row.ours), (" ", row.asked)):
        messages = conversation(num_turns, renderer, lead=lead)
        taken, given = renderer.form.prepare(messages, tools)

        def whole(taken: Any = taken, given: Any = given) -> Any:
            return tokenizer.apply_chat_template(
                taken, tools=given or None, add_generation_prompt=True, tokenize=True, return_dict=False
            )

        delta = last_turn(renderer, messages)()
        assert whole()[-len(delta) :] == delta, "what is appended is what the template writes"
        for _ in range(num_rounds):
            times.append(timed(*(last_turn(renderer, messages) for _ in range(TURNS_AT_ONCE))))
            if not lead:
                row.whole.append(timed(*[whole] * max(1, TURNS_AT_ONCE * TURNS[0] // num_turns)))
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="fewer rounds")
    parser.add_argument("--model", default=MODEL, help="a directory with a tokenizer, or builtin:NAME")
    options = parser.parse_args()
    path = options.model if Path(options.model).is_dir() else resolve_model_path(options.model)
    tokenizer = load_tokenizer(path)
    found = {}
    for num_turns in TURNS:
        found[str(num_turns)] = figures = measure(tokenizer, num_turns, 10 if options.short else 60).figures()
        print(
            f"{num_turns:>4} turns: {figures['us']:8.1f} us a turn, {figures['us_asked']:8.1f} where the template is "
            f"asked; transformers on the whole {figures['us_transformers']:9.1f} us: {figures['ratio']} times, "
            f"{figures['ratio_asked']} times"
        )
    growth = found[str(TURNS[-1])]["us"] / found[str(TURNS[0])]["us"]
    print(json.dumps({"model": str(options.model), "turns": found, "growth": round(growth, 2)}))


if __name__ == "__main__":
    main()
