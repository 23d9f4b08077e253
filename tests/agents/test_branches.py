"""Where a chat template rewrites earlier turns, the ledger branches; every sampled token is trained once."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import play_tokens
from polyturn.agents.ledger import UNSAMPLED_VERSION, Ledger
from polyturn.agents.policy import Generation
from polyturn.envs.messages import Task
from polyturn.envs.rewards import exact_match
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from polyturn.trainer.credit.estimates import make_samples
from tests.support.chat_families import FAMILIES, ends

TASK = Task.from_prompt("t", "Who is it?", label="done")


class Echo(ToolEnv):
    """Hands the policy's own words back to it until it says `done`."""

    @tool
    def echo(self, text: str) -> str:
        """Say it again."""
        return text

    def follow_up(self, message):
        return () if message.content == "done" else [{"role": "user", "content": f"{message.content}?"}]

    def grade(self, message):
        return {"correct": exact_match(message.content, self.task.label)}


class Writes:
    """A policy that writes given texts, each ended by a token."""

    def __init__(self, tokenizer, turns):
        self.tokenizer, self.turns, self.prompts, self.written = tokenizer, list(turns), [], []

    async def generate(self, *, prompt_ids, sampling):
        await asyncio.sleep(0)
        text, end = self.turns[len(self.prompts)]
        self.prompts.append(prompt_ids.tolist())
        ids = [
            *self.tokenizer.encode(text, add_special_tokens=False),
            self.tokenizer.convert_tokens_to_ids(end),
        ]
        self.written.append(ids)
        number = len(self.prompts)
        return Generation(
            token_ids=tuple(ids),
            logprobs=(-float(number),) * len(ids),
            policy_versions=(number,) * len(ids),
            finish_reason="stop",
        )


def play(name, turns, *, env=None, **options):
    tokenizer = FAMILIES[name].tokenizer
    policy = Writes(tokenizer, turns)
    episode = asyncio.run(
        play_tokens(
            env=env or Echo(),
            policy=policy,
            renderer=ChatRenderer(tokenizer, **options),
            dialect=HermesDialect(),
            task=TASK,
            seed=0,
            limits=EpisodeLimits(max_turns=20, max_tokens_per_turn=500, max_tokens_per_episode=5000),
            episode_id="e",
            group_id="g",
        )
    )
    assert episode.outcome is Outcome.COMPLETED, episode.error
    return episode, policy


def thinking(thought, rest, *, opened=False):
    return ("" if opened else "<think>\n") + f"{thought}\n</think>\n\n{rest}"


def call(text):
    return '<tool_call>\n{"name": "echo", "arguments": {"text": ' + json.dumps(text) + "}}\n</tool_call>"


def template_prompts(name, episode, **options):
    """What the template makes of the conversation before each of the policy's turns."""
    prompts, messages = [], []
    tools = [spec.to_openai() for spec in Echo().toolset.specs]
    for message in episode.messages:
        if message["role"] == "assistant":
            prompts.append(
                FAMILIES[name].tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=True, **options
                )
            )
        message = dict(message)
        if "reasoning" in message:
            message["reasoning_content"] = message.pop("reasoning")
        messages.append(message)
    return prompts


def check_once(episode, policy):
    """Every sampled token is sampled in one segment, as it was drawn; all else is not sampled."""
    assert (episode.num_drawn_tokens, episode.num_lost_tokens) == (sum(map(len, policy.written)), 0)
    sampled = [
        (token, logprob, version)
        for segment in episode.segments
        for token, own, logprob, version in zip(
            segment.token_ids, segment.sampled, segment.logprobs, segment.policy_versions, strict=True
        )
        if own
    ]
    drawn = [(token, -float(n), n) for n, ids in enumerate(policy.written, start=1) for token in ids]
    assert sampled == drawn
    for segment in episode.segments:
        assert list(segment.turns) == sorted(segment.turns)
        unsampled = [v for v, own in zip(segment.policy_versions, segment.sampled, strict=True) if not own]
        assert set(unsampled) == {UNSAMPLED_VERSION}
    samples = make_samples([episode])
    assert sum(sample.num_trainable for sample in samples) == len(drawn)
    assert {sample.sequence_id for sample in samples} == {"e"}, "an episode counts once"


@pytest.mark.parametrize("name", ["qwen3", "qwen3-thinking"])
def test_thoughts_that_the_template_drops_begin_a_new_segment(name):
    opened, end = name == "qwen3-thinking", "<|im_end|>"
    texts = [
        thinking("I shall ask.", call("one"), opened=opened),
        thinking("I know.", "more", opened=opened),
        thinking("Again.", call("two </think> <|im_end|>"), opened=opened),
        thinking("So.", "done", opened=opened),
    ]
    episode, policy = play(name, [(text, end) for text in texts])
    check_once(episode, policy)
    tokenizer = FAMILIES[name].tokenizer
    assert [tokenizer.decode(prompt) for prompt in policy.prompts] == template_prompts(name, episode)
    first, second = episode.segments
    assert first.turns[-1] == 1
    assert (second.turns[0], second.turns[-1]) == (2, 3)
    assert "I know." in tokenizer.decode(first.token_ids)
    assert "I know." not in tokenizer.decode(second.token_ids), "an earlier thought"
    assert [message.get("reasoning") for message in episode.messages if message["role"] == "assistant"] == [
        "I shall ask.",
        "I know.",
        "Again.",
        "So.",
    ]
    assert episode.reward == 1.0


