"""TwoHopSearch as an environment: its oracle is always right, and whoever does not search twice is at chance."""

import random
import warnings
from dataclasses import replace

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from polyturn.agents.dialects import HermesDialect
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make
from polyturn.envs.tool_env import ToolEnv
from polyturn.envs.two_hop.env import (
    Demonstrator,
    build_world,
    find_fact,
    make_random_policy,
    oracle,
    person_of,
    search_for,
)
from polyturn.envs.two_hop.world import BIRTH_PHRASES, EMPLOYER_PHRASES, town_names
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.retrieval import search_tool
from polyturn.tools.toolset import Toolset

ENV_ID = "polyturn/TwoHopSearch-v0"
CHANCE = 0.04
"""Above what guessing among 96 towns scores on a few hundred questions, by more than three standard errors."""


@pytest.fixture(scope="module")
def env() -> ToolEnv:
    return make(ENV_ID, split="heldout")


def play(env: ToolEnv, script, *, split: str = "heldout", num_tasks: int = 300) -> tuple[float, float]:
    """Mean reward and mean number of turns of a script."""
    total, num_turns = 0.0, 0
    tasks = list(env.tasks(split))[:num_tasks]
    for task in tasks:
        observation, _ = env.reset(options={"task": task})
        messages = list(observation)
        done = False
        while not done:
            action = script(messages, env.tools)
            messages.append(action.to_message())
            observation, reward, terminated, truncated, _ = env.step(action)
            messages += observation
            total, num_turns, done = total + reward, num_turns + 1, terminated or truncated
    return total / len(tasks), num_turns / len(tasks)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_two_searches_suffice_for_every_question(env, split):
    assert play(env, oracle, split=split, num_tasks=1500) == (1.0, 3.0)


def test_the_oracle_is_right_in_other_worlds_too():
    assert play(make(ENV_ID, world_seed=77, num_people=300, num_employers=60), oracle) == (1.0, 3.0)


def test_the_random_policy_is_at_chance(env):
    assert play(env, make_random_policy(0))[0] < CHANCE


def test_whoever_does_not_search_is_at_chance(env):
    rng = random.Random(0)
    assert play(env, lambda *_: AssistantMessage(content=rng.choice(town_names())))[0] < CHANCE
    # The most frequent town of the training questions does no better.
    train = [question.town for question in build_world(1, env.unwrapped.size).questions["train"]]
    favourite = max(set(train), key=train.count)
    assert play(env, lambda *_: AssistantMessage(content=favourite))[0] < CHANCE


def test_whoever_searches_once_is_at_chance(env):
    rng = random.Random(0)

    def one_search(messages, tools):
        person = person_of(messages[1]["content"])
        results = [m["content"] for m in messages if m["role"] == "tool"]
        if not results:
            return search_for(person)
        seen = [town for town in town_names() if town in results[0]]
        return AssistantMessage(content=rng.choice(seen) if seen else "nowhere")

    assert play(env, one_search)[0] < CHANCE

    def birth_town(messages, tools):
        results = [m["content"] for m in messages if m["role"] == "tool"]
        if not results:
            return search_for(person_of(messages[1]["content"]))
        return AssistantMessage(
            content=find_fact(results[0], person_of(messages[1]["content"]), BIRTH_PHRASES) or ""
        )

    assert play(env, birth_town)[0] < CHANCE


def test_with_texts_shuffled_among_titles_the_oracle_is_at_chance(env):
    passages = list(build_world(1, env.unwrapped.size).passages)
    texts = [passage.text for passage in passages]
    random.Random(0).shuffle(texts)
    shuffled = [replace(passage, text=text) for passage, text in zip(passages, texts, strict=True)]
    env = make(ENV_ID, split="heldout")
    env.unwrapped.toolset = Toolset([search_tool(BM25Index.build(shuffled), top_k=2)])
    assert play(env, oracle)[0] < CHANCE


def test_the_index_ranks_the_entity_of_the_query_first(env):
    world = build_world(1, env.unwrapped.size)
    index = BM25Index.build(world.passages)
    for question in world.questions["heldout"][:300]:
        for name in (question.person, question.employer):
            assert index.search(name, 2)[0].title == name


def test_the_answer_is_shown_to_nobody_before_the_end(env):
    for task in list(env.tasks("heldout"))[:100]:
        observation, info = env.reset(options={"task": task})
        assert task.label not in str(observation) + str(info)
        person = person_of(observation[1]["content"])
        observation, reward, *_, info = env.step(search_for(person))
        employer = find_fact(observation[0]["content"], person, EMPLOYER_PHRASES)
        assert employer
        assert info["reward_parts"] == {}
        assert reward == 0.0


def test_an_answer_is_compared_after_normalisation(env):
    task = env.tasks("heldout")[0]
    for text, reward in ((f" {task.label.upper()}. ", 1.0), (f"{task.label} or Ludford", 0.0), ("", 0.0)):
        env.reset(options={"task": task})
        _, got, terminated, _, info = env.step(AssistantMessage(content=text))
        assert (got, terminated) == (reward, True)
        assert info["reward_parts"] == {"exact_match": reward}


def test_the_environment_passes_gymnasiums_checker():
    made = gymnasium.make(ENV_ID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"top_k": 0}, "top_k"),
        ({"split": "test"}, "train, heldout"),
        ({"num_people": 10**6}, "people of pool"),
    ],
)
def test_bad_arguments_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        make(ENV_ID, **arguments)


def demonstrate(env: ToolEnv, skill: float, num_tasks: int = 400) -> float:
    demonstrator, dialect = Demonstrator(skill=skill, seed=0), HermesDialect()
    return play(env, lambda messages, _: dialect.parse(demonstrator.reply(messages)), num_tasks=num_tasks)[0]


def test_a_demonstrator_is_as_good_as_its_skill(env):
    assert demonstrate(env, 1.0) == 1.0
    assert 0.25 < demonstrate(env, 0.7) < 0.5
    assert demonstrate(env, 0.0) < CHANCE
