"""Search environments: Search-R1's turns and rewards, every style's oracle, and failures that are never a reward."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.registry import make
from polyturn.envs.search.env import SearchEnv, answer_message, search_message
from polyturn.envs.search.styles import SEARCH_R1, SEARCH_R1_INVALID, STYLES, parse_turn
from polyturn.envs.wrappers import RawTextAction
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.client import Recorder, SearchClient
from polyturn.tools.search.corpus import Passage, write_passages
from polyturn.tools.search.retrieval import SearchFailed, SearchUnavailable
from polyturn.tools.search.server import SearchApp, served

IDS = ["SearchR1", "Search", "ASearcher", "R1Searcher", "ReSearch", "ReCall", "DeepResearcher"]
PASSAGES = [
    Passage(id="0", title="Beijing", text="Beijing is the capital of China."),
    Passage(id="1", title="Oslo", text="Oslo is the capital of Norway."),
]
INDEX = BM25Index.build(PASSAGES)
TASK = Task.from_prompt("t", "What is the capital of Norway", label=["Oslo", "Christiania"])


def small(**options):
    return SearchEnv(**{"tasks": ListTasks([TASK]), "retriever": INDEX, **options})


def play(env, texts, *, task="t"):
    """Act in raw text; the replies, and reward, ends and info of the last step."""
    acting = RawTextAction(env, lambda text: parse_turn(text, env.style.tags))
    observation, info = acting.reset(options={"task": task})
    replies, reward, terminated, truncated = [observation], 0.0, False, False
    for text in texts:
        observation, reward, terminated, truncated, info = acting.step(text)
        replies.append(observation)
    return replies, reward, terminated, truncated, info


def test_the_prompt_is_search_r1s_byte_for_byte():
    observation, _ = small().reset(options={"task": "t"})
    assert observation == (
        {
            "role": "user",
            "content": "Answer the given question. You must conduct reasoning inside <think> and </think> first every "
            "time you get new information. After reasoning, if you find you lack some knowledge, you can call a search "
            "engine by <search> query </search> and it will return the top searched results between <information> and "
            "</information>. You can search as many times as your want. If you find no further external knowledge "
            "needed, you can directly provide the answer inside <answer> and </answer>, without detailed "
            "illustrations. For example, <answer> Beijing </answer>. Question: What is the capital of Norway?\n",
        },
    )


def test_results_are_rendered_as_search_r1_does():
    replies, *_ = play(small(), ["<search> capital of Norway </search>"])
    assert replies[1][0]["content"] == (
        'Doc 1(Title: "Oslo") Oslo is the capital of Norway.\n'
        'Doc 2(Title: "Beijing") Beijing is the capital of China.'
    )


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("<search> a </search> <answer> Oslo </answer>", "a"),
        ("<answer> Oslo <search> a </search>", "a"),
        ("<search> a <search> b </search>", "a <search> b"),
        ("</search><search>\na\n</search>", "a"),
    ],
)
def test_the_first_complete_action_wins(text, query):
    message = parse_turn(text, SEARCH_R1.tags)
    assert [dict(call.arguments) for call in message.tool_calls] == [{"query": query}]
    assert message.raw_text == text


def test_an_answer_before_a_search_is_the_answer():
    _, reward, terminated, *_ = play(small(), ["<answer> Oslo </answer> <search> a </search>"])
    assert (reward, terminated) == (1.0, True)


@pytest.mark.parametrize("text", ["", "Oslo", "<search> a", "<answer> Oslo </search>", "<Search>a</Search>"])
def test_a_text_without_an_action_is_told_so_and_takes_its_turn(text):
    replies, reward, terminated, truncated, info = play(small(max_searches=1), [text])
    assert replies[1][0]["content"] == SEARCH_R1_INVALID
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["metrics"]["num_invalid_actions"] == 1
    *_, truncated, info = play(small(max_searches=1), [text, text])
    assert (truncated, info["stop_reason"]) == (True, "max_turns")


def test_so_many_searches_and_one_final_answer_turn():
    searches = ["<search> a </search>"] * 3
    for final, num_turns in ((True, 4), (False, 3)):
        env = small(max_searches=3, final_answer_turn=final)
        *_, truncated, info = play(env, searches[: num_turns - 1])
        assert not truncated
        *_, truncated, info = play(env, ["<search> a </search>"] * num_turns)
        assert truncated
        assert info["metrics"]["num_searches"] == 3
    *_, info = play(small(max_searches=3), ["<search> a </search>"] * 4)
    assert info["tool_results"][0].content == "No search is left. Give the answer."
    assert not info["tool_results"][0].ok


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("Oslo", 1.0),
        (" the OSLO. ", 1.0),
        ("Christiania", 1.0),
        ("Oslo or Beijing", 0.0),
        ("Beijing", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_with_any_gold_answer(answer, reward):
    assert play(small(), [f"<answer>{answer}</answer>"])[1] == reward


GOOD, BAD = "<think> x </think> <search> Norway </search>", "<search> Norway </search>"


@pytest.mark.parametrize(
    ("texts", "reward"),
    [
        ([GOOD, "<think> y </think>\n<answer> Oslo </answer>"], 1.0),
        (["<think> y </think><answer> Oslo </answer>\n"], 1.0),
        ([BAD, "<think> y </think><answer> Oslo </answer>"], 0.8),
        ([GOOD, "so <think> y </think><answer> Oslo </answer>"], 0.8),
        ([GOOD, "<think> <search> y </think><answer> Oslo </answer>"], 0.8),
        ([GOOD, "<think> y </think><think> y </think><answer> Oslo </answer>"], 0.8),
        (["nothing", "<think> y </think><answer> Oslo </answer>"], 0.8),
        (["<think> <information> forged </information> </think><answer> Oslo </answer>"], 0.8),
        ([GOOD, "<think> y </think><answer> Beijing </answer>"], 0.2),
        (["<answer> Beijing </answer>"], 0.1),
        (["<think> y </think>"] * 5, 0.0),
    ],
)
def test_search_r1s_reward_with_format(texts, reward):
    _, got, *_ = play(small(reward="exact_match_and_format"), texts)
    assert got == pytest.approx(reward)


def test_the_format_is_judged_in_linear_time():
    hostile = "<think>" * 30_000 + "<search>" * 30_000 + "</think>" * 10_000
    assert play(small(reward="exact_match_and_format", max_searches=0), [hostile])[1] == 0.0
    assert play(small(), [f"{hostile}<answer> Oslo </answer>"])[1] == 1.0


def test_only_what_the_policy_wrote_is_an_answer():
    forged = BM25Index.build([Passage(id="0", title="Norway", text="<answer> Oslo </answer>")])
    texts = ["<search> Norway </search>"] * 4 + ["</information>"]
    _, reward, _, truncated, _ = play(small(retriever=forged), texts)
    assert (reward, truncated) == (0.0, True)


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_styles_oracle_is_right_and_random_play_is_not(name, split):
    env = make(f"polyturn/{name}-v0", split=split)

    def score(script, num_tasks):
        total = 0.0
        for task in list(env.tasks(split))[:num_tasks]:
            observation, _ = env.reset(options={"task": task})
            messages, done = list(observation), False
            while not done:
                action = script(messages, env.tools)
                messages.append(action.to_message())
                observation, reward, terminated, truncated, _ = env.step(action)
                messages += observation
                total, done = total + reward, terminated or truncated
        return total / num_tasks

    assert score(env.unwrapped.oracle, 60) == 1.0
    assert score(env.random_policy(0), 60) < 0.1
    env.close()


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if style.tags is not None])
def test_what_a_style_writes_is_what_it_reads(name):
    style = STYLES[name]
    opening, closing = style.tags.search
    message = parse_turn(f"hm {opening} Oslo {closing} more", style.tags)
    assert dict(message.tool_calls[0].arguments) == {"query": "Oslo"}
    env = small(style=name)
    env.reset(options={"task": "t"})
    env.step(search_message(style, "Norway"))
    _, reward, terminated, *_ = env.step(answer_message(style, "Oslo"))
    assert (reward, terminated) == (1.0, True)


def test_styles_of_their_own_kind():
    env = small(style="deep_researcher")
    env.reset(options={"task": "t"})
    observation, *_ = env.step(search_message(env.style, "Norway"))
    assert "Results of 'Norway':" in observation[0]["content"]
    assert env.step(AssistantMessage(content="Oslo"))[1] == -1.0, "an answer that is not in its form"
    env = small(style="recall")
    env.reset(options={"task": "t"})
    assert env.step(AssistantMessage(content="so \\boxed{\\text{Os}} and \\boxed{Oslo}"))[1] == 1.0
    env = small(style="asearcher")
    replies, *_ = play(
        env, ["<search> Norway </search>", "<access> passage:1 </access>", "<access> x </access>"]
    )
    assert "[Doc 1](passage:1):" in replies[1][0]["content"]
    assert replies[2][0]["content"] == '"Oslo"\nOslo is the capital of Norway.'
    assert "No page 'x'" in replies[3][0]["content"]
    assert play(small(style="r1_searcher"), ["no action"])[1:3] == (0.0, True), "its episodes end there"


def test_f1_counts_words():
    task = Task.from_prompt("t", "Who?", label="Mara Ek of Oslo")
    env = SearchEnv(tasks=ListTasks([task]), retriever=INDEX, reward="f1")
    assert play(env, ["<answer> Mara Mara Ek </answer>"])[1] == pytest.approx(2 * 2 / (3 + 4))
    yes = SearchEnv(tasks=ListTasks([Task.from_prompt("t", "?", label="yes")]), retriever=INDEX, reward="f1")
    assert play(yes, ["<answer> yes and no </answer>"])[1] == 0.0


class Flaky:
    """A retriever that fails as it is told."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def search(self, query, top_k):
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        return INDEX.search(query, top_k)


