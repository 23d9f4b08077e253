"""Styles: how a project has its models search, as data; and text with tags, where the first action of a turn wins."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from polyturn.envs.messages import AssistantMessage
from polyturn.tools.search.retrieval import LAYOUTS, Layout
from polyturn.tools.types import ToolCall

RewardName = Literal["exact_match", "qa_em", "exact_match_and_format", "f1"]
AnswerForm = Literal["tags", "boxed", "text"]
Pair = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tags:
    """How a model writes its actions in text, and how results are put behind them, all in one assistant turn."""

    search: Pair = ("<search>", "</search>")
    answer: Pair = ("<answer>", "</answer>")
    access: Pair | None = None
    """Reads one page by its url; None where there is no such action."""
    results: Pair = ("\n\n<information>", "</information>\n\n")
    invalid: str | None = None
    """What is put behind a text without an action; None ends the episode there, without an answer."""
    opening: str = ""
    """What is put before each turn of the model: behind the prompt and behind results."""
    max_result_tokens: int | None = None
    """Longer results are cut inside their tags."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Where sampling stops. They are kept: they belong to what the model wrote."""
        pairs = (self.search, self.answer, *((self.access,) if self.access else ()))
        return tuple(closing for _, closing in pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchStyle:
    """One way to search and answer."""

    name: str
    source: str
    """The paper."""
    prompt: str
    """The user's message; `{question}` stands for the question."""
    system: str | None = None
    tags: Tags | None = None
    """None: native tool calls, in whatever way the model's chat template writes them."""
    tool_name: str = "search"
    many_queries: bool = False
    """Whether a call takes a list of queries."""
    layout: Layout = LAYOUTS["quoted"]
    answer: AnswerForm = "tags"
    """Where the answer stands in the last message: between `<answer>` tags, in `\\boxed{}`, or all of it."""
    reward: RewardName = "exact_match"
    missing_answer: float = 0.0
    """The reward of an episode that ends in a message without an answer in its form."""
    ends_in_question_mark: bool = False
    """Whether a question without one is given a question mark."""
    top_k: int = 3
    max_searches: int = 4
    final_answer_turn: bool = True
    """Whether one more turn follows the last search, in which only an answer counts."""


SEARCH_R1_PROMPT = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as "
    "many times as your want. If you find no further external knowledge needed, you can directly provide the answer "
    "inside <answer> and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. "
    "Question: {question}\n"
)
SEARCH_R1_INVALID = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
_NATIVE_PROMPT = (
    "Answer the question. Call the search tool as often as you need it. Give the final answer between <answer> and "
    "</answer>, as short as possible.\nQuestion: {question}"
)

SEARCH_R1 = SearchStyle(
    name="search_r1",
    source="arXiv 2503.09516",
    prompt=SEARCH_R1_PROMPT,
    tags=Tags(invalid=SEARCH_R1_INVALID, max_result_tokens=500),
    ends_in_question_mark=True,
)
NATIVE = SearchStyle(
    name="native", source="arXiv 2503.09516, with tool calls in place of tags", prompt=_NATIVE_PROMPT
)
ASEARCHER = SearchStyle(
    name="asearcher",
    source="arXiv 2508.07976",
    prompt=(
        "Find the answer to the question below. Think between <think> and </think>. Write <search> query </search> to "
        "search, and <access> url </access> to read a page that a search has named; what is found stands between "
        "<information> and </information>. Give the answer between <answer> and </answer>.\n\nQuestion: {question}\n"
    ),
    tags=Tags(
        access=("<access>", "</access>"),
        results=("\n\n<information>\n", "\n</information>\n"),
        invalid="\n",
        opening="<think>\n",
    ),
    layout=LAYOUTS["linked"],
    reward="f1",
    top_k=5,
    max_searches=31,
)
R1_SEARCHER = SearchStyle(
    name="r1_searcher",
    source="arXiv 2503.05592",
    prompt=(
        "Question: {question}\nThink between <think> and </think>. Where you are unsure, search: write keywords "
        "between <|begin_of_query|> and <|end_of_query|>, and you are shown what was found between "
        "<|begin_of_documents|> and <|end_of_documents|>. Put the final answer between <answer> and </answer>."
    ),
    tags=Tags(
        search=("<|begin_of_query|>", "<|end_of_query|>"),
        results=("\n\n<|begin_of_documents|>\n", "\n<|end_of_documents|>\n\n"),
    ),
    layout=LAYOUTS["numbered"],
    reward="f1",
    max_searches=8,
)
RESEARCH = SearchStyle(
    name="research",
    source="arXiv 2503.19470",
    prompt="{question}",
    system=(
        "Answer the question step by step. Think between <think> and </think>. You may search Wikipedia with <search> "
        "query </search>; what is found stands between <result> and </result>. End with <answer> ... </answer>, in "
        "which the exact answer stands in \\boxed{}."
    ),
    tags=Tags(results=(" <result>\n", "\n</result>")),
    layout=LAYOUTS["contents"],
    answer="boxed",
    reward="f1",
    top_k=5,
    max_searches=8,
)
RECALL = SearchStyle(
    name="recall",
    source="the tool-calling successor of arXiv 2503.19470",
    prompt="{question}",
    system=(
        "Answer the question with the help of the tools. Think between <think> and </think> before each call. When you "
        "know the answer, call nothing more and write it in \\boxed{}."
    ),
    layout=LAYOUTS["contents"],
    answer="boxed",
    reward="f1",
    top_k=5,
    max_searches=8,
)
DEEP_RESEARCHER = SearchStyle(
    name="deep_researcher",
    source="arXiv 2504.03160",
    prompt="{question}",
    system=(
        "Answer the question by research. In each turn think between <think> and </think>, then either call the search "
        "tool with a list of queries, or give the answer, in a word or a phrase, between <answer> and </answer>."
    ),
    tool_name="web_search",
    many_queries=True,
    reward="f1",
    missing_answer=-1.0,
    max_searches=9,
)

