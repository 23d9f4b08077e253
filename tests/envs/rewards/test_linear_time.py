"""Graders and readers of model text take time in proportion to it: growth is measured, and no clock decides.

Every pattern of the modules below and every function that reads a reply is given texts that are one piece repeated,
between two others. From a text to one four times as long, the processor's time may grow by a factor of not much more
than four; what is quadratic grows by sixteen.
"""

import contextlib
import importlib
import re
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.dialects import make_dialect
from polyturn.envs.code.grading import find_code
from polyturn.envs.rewards import answers
from polyturn.envs.rewards.math import extract
from polyturn.envs.rewards.math.tokens import normalise
from polyturn.envs.rewards.rules import Format
from polyturn.envs.search import env, styles
from polyturn.envs.search.styles import STYLES, TAGS

SHORT, LONG = 1_500, 6_000
FACTOR = 9.0
"""Between four, for what is linear, and sixteen."""
TOO_QUICK_S = 0.003
"""A longer text that takes less tells nothing: 6,000 squared steps take ten times as much."""

PIECES = [
    *(
        " ",
        "\n",
        "\t",
        "*",
        "$",
        "\\",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "#",
        "_",
        "^",
        "|",
        ":",
        "=",
        "'",
        '"',
        "`",
        "<",
        ">",
    ),
    *(
        "1",
        "1,",
        "1,000",
        "1 000 ",
        "1.",
        ".5",
        "1/",
        "/ ",
        "0.",
        "-",
        "+",
        "%",
        "1e5",
        "12:30 ",
        "1_2",
        "½",
        "é",
        "元",
        "。",
    ),
    *(
        "A",
        "A,",
        "A or ",
        "(A)",
        "a ",
        "x",
        "is ",
        "so ",
        ", so ",
        "because ",
        ". ",
        "? ",
        "not ",
        "the ",
        "or ",
        "and ",
    ),
    *(
        "answer",
        "answer ",
        "answer is ",
        "the answer is 5 ",
        "Answer: ",
        "答案",
        "#### ",
        "option A ",
        "refund ",
        "e-mail",
    ),
    *(
        "\\boxed",
        "\\boxed{",
        "\\boxed{}",
        "\\fbox {",
        "\\text{",
        "\\frac{",
        "\\begin{",
        "\\\\",
        "\\color{",
        "\\$",
        "\\,",
    ),
    *(
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "<search>",
        "</search>",
        "<tool_call>",
        "</tool_call>",
        "<b>",
        "```",
    ),
    *(
        '{"name": ',
        "```python\n",
        "\n\n",
        " \n",
        "He has 5 ",
        "It is 5. ",
        "**Answer**\n",
        "First root: ",
        "x = ",
        "\\(x=\\boxed{2}\\) ",
    ),
]
STYLED = next(style for style in STYLES.values() if style.tags is not None and style.answer == "boxed")
READERS: dict[str, Callable[[str], object]] = {
    "extract": extract.extract,
    "extract a box": lambda reply: extract.extract(reply, box_only=True),
    "the answer of a solution": extract.gold_answer,
    "normalise": normalise,
    "stated_number": answers.stated_number,
    "numbers_in": answers.numbers_in,
    "read_number": answers.read_number,
    "stated_choice": answers.stated_choice,
    "find_answer": answers.find_answer,
    "find_answer in a box": lambda reply: answers.find_answer(reply, "boxed"),
    "find_answer in a tag": lambda reply: answers.find_answer(reply, "tag"),
    "find_answer in a line": lambda reply: answers.find_answer(reply, "last_line"),
    "is_refusal": answers.is_refusal,
    "exact_match": lambda reply: answers.exact_match(reply, "gold"),
    "f1": lambda reply: answers.f1(reply, "a gold answer"),
    "contains": lambda reply: answers.contains(reply, "gold", max_words=10**6),
    "format": lambda reply: Format().__call__(reply_view(reply)),
    "find_code": find_code,
    "the answer of a search": lambda reply: env.find_answer(STYLED, reply),
    "the f1 of a search": lambda reply: env.token_f1(reply, "gold"),
    **{
        f"the turn of {name}": lambda reply, own=own: styles.parse_turn(reply, own)
        for name, own in TAGS.items()
    },
    **{
        f"the form of {name}": lambda reply, own=own: styles.is_well_formed([reply, reply], own)
        for name, own in TAGS.items()
    },
    **{f"the dialect {name}": make_dialect(name).parse for name in ("hermes", "json", "pythonic", *TAGS)},
}
MODULES = (
    *(f"polyturn.envs.rewards.{name}" for name in ("answers", "rules")),
    *(f"polyturn.envs.rewards.math.{name}" for name in ("extract", "tokens", "answers", "units", "decide")),
    *(
        "polyturn.envs.search.styles",
        *(f"polyturn.agents.dialects.{name}" for name in ("hermes", "bare_json", "python_calls", "repair")),
    ),
    *("polyturn.envs.customer_service.customers", "polyturn.envs.customer_service.env"),
)