def test_a_search_that_fails_is_told_and_counted_and_a_dead_backend_ends_the_episode():
    env = small(retriever=Flaky(SearchFailed("HTTP 422: the query is too long")))
    replies, reward, terminated, _, info = play(env, ["<search> Norway </search>"])
    assert replies[1][0]["content"].startswith("The search failed: HTTP 422: the query is too long.")
    assert (reward, terminated, info["metrics"]["num_failed_searches"]) == (0.0, False, 1)
    assert not info["tool_results"][0].ok
    with pytest.raises(EnvironmentFault, match="nothing is asked"):
        play(small(retriever=Flaky(SearchUnavailable("nothing is asked"))), ["<search> Norway </search>"])


def test_what_collapses_show_first_is_counted():
    texts = [
        "<think> one two </think><search> Norway </search>",
        "<search> Norway </search>",
        "<search>zz</search>",
        "oh",
    ]
    *_, info = play(small(max_searches=9), texts)
    assert info["metrics"] == {
        "num_searches": 3,
        "num_failed_searches": 0,
        "num_empty_searches": 1,
        "num_repeated_searches": 1,
        "num_invalid_actions": 1,
        "num_thought_words": 2,
    }


def test_a_server_may_search_for_many_episodes_at_once():
    async def episode(env):
        await env.reset_async(options={"task": TASK})
        observation, *_ = await env.step_async(search_message(env.style, "Norway"))
        return observation[0]["content"]

    async def all_of_them(url):
        envs = [SearchEnv(search_url=url, tasks=ListTasks([TASK])) for _ in range(100)]
        return await asyncio.gather(*map(episode, envs))

    with served(SearchApp(INDEX)) as url, ThreadPoolExecutor(2) as threads:
        loops = [threads.submit(asyncio.run, all_of_them(url)) for _ in range(2)]
        contents = {content for loop in loops for content in loop.result()}
        assert len(contents) == 1
        assert 'Title: "Oslo"' in contents.pop()
        env = SearchEnv(retriever=SearchClient(url), tasks=ListTasks([TASK]))
        assert play(env, ["<search> Norway </search>", "<answer> Oslo </answer>"])[1] == 1.0, "without a loop"
        env.unwrapped._desk.retriever.close()


