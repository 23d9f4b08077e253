"""In-run checks: each can fail, says what and where, and stays silent when it is off."""

from __future__ import annotations

import pytest

from polyturn.configs.schema.run import ChecksConfig
from polyturn.trainer.run.checks import CheckFailure, RunChecks

ON = ChecksConfig(enabled=True, max_initial_kl=1e-6, max_logprob_difference=1e-4)


def test_values_within_limits_pass_and_the_largest_is_kept() -> None:
    checks = RunChecks(ON, maxima={"logprob_difference": 3e-5})
    checks.initial_kl(-5e-8, step=1)
    checks.logprob_difference(2e-5, step=1, where="sample a")
    checks.weights_equal({"w": "1"}, {"w": "1"}, version=1, url="http://engine")
    assert checks.maxima == {"initial_kl": 5e-8, "logprob_difference": 3e-5, "unequal_tensors": 0.0}


def test_initial_kl_fails() -> None:
    with pytest.raises(CheckFailure, match="step 7: policy KL before any update"):
        RunChecks(ON).initial_kl(2e-6, step=7)


@pytest.mark.parametrize("value", [2e-4, float("nan"), float("inf")])
def test_logprob_difference_fails_and_names_the_sample(value: float) -> None:
    with pytest.raises(CheckFailure, match=r"step 3: .* sample a\.1/0"):
        RunChecks(ON).logprob_difference(value, step=3, where="sample a.1/0")


@pytest.mark.catalogue("B49")
def test_an_unequal_weight_fails_and_is_named() -> None:
    trainer, engine = {"a": "1", "b": "2"}, {"a": "1", "b": "3"}
    with pytest.raises(CheckFailure, match=r"1 tensors of the engine at http://engine differ .* first is b"):
        RunChecks(ON).weights_equal(trainer, engine, version=4, url="http://engine")


def test_a_tensor_that_only_one_side_has_is_unequal() -> None:
    with pytest.raises(CheckFailure, match="first is b"):
        RunChecks(ON).weights_equal({"a": "1"}, {"a": "1", "b": "3"}, version=4, url="http://engine")


def test_a_group_of_the_wrong_size_fails() -> None:
    checks = RunChecks(ON)
    checks.groups({"g": 7}, expected=8, dropped={"g": 1}, step=1)
    with pytest.raises(CheckFailure, match="group g has 7 episodes and 0 dropped"):
        checks.groups({"g": 7}, expected=8, dropped={}, step=1)


@pytest.mark.catalogue("B38")
@pytest.mark.parametrize(
    "trained",
    [[{"a": 3}], [{"a": 3}, {"a": 3, "b": 4}], [{"a": 3, "b": 4, "c": 1}], [{"a": 3, "b": 3}]],
    ids=["missing", "twice", "unknown", "short"],
)
def test_tokens_that_are_not_trained_exactly_once_fail(trained: list[dict[str, int]]) -> None:
    RunChecks(ON).trained_once({"a": 3, "b": 4}, [{"a": 3}, {"b": 4}], step=1)
    with pytest.raises(CheckFailure, match="sampled tokens"):
        RunChecks(ON).trained_once({"a": 3, "b": 4}, trained, step=1)


def test_checks_that_are_off_are_silent() -> None:
    checks = RunChecks(ChecksConfig(enabled=False))
    checks.initial_kl(1.0, step=1)
    checks.weights_equal({"a": "1"}, {"a": "2"}, version=1, url="")
    checks.trained_once({"a": 1}, [], step=1)
    assert checks.maxima == {}