def reply_view(reply):
    from polyturn.envs.messages import AssistantMessage, EpisodeView, Task

    task = Task.from_prompt("t", "p", label="x")
    return EpisodeView(task=task, message=AssistantMessage(content=reply), messages=())


def patterns() -> Iterator[tuple[str, Callable[[str], object]]]:
    """Every compiled pattern of the modules, as it searches and as it must match all."""
    for name in MODULES:
        found = {
            f"{key}{index or ''}": pattern
            for key, value in vars(importlib.import_module(name)).items()
            for index, pattern in enumerate(_compiled(value))
        }
        for key, pattern in found.items():
            yield f"{name}:{key} finds", lambda reply, own=pattern: sum(1 for _ in own.finditer(reply))
            yield f"{name}:{key} matches", pattern.fullmatch


def _compiled(value: object) -> Iterator[re.Pattern[str]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _compiled(item)


SUBJECTS = {**READERS, **dict(patterns())}


def seconds(read: Callable[[str], object], reply: str) -> float:
    """Processor time of this thread for one reading."""
    started = time.thread_time()
    with contextlib.suppress(ValueError):
        read(reply)
    return time.thread_time() - started


def grows_too_fast(read: Callable[[str], object], before: str, pump: str, after: str) -> bool:
    def reply(size: int) -> str:
        return before + pump * (size // len(pump)) + after

    if seconds(read, reply(LONG)) < TOO_QUICK_S:
        return False
    # Noise only adds: the least of several is the nearest to what the text takes.
    short = min(seconds(read, reply(SHORT)) for _ in range(5))
    return min(seconds(read, reply(LONG)) for _ in range(5)) > FACTOR * short


KNOWN = [
    ("The answer is 5", " ", "z"),
    ("answer", "*", ""),
    ("answer", " ", ""),
    ("1", " ", "/"),
    ("1/", "1", "."),
    ("", "\\boxed{", ""),
    ("", "\\boxed{", "}" * 1500),
    ("", "<answer>", ""),
    ("", "answer is ", ""),
    ("", "refund ", ""),
    ("", " ", "</think"),
    ("\\boxed{1}", " ", "\\boxed{2}"),
    ("The answer is ", "a ", "."),
]


@pytest.mark.parametrize("name", READERS)
def test_known_texts_are_read_in_linear_time(name):
    assert [family for family in KNOWN if grows_too_fast(READERS[name], *family)] == []


@pytest.mark.parametrize("pump", PIECES)
def test_every_reader_and_pattern_is_linear_in_every_piece(pump):
    slow = [name for name, read in SUBJECTS.items() if grows_too_fast(read, "The answer is 1", pump, "z")]
    slow += [name for name, read in READERS.items() if grows_too_fast(read, "", pump, "")]
    assert slow == []


pieces = st.sampled_from(PIECES)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    before=st.lists(pieces, max_size=2).map("".join),
    pump=st.lists(pieces, min_size=1, max_size=3).map("".join),
    after=st.lists(pieces, max_size=2).map("".join),
    name=st.sampled_from(sorted(SUBJECTS)),
)
def test_no_text_made_of_pieces_takes_more_than_linear_time(before, pump, after, name):
    assert not grows_too_fast(SUBJECTS[name], before, pump, after)