turns = st.tuples(
    st.sampled_from(["", "I think.", "</think>", "a\n\nb"]),
    st.sampled_from(["more", " and more \n", "", "<|im_end|> [INST]"]),
    st.lists(st.sampled_from(["one", 'two "q"']), max_size=2),
)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(FAMILIES)), written=st.lists(turns, max_size=5))
def test_whatever_is_said_every_sampled_token_is_trained_once(name, written):
    """Thoughts, texts, calls and parallel calls in any order, in templates that keep history and that rewrite it."""
    texts = [
        (f"<think>\n{thought}\n</think>\n\n" if thought else "") + said + "".join(map(call, calls))
        for thought, said, calls in written
    ]
    texts = [text for text in texts if "done" not in text and text.strip()]
    end = ends(name)[0]
    opened = name in ("qwen3-thinking", "deepseek-r1")
    last = "so</think>done" if opened else "done"
    episode, policy = play(name, [(text, end) for text in [*texts, last, "</think>done"]])
    assert episode.num_turns >= len(texts) + 1
    policy.written = policy.written[: episode.num_turns]
    check_once(episode, policy)


def test_history_as_it_was_sampled_is_one_segment():
    texts = [thinking("I know.", "more"), thinking("So.", "done")]
    episode, policy = play("qwen3", [(text, "<|im_end|>") for text in texts], history="sampled")
    check_once(episode, policy)
    (segment,) = episode.segments
    text = FAMILIES["qwen3"].tokenizer.decode(segment.token_ids)
    assert text.count("I know.") == 1
    whole = template_prompts("qwen3", episode)[-1]
    assert whole.endswith(text[text.index("more<|im_end|>") : -len(texts[1]) - len("<|im_end|>")])


def test_thinking_turned_off_follows_the_template():
    options = {"enable_thinking": False}
    episode, policy = play(
        "qwen3", [(call("one"), "<|im_end|>"), ("done", "<|im_end|>")], template_options=options
    )
    check_once(episode, policy)
    prompts = [FAMILIES["qwen3"].tokenizer.decode(prompt) for prompt in policy.prompts]
    assert prompts == template_prompts("qwen3", episode, **options)
    assert len(episode.segments) == 2, "the empty thought stands in the prompt of the last turn alone"


def test_a_call_in_a_thought_that_the_prompt_opened_is_not_made():
    turns = [
        ("perhaps " + call("one"), "<|im_end|>"),
        ("I am\n</think>\n\ndone", "<|im_end|>"),
    ]
    episode, policy = play("qwen3-thinking", turns)
    check_once(episode, policy)
    assert episode.num_tool_calls == 0


@pytest.mark.parametrize(
    "name", ["qwen2.5", "gemma-3", "llama2", "phi-3", "llama3.1", "glm-4", "kimi-k2", "mistral"]
)
def test_a_template_that_keeps_history_makes_one_segment(name):
    tokenizer = FAMILIES[name].tokenizer
    end = {"qwen2.5": "<|im_end|>", "gemma-3": "<end_of_turn>", "phi-3": "<|end|>", "llama3.1": "<|eot_id|>"}
    end |= {"glm-4": "<|observation|>", "kimi-k2": "<|im_end|>"}
    episode, policy = play(name, [(call("one"), end.get(name, "</s>")), ("done", end.get(name, "</s>"))])
    check_once(episode, policy)
    (segment,) = episode.segments
    text = tokenizer.decode(segment.token_ids)
    assert policy.prompts[1] == segment.token_ids[: len(policy.prompts[1])].tolist()
    assert text.count(call("one")) == 1
    assert "one" in text.partition(call("one"))[2]
    if name == "qwen2.5":
        assert [tokenizer.decode(prompt) for prompt in policy.prompts] == template_prompts(name, episode)
    if name == "kimi-k2":
        assert "## Return of functions.echo:0\none" in text
    if name == "mistral":
        assert '"call_id": "call00000"' in text


def test_a_ledger_keeps_what_it_branched_from():
    ledger = Ledger()
    ledger.append_observation([1, 2])
    ledger.append_generation(
        Generation(token_ids=(3, 4), logprobs=(-1.0, -2.0), policy_versions=(5, 5), finish_reason="stop")
    )
    ledger.branch([1, 2, 4, 6])
    assert len(ledger) == 4
    ledger.append_generation(
        Generation(token_ids=(7,), logprobs=(-3.0,), policy_versions=(6,), finish_reason="stop")
    )
    first, second = ledger.to_segments(role="solver/0")
    assert first.token_ids.tolist() == [1, 2, 3, 4] and second.token_ids.tolist() == [1, 2, 4, 6, 7]
    assert first.sampled.tolist() == [False, False, True, True]
    assert second.sampled.tolist() == [False, False, False, False, True]
    assert first.turns.tolist() == [0, 0, 0, 0] and second.turns.tolist() == [1, 1, 1, 1, 1]
    assert first.role == second.role == "solver/0"
    assert Ledger().to_segments() == ()