STYLES: dict[str, SearchStyle] = {
    style.name: style
    for style in (SEARCH_R1, NATIVE, ASEARCHER, R1_SEARCHER, RESEARCH, RECALL, DEEP_RESEARCHER)
}
TAGS: dict[str, Tags] = {name: style.tags for name, style in STYLES.items() if style.tags is not None}


def style_named(name: str) -> SearchStyle:
    """The style of that name. Raises `ValueError` where there is none."""
    if name not in STYLES:
        near = difflib.get_close_matches(name, STYLES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the styles are {', '.join(STYLES)}"
        raise ValueError(f"unknown search style {name!r}; {hint}")
    return STYLES[name]


SEARCH_TOOL, ACCESS_TOOL = "search", "access"
_ARGUMENTS = {SEARCH_TOOL: "query", ACCESS_TOOL: "url"}


def parse_turn(text: str, tags: Tags) -> AssistantMessage:
    """The message that a text is: its content is the text up to the end of the first complete action.

    A search or an access becomes a tool call; an answer is in the content. A text without an action becomes a call that
    could not be read, where the style goes on after such a text.
    """
    named = {SEARCH_TOOL: tags.search, ACCESS_TOOL: tags.access, "answer": tags.answer}
    found = {name: _first_block(text, pair) for name, pair in named.items() if pair is not None}
    actions = {name: block for name, block in found.items() if block is not None}
    if not actions:
        unread = ToolCall(id="call_0", name="", error=tags.invalid or "")
        calls = () if tags.invalid is None else (unread,)
        return AssistantMessage(content=text, tool_calls=calls, raw_text=text)
    name, block = min(actions.items(), key=lambda item: item[1].start)
    content = text[: block.end]
    if name == "answer":
        return AssistantMessage(content=content, raw_text=text)
    call = ToolCall(id="call_0", name=name, arguments={_ARGUMENTS[name]: block.inside.strip()})
    return AssistantMessage(content=content, tool_calls=(call,), raw_text=text)


def last_block(text: str, pair: Pair) -> str | None:
    """What stands in the last of the blocks that follow each other in a text; None without any."""
    last, start = None, 0
    while (block := _first_block(text, pair, start)) is not None:
        last, start = block.inside, block.end
    return last


def write_turn(message: AssistantMessage, tags: Tags) -> str:
    """The text of a message: what the policy wrote, or what it would have written for its first call."""
    if message.raw_text is not None:
        return message.raw_text
    for call in message.tool_calls[:1]:
        pair = tags.access if call.name == ACCESS_TOOL and tags.access else tags.search
        argument = next(iter(call.arguments.values()), "")
        return f"{message.content}{pair[0]} {argument} {pair[1]}"
    return message.content


def is_well_formed(turns: Sequence[str], tags: Tags) -> bool:
    """Whether a search or access follows one thought in every turn but the last, and an answer in that one.

    White space may stand between; no tag may stand inside a thought, a query or an answer.
    """
    searches, last = _turn_patterns(tags)
    return (
        bool(turns)
        and all(searches.fullmatch(turn) for turn in turns[:-1])
        and bool(last.fullmatch(turns[-1]))
    )


@dataclass(frozen=True, slots=True)
class _Block:
    start: int
    end: int
    inside: str


def _first_block(text: str, pair: Pair, start: int = 0) -> _Block | None:
    """The first opening with a closing behind it: what `opening(.*?)closing` finds, in linear time."""
    opening, closing = pair
    begin = text.find(opening, start)
    end = text.find(closing, begin + len(opening)) if begin >= 0 else -1
    return None if end < 0 else _Block(begin, end + len(closing), text[begin + len(opening) : end])


@functools.cache
def _turn_patterns(tags: Tags) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What a turn that searches looks like, and one that answers. Linear in the length of the text."""
    acting = [tags.search, *((tags.access,) if tags.access else ())]
    results = tuple(part.strip() for part in tags.results)
    all_tags = [tag for pair in (("<think>", "</think>"), *acting, tags.answer, results) for tag in pair]
    inside = f"(?:(?!{'|'.join(map(re.escape, all_tags))})(?s:.))*+"
    opened = "" if "<think>" in tags.opening else "<think>"

    def turn(pairs: Sequence[Pair]) -> re.Pattern[str]:
        actions = "|".join(f"{re.escape(a)}{inside}{re.escape(b)}" for a, b in pairs)
        return re.compile(rf"\s*+{opened}{inside}</think>\s*+(?:{actions})\s*+")

    return turn(acting), turn([tags.answer])
