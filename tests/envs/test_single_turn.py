"""SingleTurn: a task file and a rule make an environment."""

import json
import warnings

import pytest
from gymnasium.utils.env_checker import check_env

import polyturn
from polyturn.envs.messages import AssistantMessage


def score(env, answer):
    return env.step(AssistantMessage(content=answer))[1:3]


def test_it_passes_gymnasiums_checker_and_its_oracle_is_right():
    env = polyturn.make("polyturn/SingleTurn-v0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
    for split in ("train", "heldout"):
        tasks = env.tasks(split)
        for index in range(len(tasks)):
            messages, _ = env.reset(options={"task": tasks[index]})
            a, b = (
                int(word.strip("?")) for word in messages[0]["content"].split() if word.strip("?").isdigit()
            )
            assert tasks[index].label == str(a + b)
            assert env.step(env.oracle(messages, ()))[1:3] == (1.0, True)
    train, heldout = env.tasks("train"), env.tasks("heldout")
    assert not {train[i].task_id for i in range(len(train))} & {
        heldout[i].task_id for i in range(len(heldout))
    }


def test_the_random_player_scores_less_and_repeats_under_its_seed():
    env = polyturn.make("polyturn/SingleTurn-v0")
    scores = []
    for seed in range(50):
        env.reset(seed=seed)
        answers = [env.random_policy(seed)((), ()).content for _ in range(2)]
        assert answers[0] == answers[1]
        scores.append(score(env, answers[0])[0])
    assert sum(scores) < 10


def test_a_file_a_rule_and_a_system_prompt(tmp_path):
    path = tmp_path / "tasks.jsonl"
    rows = [{"prompt": f"Which is {i}?", "answer": i, "id": f"q{i}"} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = polyturn.make(
        "polyturn/SingleTurn-v0",
        tasks=f"{path}@[1:]",
        reward={"name": "multiple_choice", "options": {"answer": "boxed"}},
        system_prompt="Answer in a box.",
    )
    assert len(env.tasks("train")) == len(env.tasks("any split")) == 4
    messages, _ = env.reset(options={"task": "q2"})
    assert [message["role"] for message in messages] == ["system", "user"]
    assert score(env, r"\boxed{C}") == (1.0, True)
    env.reset(options={"task": "q2"})
    assert score(env, "C") == (0.0, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "exactmatch"}, "no reward rule 'exactmatch'; did you mean 'exact_match'"),
        ({"split": "test"}, "unknown split 'test'; the splits are train, heldout"),
        ({"tasks": "none.jsonl"}, r"none\.jsonl: no such task file"),
        (
            {"reward": {"kind": "remote", "url": "http://127.0.0.1:1/"}},
            "must be a rule or a function that is not async",
        ),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        polyturn.make("polyturn/SingleTurn-v0", **options)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        polyturn.make("polyturn/SingleTurn-v0").tasks("dev")
