"""The text games: their oracles win, chance hardly does, and what they tell is true."""

import warnings

import pytest
from gymnasium.utils.env_checker import check_env

from polyturn.envs.games.code_breaker import compare
from polyturn.envs.games.treasure_hunt import make_house
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.registry import make
from polyturn.tools.types import ToolCall

CODE, HUNT = "polyturn/CodeBreaker-v0", "polyturn/TreasureHunt-v0"


def call(name, /, **arguments):
    return AssistantMessage(tool_calls=(ToolCall(id="c0", name=name, arguments=arguments),))


def play(env, task, script, *, max_turns=60):
    observation, _ = env.reset(options={"task": task})
    messages, reward, num_turns = list(observation), 0.0, 0
    while num_turns < max_turns:
        action = script(messages, env.tools)
        messages.append(action.to_message())
        observation, part, terminated, truncated, _ = env.step(action)
        messages += observation
        reward, num_turns = reward + part, num_turns + 1
        if terminated or truncated:
            break
    return reward, num_turns


@pytest.mark.parametrize("env_id", [CODE, HUNT])
def test_gymnasiums_checker_has_no_complaint(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(env_id))


@pytest.mark.parametrize(("env_id", "chance"), [(CODE, 0.1), (HUNT, 0.3)])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_oracle_wins_and_chance_hardly_does(env_id, chance, split):
    env = make(env_id)
    tasks = [env.tasks(split)[index] for index in range(60)]
    assert {play(env, task, env.oracle)[0] for task in tasks} == {1.0}
    lucky = [play(env, task, env.random_policy(number))[0] for number, task in enumerate(tasks)]
    assert sum(lucky) / len(lucky) < chance


def test_the_splits_share_no_code():
    env = make(CODE)
    codes = [{task.label for task in env.tasks(split)} for split in ("train", "heldout")]
    assert not codes[0] & codes[1]
    assert len(codes[0] | codes[1]) == 6**4


@pytest.mark.parametrize(
    ("guess", "code", "told"),
    [
        ("1122", "1122", (4, 0)),
        ("1122", "2211", (0, 4)),
        ("1112", "2111", (2, 2)),
        ("1234", "5656", (0, 0)),
        ("1123", "1456", (1, 0)),
    ],
)
def test_a_guess_is_compared_as_the_rules_say(guess, code, told):
    assert compare(guess, code) == told == compare(code, guess)


def test_a_game_ends_when_the_guesses_are_used_up_and_bad_guesses_do_not_count():
    env = make(CODE, max_guesses=2)
    task = next(task for task in env.tasks("train") if task.label != "1111")
    env.reset(options={"task": task})
    for bad in ("111", "11111", "1117", "abcd", "\uff11" * 4):
        _, _, terminated, _, info = env.step(call("guess", code=bad))
        assert not terminated and not info["tool_results"][0].ok
    assert env.step(call("guess", code="1111"))[2] is False
    observation, reward, terminated, _, info = env.step(call("guess", code="1111"))
    assert (reward, terminated, info["metrics"]) == (0.0, True, {"num_guesses": 2.0})
    assert observation[0]["content"].endswith("Guesses left: 0.")


def test_the_win_ends_the_game_with_the_guess():
    env = make(CODE)
    task = env.tasks("heldout")[0]
    env.reset(options={"task": task})
    observation, reward, terminated, _, _ = env.step(call("guess", code=task.label))
    assert (reward, terminated, observation[0]["content"]) == (
        1.0,
        True,
        "4 in place, 0 elsewhere. Guesses left: 9.",
    )


def test_saying_the_code_is_not_guessing_it():
    env = make(CODE)
    task = env.tasks("train")[0]
    env.reset(options={"task": task})
    assert env.step(AssistantMessage(content=task.label))[1:3] == (0.0, True)


def test_the_house_holds_together():
    for number in range(50):
        house = make_house(f"h{number}", width=4, height=4, num_keys=3)
        opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}
        for cell, doors in house.doors.items():
            assert all(opposite[d] in house.doors[house.beyond(cell, d)] for d in doors)
            house.first_step(house.start, cell)
        assert house.start != house.chest and house.fitting_key in house.keys


def test_the_chest_wants_its_key_and_the_treasure_an_open_chest():
    env = make(HUNT)
    task = env.tasks("train")[0]
    env.reset(options={"task": task})
    house = task.label
    other = next(key for key in house.keys if key != house.fitting_key)

    def answer(action):
        return env.step(action)[4]["tool_results"][0]

    def walk(goal):
        while (step := house.first_step(env._cell, goal)) is not None:
            answer(call("go", direction=step))

    assert not answer(call("take", thing=house.treasure)).ok
    walk(house.keys[other])
    assert answer(call("take", thing=f"the {other} key")).ok
    assert not answer(call("take", thing=f"{other} key")).ok
    walk(house.chest)
    refused = answer(call("open_chest", key=f"{other} key"))
    assert (refused.ok, refused.content) == (False, f"The {other} key does not fit.")
    assert not answer(call("open_chest", key=house.fitting_key)).ok
    closed = next(d for d in ("north", "east", "south", "west") if d not in house.doors[env._cell])
    assert "no door" in answer(call("go", direction=closed)).content
    assert f"the {other} key" in answer(call("look")).content
    assert not answer(call("take", thing=house.treasure)).ok


@pytest.mark.parametrize(
    ("env_id", "options", "words"),
    [
        (CODE, {"length": 0}, "length >= 1"),
        (CODE, {"length": 8, "num_digits": 9}, "too many"),
        (CODE, {"split": "dev"}, "unknown split 'dev'"),
        (HUNT, {"width": 9, "height": 9}, "from 2 to 16 rooms"),
        (HUNT, {"num_keys": 0}, "from 1 to 6 keys"),
        (HUNT, {"split": "dev"}, "unknown split 'dev'"),
    ],
)
def test_bad_options_are_named(env_id, options, words):
    with pytest.raises(ValueError, match=words):
        make(env_id, **options)
