"""Solvers, critics and a selector: who sees what, and who earns what."""

import re
import warnings
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env

from polyturn.envs.messages import AssistantMessage
from polyturn.envs.multi_agent import MAX_SHOWN, SPLITS, last_line
from polyturn.envs.registry import make

ENV_ID = "polyturn/SolveCritiqueSelect-v0"


def play(env, task, script):
    """The reward, what each role was shown, and the last info."""
    observation, info = env.reset(options={"task": task})
    shown, reward, done = {}, 0.0, False
    while not done:
        shown[info["role"]] = observation
        observation, part, terminated, truncated, info = env.step(script(info["role"]))
        reward, done = reward + part, terminated or truncated
    return reward, shown, info


def scripted(**texts):
    return lambda role: AssistantMessage(content=texts[role.replace("/", "_")])


@pytest.fixture
def env():
    return make(ENV_ID)


@pytest.fixture
def task(env):
    return env.tasks("train")[0]


def test_gymnasiums_checker_has_no_complaint(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)


@pytest.mark.parametrize("num_solvers", [1, 3])
def test_the_oracle_is_always_right_and_a_random_policy_hardly_ever(num_solvers):
    env = make(ENV_ID, num_solvers=num_solvers)
    for split in SPLITS:
        tasks = [env.tasks(split)[index] for index in range(200)]
        assert {play(env, task, lambda role: env.oracle((), ()))[0] for task in tasks} == {1.0}
        scripts = [env.random_policy(seed) for seed in range(len(tasks))]
        rewards = [
            play(env, task, lambda role, script=script: script((), ()))[0]
            for task, script in zip(tasks, scripts, strict=True)
        ]
        assert sum(rewards) < 5


def test_the_splits_share_no_problem(env):
    texts = [{task.messages[0]["content"] for task in env.tasks(split)} for split in SPLITS]
    assert all(len(of_one) == 500 for of_one in texts) and not texts[0] & texts[1]


def test_each_role_earns_its_own(env, task):
    right, wrong = str(task.label), str(task.label + 1)
    reward, _, info = play(
        env,
        task,
        scripted(
            solver_0=f"First I add.\n{wrong}",
            solver_1=f"Let me see.\n{right}\n",
            critic_0="It forgot to carry.\nWrong",
            critic_1="wrong",
            selector="The second looks better.\n2",
        ),
    )
    assert (reward, info["reward_parts"]) == (1.0, {"picked_right": 1.0})
    assert info["role_rewards"] == {
        "solver/0": 0.0,
        "solver/1": 1.0,
        "critic/0": 1.0,
        "critic/1": 0.0,
        "selector": 1.0,
    }
    assert info["metrics"] == {"any_right": 1.0}


def test_a_role_sees_what_is_meant_for_it_and_nothing_else(env, task):
    _, shown, _ = play(
        env,
        task,
        scripted(
            solver_0="alpha 11", solver_1="beta 22", critic_0="gamma right", critic_1="delta", selector="1"
        ),
    )
    text = {role: "\n".join(message["content"] for message in said) for role, said in shown.items()}
    assert list(text) == ["solver/0", "solver/1", "critic/0", "critic/1", "selector"]
    words = ("alpha", "beta", "gamma", "delta")
    assert {role: [word for word in words if word in of_one] for role, of_one in text.items()} == {
        "solver/0": [],
        "solver/1": [],
        "critic/0": ["alpha"],
        "critic/1": ["beta"],
        "selector": list(words),
    }
    assert all(task.messages[0]["content"] in of_one for of_one in text.values())


@pytest.mark.parametrize(
    "text", ["", "I do not know", "1e999", "inf", "right wrong", "\\boxed{1} \\boxed{2}", "٣", "1\n2\n1 or 2"]
)
def test_one_and_the_same_nonsense_from_everybody_is_not_paid(env, text):
    rewards = [
        play(env, env.tasks("train")[i], lambda role: AssistantMessage(content=text))[0] for i in range(100)
    ]
    assert set(rewards) == {0.0}


def test_a_flood_is_cut_before_others_must_read_it(env, task):
    _, shown, _ = play(
        env,
        task,
        scripted(solver_0="x" * 10**6, solver_1="1", critic_0="right", critic_1="right", selector="1"),
    )
    assert len(shown["critic/0"][1]["content"]) < MAX_SHOWN + 200


def test_the_debate_of_the_docs_works_as_it_stands_there():
    document = Path(__file__).parents[3] / "docs" / "multi_agent.md"
    source = re.search(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)[1]
    names: dict = {"__name__": "documented_debate"}
    exec(compile(source, str(document), "exec"), names)
    env = names["Debate"]()
    observation, info = env.reset(seed=0)
    assert (observation[0]["content"], info["role"]) == ("Argue for: Cats are better than dogs.", "pro")
    observation, _, _, _, info = env.step(AssistantMessage(content="They purr."))
    assert (observation[0]["content"], info["role"]) == ("Argue against: They purr.", "con")
    _, reward, terminated, _, info = env.step(AssistantMessage(content="Bark."))
    assert (reward, terminated, info["role_rewards"]) == (1.0, True, {"pro": 1.0, "con": 0.5})


def test_the_last_line_is_what_counts():
    assert last_line("a\n b \n\n  ") == "b"
    assert last_line("") == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_solvers": 0}, "num_solvers must be at least 1"), ({"split": "dev"}, "unknown split 'dev'")],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        make(ENV_ID, **options)
