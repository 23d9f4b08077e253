"""Labels that can never be paid are found before a run starts, with their number and the first line."""

import json

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.rewards.rules import check_label, make_rule
from polyturn.trainer.run.preflight import check_environment


def config(path, *, env="polyturn/SingleTurn-v0", source=None, **sections):
    return RunConfig.model_validate(
        {
            "name": "test",
            "environment": {"id": env, "tasks": [{"path": str(path), **(source or {})}]},
            "model": {"path": "builtin:tiny-searcher"},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4},
            "trainer": {"num_steps": 1, "global_batch_size": 32},
            **sections,
        }
    )


def check(config):
    check_environment(config, ("train",), resolve_model_path(config.model.path))


def write(path, labels):
    path.write_text("".join(json.dumps({"prompt": "p", "answer": label}) + "\n" for label in labels))
    return path


CHECK = "def check(candidate):\n    assert candidate(1) == 2"
GOOD = {"numeric": "4", "multiple_choice": "B", "math": "4"}
RIGHT = "one of the right answers"


@pytest.mark.parametrize(
    ("rule", "options", "label", "words"),
    [
        ("exact_match", {}, "  ", "the label must be a text that is not empty"),
        ("exact_match", {"answer": "last_line"}, "two\nlines", "no answer can be paid for the label"),
        ("exact_match", {"answer": "boxed"}, "an } open {", "no answer can be paid for the label"),
        ("exact_match", {}, "a</think>b", "no answer can be paid for the label"),
        ("exact_match", {}, "x" * 20_001, "no answer can be paid for the label"),
        ("exact_match", {}, {"a": 1}, "the label must be a text"),
        ("contains", {}, "word " * 65, "no answer can be paid for the label"),
        ("contains", {}, "unknown", "no answer can be paid for the label"),
        ("contains", {}, "+", "no answer can be paid for the label"),
        ("multiple_choice", {}, "K", "the label must be a letter from A to J"),
        ("numeric", {}, "many", "the label must be a number"),
        ("numeric", {}, ["4", "5"], "the label must be a number"),
        ("math", {}, "((", "no answer can be paid for the label"),
        ("math", {}, "\\begin{cases} x", "no answer can be paid for the label"),
        ("math", {}, {"a": 1}, "no answer can be paid for the label"),
    ],
)
def test_what_a_rule_can_never_pay_is_counted_and_named(tmp_path, rule, options, label, words):
    labels = [GOOD.get(rule, RIGHT)] * 60
    labels[40] = labels[55] = label
    path = write(tmp_path / "rows.jsonl", labels)
    reward = {"kind": "rule", "name": rule, "options": options}
    with pytest.raises(ConfigError) as error:
        check(config(path, reward=reward))
    assert f"rows.jsonl:41: task 'rows-41': {rule}: {words}" in str(error.value)
    assert str(error.value).endswith("; so it is with 2 of the 60 tasks looked at")
    write(path, labels[:40])
    check(config(path, reward=reward))


@pytest.mark.parametrize(
    ("env", "good", "label"),
    [
        ("polyturn/Math-v0", "4", "(("),
        ("polyturn/SearchR1-v0", ["Paris"], ["  "]),
        ("polyturn/Search-v0", "Paris", 4),
        ("polyturn/SingleTurn-v0", "x", " "),
        (
            "polyturn/CodeUnitTests-v0",
            {"entry_point": "f", "cases": [{"args": [1], "expected": 2}]},
            "f(1) == 2",
        ),
        (
            "polyturn/CodeUnitTests-v0",
            {"entry_point": "f", "test": CHECK},
            {"entry_point": "f", "test": "pass"},
        ),
        ("polyturn/CodeStdio-v0", [{"input": "1", "output": "2"}], []),
    ],
)
def test_what_an_environment_can_never_pay_is_named(tmp_path, env, good, label):
    path = write(tmp_path / "rows.jsonl", [good] * 50 + [label])
    with pytest.raises(ConfigError, match=r"rows\.jsonl:51: task 'rows-51': "):
        check(config(path, env=env))
    write(path, [good] * 50)
    check(config(path, env=env))


def test_numbers_and_lists_of_right_answers_are_labels_of_the_verifier(tmp_path):
    path = write(tmp_path / "rows.jsonl", [4, 0.5, "1/2", ["1/2", "0.5"]])
    for env in ("polyturn/Math-v0", "polyturn/SingleTurn-v0"):
        check(config(path, env=env, reward={"kind": "rule", "name": "math"}))
    check(config(path, env="polyturn/Math-v0"))


def test_a_slice_names_the_line_of_its_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", ["4"] * 50 + ["many"])
    reward = {"kind": "rule", "name": "numeric"}
    with pytest.raises(ConfigError, match=r"rows\.jsonl:51: "):
        check(config(f"{path}@[10:]", reward=reward))
    check(config(f"{path}@[:50]", reward=reward))
    check(config(path, source={"check_rows": 50}, reward=reward))


def test_the_reward_that_a_row_chooses_checks_its_label(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "answer": "4"}, {"prompt": "p", "answer": "many", "reward": "numeric"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ConfigError, match=r"rows\.jsonl:2: task 'rows-2': numeric: the label must be a number"
    ):
        check(config(path, source={"rewards": ["numeric"]}, reward={"kind": "rule", "name": "exact_match"}))


@pytest.mark.parametrize("answer", ["all", "last_line", "boxed", "tag"])
@pytest.mark.parametrize(
    ("rule", "label"),
    [
        ("exact_match", "A"),
        ("f1", "no"),
        ("contains", ["Paris", "x"]),
        ("numeric", 0.1),
        ("multiple_choice", 3),
    ],
)
def test_labels_that_can_be_paid_pass(rule, label, answer):
    check_label(make_rule(rule, {"answer": answer}), label)


def test_parts_of_a_rubric_check_the_label(tmp_path):
    path = write(tmp_path / "rows.jsonl", ["many"])
    parts = [
        {"name": "form", "weight": 0.1, "reward": {"kind": "rule", "name": "format"}},
        {"name": "right", "reward": {"kind": "rule", "name": "numeric"}},
    ]
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: .*part 'right': numeric: the label must be"):
        check(config(path, reward={"kind": "rubric", "parts": parts}))