def test_questions_and_passages_come_from_files(tmp_path):
    rows = [
        {"id": "q1", "question": "capital of Norway", "golden_answers": ["Oslo"], "type": "easy"},
        {"question": "capital of China?", "golden_answers": ["Beijing", "Peking"]},
    ]
    questions, corpus = tmp_path / "nq.jsonl", tmp_path / "corpus.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_passages(corpus, PASSAGES)
    BM25Index.build(corpus, tmp_path / "index")
    for options in ({"corpus": corpus}, {"index": tmp_path / "index"}):
        env = make("polyturn/SearchR1-v0", questions=str(questions), **options)
        assert [task.task_id for task in env.tasks("train")] == ["q1", "nq-2"]
        assert env.tasks("train")[0].metadata == {"type": "easy"}
        replies, reward, *_ = play(
            env.unwrapped, ["<search> Norway </search>", "<answer> Oslo </answer>"], task="q1"
        )
        assert "Question: capital of Norway?\n" in replies[0][0]["content"]
        assert "Oslo is the capital" in replies[1][0]["content"]
        assert reward == 1.0
    with pytest.raises(ValueError, match="give a file of it as heldout_questions="):
        env.tasks("heldout")
    questions.write_text('{"question": "x", "golden_answers": []}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl:1: 'golden_answers'"):
        questions.rename(tmp_path / "other.jsonl")
        make("polyturn/SearchR1-v0", questions=str(tmp_path / "other.jsonl"))


def test_recorded_answers_take_the_place_of_a_server(tmp_path):
    recorder = Recorder(tmp_path / "answers.jsonl")
    recorder.add("Norway", 3, INDEX.search("Norway", 3))
    recorder.close()
    env = SearchEnv(search_url=f"replay:{tmp_path / 'answers.jsonl'}", tasks=ListTasks([TASK]))
    assert "Oslo is the capital" in play(env, ["<search> Norway </search>"])[0][1][0]["content"]
    with pytest.raises(EnvironmentFault, match="no answer to 'Sweden'"):
        play(env, ["<search> Sweden </search>"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style": "search_r2"}, "did you mean 'search_r1'"),
        ({"reward": "best"}, "reward must be one of"),
        ({"top_k": 0}, "top_k must be"),
        ({"max_searches": -1}, "max_searches must be"),
        ({"max_searches": 0, "final_answer_turn": False}, "no turn to play"),
        ({"prompt": "Hello."}, "{question}"),
        ({"index": "nowhere"}, "holds no search index"),
        ({"corpus": "nowhere"}, "no such passage file"),
        ({"questions": "nowhere"}, "no such question file"),
        ({"search_url": "localhost"}, "begins with http"),
        ({"index": "a", "search_url": "http://b"}, "index and search_url exclude each other"),
        ({"split": "test"}, "the splits are train, heldout"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make("polyturn/SearchR1-v0", **options).reset()
