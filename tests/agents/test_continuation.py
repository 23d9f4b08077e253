"""Tags: the first action of a text counts, and what is found goes on in the same assistant turn."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer, ContinuationRenderer, make_renderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import TagDialect, make_dialect
from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import play_tokens
from polyturn.agents.policy import Generation
from polyturn.envs.registry import make
from polyturn.envs.search.styles import SEARCH_R1_INVALID, TAGS
from polyturn.tools.search.retrieval import SEARCH_SPEC

SEARCH = "<think> who? </think>\n<search> Ida Westerberg </search>"
INFORMATION = {"role": "tool", "tool_call_id": "call_0", "name": "search", "content": "Doc 1(Title: x) y\n"}
INVALID = {"role": "tool", "tool_call_id": "call_0", "name": "", "content": SEARCH_R1_INVALID}


@pytest.fixture(scope="session")
def renderer(chatml):
    return ContinuationRenderer(chatml, tags=TAGS["search_r1"])


def test_each_dialect_has_the_renderer_that_it_needs(chatml):
    assert type(make_renderer(chatml, make_dialect("hermes"))) is ChatRenderer
    made = make_renderer(chatml, make_dialect("search_r1"))
    assert isinstance(made, ContinuationRenderer)
    assert made.stop_strings == ("</search>", "</answer>")
    assert ChatRenderer(chatml).stop_strings == ()
    assert make_renderer(chatml, make_dialect("asearcher")).stop_strings == (
        "</search>",
        "</answer>",
        "</access>",
    )


def test_the_prompt_is_the_templates_without_tools(chatml, renderer):
    messages = [{"role": "user", "content": "Question: who?"}]
    assert renderer.start(messages, [SEARCH_SPEC]) == ChatRenderer(chatml).start(messages)


def test_results_are_raw_text_behind_what_was_sampled(chatml, renderer):
    delta = renderer.extend([INFORMATION], last_token_id=chatml.encode(">")[-1])
    assert chatml.decode(delta) == "\n\n<information>Doc 1(Title: x) y</information>\n\n"
    delta = renderer.extend([INVALID], last_token_id=chatml.encode("x")[-1])
    assert chatml.decode(delta) == SEARCH_R1_INVALID


def test_a_turn_that_the_policy_ended_is_opened_again(chatml, renderer):
    delta = renderer.extend([INVALID], last_token_id=chatml.eos_token_id)
    assert chatml.decode(delta) == f"\n<|im_start|>assistant\n{SEARCH_R1_INVALID}"


def test_long_results_are_cut_inside_their_tags(chatml, renderer):
    delta = renderer.extend([INFORMATION | {"content": "word and word " * 900}], last_token_id=0)
    assert len(delta) == TAGS["search_r1"].max_result_tokens
    text = chatml.decode(delta)
    assert text.startswith("\n\n<information>word and word")
    assert text.endswith("</information>\n\n")


def test_the_opening_stands_before_every_turn(chatml):
    renderer = ContinuationRenderer(chatml, tags=TAGS["asearcher"])
    assert chatml.decode(renderer.start([{"role": "user", "content": "q"}])).endswith("assistant\n<think>\n")
    assert chatml.decode(renderer.extend([INFORMATION], last_token_id=0)).endswith(
        "</information>\n<think>\n"
    )


@pytest.mark.catalogue("B41")
@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "a ", "\n", "</information>"]))
)
def test_passages_never_become_special_tokens(chatml, renderer, parts):
    delta = renderer.extend([INFORMATION | {"content": "".join(parts)}], last_token_id=0)
    assert not renderer.special_token_ids & set(delta)


class Writes:
    """A token policy that writes given texts and stops where an engine would."""

    def __init__(self, tokenizer, texts):
        self.turns = [tokenizer.encode(text) for text in texts]
        self.prompts = []

    async def generate(self, *, prompt_ids, sampling):
        self.prompts.append(prompt_ids.tolist())
        turn = self.turns.pop(0)
        cut = turn[: sampling.max_tokens]
        return Generation(
            token_ids=tuple(cut),
            logprobs=(-1.0,) * len(cut),
            policy_versions=(0,) * len(cut),
            finish_reason="stop" if len(cut) == len(turn) else "length",
        )


def play(tokenizer, env, texts, *, max_tokens_per_turn=200):
    policy = Writes(tokenizer, texts)
    dialect = make_dialect("search_r1")
    episode = asyncio.run(
        play_tokens(
            env=env,
            policy=policy,
            renderer=make_renderer(tokenizer, dialect),
            dialect=dialect,
            task="train-0",
            seed=0,
            limits=EpisodeLimits(
                max_turns=9, max_tokens_per_turn=max_tokens_per_turn, max_tokens_per_episode=20_000
            ),
            episode_id="e",
            group_id="g",
        )
    )
    return episode, policy


def town(env):
    return env.tasks("train").find("train-0").label[0]


def whole_text(tokenizer, episode):
    [segment] = episode.segments
    return tokenizer.decode(segment.token_ids)


def test_an_episode_is_one_assistant_turn(chatml):
    env = make("polyturn/SearchR1-v0", reward="exact_match_and_format")
    searches = [SEARCH, "<think> where? </think><search>Garley Glassworks</search>"]
    last = f"<think> so </think> <answer> {town(env)} </answer>"
    episode, policy = play(chatml, env, [*searches, last])
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0)
    text = whole_text(chatml, episode)
    assert text.count("<|im_start|>assistant") == 1
    assert text.count("<information>Doc 1(Title: ") == 2
    assert "# Tools" not in text
    assert "tool_call" not in text
    [segment] = episode.segments
    sampled = [token for token, own in zip(segment.token_ids, segment.sampled, strict=True) if own]
    written = "".join([*searches, last])
    assert chatml.decode(sampled) == written, "all that the policy wrote is trained, and nothing else"
    assert policy.prompts[1] == segment.token_ids[: len(policy.prompts[1])].tolist()
    assert episode.metrics["num_searches"] == 2


def test_a_cut_text_without_an_action_is_invalid_and_the_episode_goes_on(chatml):
    env = make("polyturn/SearchR1-v0")
    long = "<think> " + "hm " * 100
    episode, _ = play(chatml, env, [long, f"<answer> {town(env)} </answer>"], max_tokens_per_turn=60)
    assert (episode.outcome, episode.reward) == (Outcome.COMPLETED, 1.0)
    assert SEARCH_R1_INVALID in whole_text(chatml, episode)
    assert episode.metrics["num_invalid_actions"] == 1


def test_a_search_in_the_final_turn_is_not_made_and_the_episode_ends(chatml):
    env = make("polyturn/SearchR1-v0", max_searches=2)
    episode, _ = play(chatml, env, [SEARCH] * 3)
    assert (episode.outcome, episode.reward, episode.num_turns) == (Outcome.TRUNCATED, 0.0, 3)
    assert episode.metrics["num_searches"] == 2
    assert episode.metrics["num_repeated_searches"] == 1


def test_dialects_parse_by_their_tags():
    message = make_dialect("r1_searcher").parse("hm <|begin_of_query|> Ida <|end_of_query|>")
    assert dict(message.tool_calls[0].arguments) == {"query": "Ida"}
    assert TagDialect(TAGS["r1_searcher"]).parse("no action").tool_calls == (), "the episode ends there"
