"""`polyturn.load_config`, `polyturn.train` and `polyturn.evaluate`, which the command line calls."""

from __future__ import annotations

from pathlib import Path

import pytest

import polyturn
from polyturn.configs.loading import loader


@pytest.mark.usefixtures("workspace")
def test_options_are_values_or_written_as_on_the_command_line() -> None:
    written = ("seed=5", "trainer.optimizer.learning_rate=1e-6", "environment.options={size: 3}")
    wanted = loader.load_config("recipe.yaml", written)
    assert polyturn.load_config("recipe.yaml", *written) == wanted
    given = polyturn.load_config(
        Path("recipe.yaml"),
        "seed=5",
        trainer={"optimizer": {"learning_rate": 1e-6}},
        environment={"options": {"size": 3}},
    )
    assert given == wanted
    assert polyturn.load_config(given) is given
    texts = polyturn.load_config("recipe.yaml", name="1e3", run_dir=Path("runs/a"), output_dir="no # comment")
    assert (texts.name, texts.run_dir, texts.output_dir) == ("1e3", Path("runs/a"), Path("no # comment"))


@pytest.mark.usefixtures("workspace")
def test_what_is_wrong_is_a_config_error_and_nothing_is_started() -> None:
    with pytest.raises(polyturn.ConfigError, match=r"unknown key 'trainer.num_stepz', did you mean"):
        polyturn.train("recipe.yaml", trainer={"num_stepz": 3})
    with pytest.raises(polyturn.ConfigError, match=r"there is no recipe 'recipe\.yml'"):
        polyturn.train("recipe.yml")
    with pytest.raises(polyturn.ConfigError, match=r"^seed=1: a config that is loaded takes no options"):
        polyturn.train(polyturn.load_config("recipe.yaml"), seed=1)
    with pytest.raises(polyturn.ConfigError, match=r"^model_path: there is no directory 'nowhere'"):
        polyturn.evaluate("recipe.yaml", model_path="nowhere")
    with pytest.raises(polyturn.ConfigError, match=r"there is no finished run of 'test'"):
        polyturn.evaluate("recipe.yaml")
    assert not Path("runs").exists()


@pytest.mark.usefixtures("workspace")
def test_what_ends_a_run_is_a_run_failure_with_its_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    run = pytest.importorskip("polyturn.trainer.run.train", reason="training is not installed")

    def ended(*_: object, **__: object) -> Path:
        raise MemoryError("cannot allocate 4 GiB\nmore")

    monkeypatch.setattr(run, "train", ended)
    with pytest.raises(
        polyturn.RunFailure, match=r"^MemoryError: cannot allocate 4 GiB; lower sglang.max_total_tokens, "
    ):
        polyturn.train("recipe.yaml")


@pytest.mark.usefixtures("workspace")
def test_a_policy_that_is_named_is_evaluated_without_a_model_and_without_engines() -> None:
    """On the held-out tasks of the recipe, with the same seeds and the same interval as a model."""
    told: list[polyturn.EvaluationReport] = []
    for policy, mean in (("oracle", 1.0), ("random", 0.0)):
        reports = polyturn.evaluate(
            "recipe.yaml", "evaluation.num_tasks=8", policy=policy, on_report=told.append
        )
        assert reports == told[-1:]
        result = reports[0].result
        assert (result.mean, result.policy, reports[0].model_path) == (mean, policy, None)
        assert (result.num_tasks, result.num_failed) == (8, 0)
    best = polyturn.evaluate(
        "recipe.yaml",
        "evaluation.num_tasks=2",
        policy="best_of",
        policy_options={"policy": "oracle", "num_samples": 2, "by": "grade"},
    )[0].result
    assert best.policy.startswith("best of 2 episodes by the environment's grade (an upper bound")
    for policy, options, words in (
        ("oracel", {}, r"^policy: there is no policy 'oracel', did you mean 'oracle'"),
        ("oracle", {"a": 1}, r"^policy: the policy 'oracle' has no options"),
        ("scripted:nowhere.py:f", {}, r"^policy: nowhere.py: no such file"),
        ("best_of", {"policy": "model", "by": "x.py:f"}, r"there is no finished run of 'test'"),
    ):
        with pytest.raises(polyturn.ConfigError, match=words):
            polyturn.evaluate("recipe.yaml", policy=policy, policy_options=options)
    with pytest.raises(polyturn.ConfigError, match="'oracle' is not made of a model"):
        polyturn.evaluate("recipe.yaml", policy="oracle", model_path="model")
    assert not Path("runs").exists()
