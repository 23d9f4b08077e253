"""reasoning-gym as an environment, and what its scorers do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest

if importlib.util.find_spec("reasoning_gym") is None:
    pytest.skip("needs pip install 'polyturn[reasoning-gym]'", allow_module_level=True)

import polyturn
from polyturn.envs.adapters.bounded import BoundedCalls, CallTimedOut, shared_calls
from polyturn.envs.adapters.reasoning_gym import (
    ReasoningGymEnv,
    known_defects,
    known_defects_version,
    read_answer,
)
from polyturn.envs.adapters.reasoning_gym_worker import defects_of
from polyturn.envs.conformance.hacks import TEXTS
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage

PEER = "polyturn.envs.adapters.reasoning_gym_worker:serve"


def answer(text: str) -> AssistantMessage:
    return AssistantMessage(content=f"<answer>{text}</answer>")


@pytest.fixture(scope="module")
def datasets() -> list[str]:
    """Those without known defects."""
    names = shared_calls(PEER)("names")
    return [name for name in names if name not in known_defects()]


@pytest.fixture(scope="module")
def env(datasets: list[str]) -> ReasoningGymEnv:
    made = polyturn.make("polyturn/ReasoningGym-v0", dataset=datasets, size=10 * len(datasets))
    assert isinstance(made, ReasoningGymEnv)
    return made


@pytest.mark.slow
def test_all_datasets_without_known_defects_pay_the_oracle_and_no_probe(
    env: ReasoningGymEnv, datasets: list[str]
) -> None:
    probes = [f"<answer>{text}</answer>" for text in ("", "I do not know", "1e999", "inf", "nan", "quonk")]
    source = env.tasks("train")
    paid = []
    for index in range(len(datasets)):
        task = source[index]
        for probe in [*probes, task.messages[-1]["content"], str(task.label)]:
            env.reset(seed=0, options={"task": task})
            reward = env.step(AssistantMessage(content=probe))[1]
            paid += [(task.task_id, probe)] if reward else []
        env.reset(seed=0, options={"task": task})
        reward = env.step(env.oracle((), ()))[1]
        paid += [(task.task_id, "not its own answer")] if reward != 1.0 else []
    assert not paid


def test_the_probes_of_the_conformance_kit_are_not_paid(env: ReasoningGymEnv) -> None:
    for seed in range(3):
        for text in TEXTS.values():
            for message in (AssistantMessage(content=text), answer(text.replace("\ud7ff", ""))):
                env.reset(seed=seed)
                assert env.step(message)[1] == 0.0, text


@pytest.mark.slow
def test_a_seed_gives_the_same_task_in_another_process(env: ReasoningGymEnv, datasets: list[str]) -> None:
    source = env.tasks("heldout")
    here = [source[index] for index in range(0, len(datasets), 2)]
    elsewhere = BoundedCalls(
        "polyturn.envs.adapters.reasoning_gym_worker:serve", num_processes=1, deadline_s=20
    )
    for task in here:
        item = elsewhere("item", task.metadata["dataset"], "{}", task.metadata["seed"])
        assert (item["question"], item["answer"]) == (task.messages[-1]["content"], task.label), task.task_id
    elsewhere.close()


def test_splits_do_not_share_seeds(env: ReasoningGymEnv) -> None:
    seeds = {
        split: {env.tasks(split)[i].metadata["seed"] for i in (0, 809)} for split in ("train", "validation")
    }
    assert seeds == {"train": {0, 9}, "validation": {2**29, 2**29 + 9}}
    with pytest.raises(ValueError, match="unknown split 'test'; the splits are train, validation, heldout"):
        env.tasks("test")


def test_tasks_are_found_by_their_ids(env: ReasoningGymEnv) -> None:
    task = env.tasks("train")[30]
    env.reset(options={"task": task.task_id})
    assert env.task == task
    for wrong in ("gcd/train/1", "gcd/train/-1", "quonk", "ab/heldout/0"):
        with pytest.raises(ValueError, match="no task"):
            env.reset(options={"task": wrong})


def test_this_process_neither_imports_the_package_nor_draws_from_its_generators(env: ReasoningGymEnv) -> None:
    imported = "reasoning_gym.factory" in sys.modules
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    env.reset(seed=3)
    env.step(answer("1"))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert ("reasoning_gym.factory" in sys.modules) == imported


@pytest.fixture(scope="module")
def measured() -> Iterator[BoundedCalls]:
    calls = BoundedCalls(
        "polyturn.envs.adapters.reasoning_gym_worker:measured", num_processes=1, deadline_s=3.0
    )
    yield calls
    calls.close()


@pytest.mark.parametrize(
    "dataset",
    [
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("game_of_life_halting", "complex_arithmetic", "rush_hour")
        ),
        "prime_factorization",
        "gcd",
    ],
)
def test_known_defects_are_still_there(dataset: str, measured: BoundedCalls) -> None:
    assert defects_of(dataset, measured) == list(known_defects().get(dataset, []))


def test_the_list_of_defects_is_of_the_installed_version(datasets: list[str]) -> None:
    assert importlib.metadata.version("reasoning-gym") == known_defects_version()
    assert len(datasets) + len(known_defects()) == 106


def test_datasets_with_defects_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="'countdown' of reasoning-gym is left out: runs the answer as code"):
        polyturn.make("polyturn/ReasoningGym-v0", dataset="countdown")
    polyturn.make("polyturn/ReasoningGym-v0", dataset="countdown", allow_defects=True).reset(seed=0)
    with pytest.raises(ValueError, match="no dataset 'chain_sums'; did you mean 'chain_sum'"):
        polyturn.make("polyturn/ReasoningGym-v0", dataset="chain_sums")
    with pytest.raises(ValueError, match="does not take the options"):
        polyturn.make(
            "polyturn/ReasoningGym-v0", dataset="chain_sum", config={"min_terms": 5, "max_terms": 2}
        )


def test_options_reach_the_dataset() -> None:
    env = polyturn.make(
        "polyturn/ReasoningGym-v0", dataset="chain_sum", config={"min_terms": 7, "max_terms": 7}
    )
    question = env.tasks("train")[0].messages[-1]["content"]
    assert question.count("+") + question.count("-") >= 6


def test_a_scorer_that_raises_or_hangs_at_an_answer_pays_nothing_and_is_counted() -> None:
    raising = polyturn.make("polyturn/ReasoningGym-v0", dataset="prime_factorization", allow_defects=True)
    raising.reset(seed=0)
    *_, info = raising.step(answer("quonk"))
    assert info["reward_parts"] == {"score": 0.0} and info["metrics"]["scorer_raised"] == 1.0
    hanging = polyturn.make(
        "polyturn/ReasoningGym-v0", dataset="spiral_matrix", allow_defects=True, deadline_s=4.0
    )
    hanging.reset(seed=0)
    *_, info = hanging.step(answer("[9**9**9**9]"))
    assert info["reward_parts"] == {"score": 0.0} and info["metrics"]["scorer_timed_out"] == 1.0
    hanging.reset(seed=0)
    assert hanging.step(hanging.oracle((), ()))[1] == 1.0  # type: ignore[misc]


def test_a_scorer_that_cannot_pay_its_own_answer_is_a_fault() -> None:
    env = polyturn.make("polyturn/ReasoningGym-v0", dataset="prime_factorization", allow_defects=True)
    task = env.tasks("train")[0]
    broken = type(task)(task_id="t", messages=task.messages, label="quonk", metadata=task.metadata)
    env.reset(options={"task": broken})
    with pytest.raises(EnvironmentFault, match="the scorer of t failed: ValueError"):
        env.step(answer("quonk"))


def test_partial_credit_is_given_only_where_it_is_asked_for() -> None:
    rewards = {}
    for partial in (False, True):
        env = polyturn.make("polyturn/ReasoningGym-v0", dataset="leg_counting", partial_credit=partial)
        env.reset(seed=0)
        rewards[partial] = env.step(answer(f"{env.task.label} legs"))[1]
    assert rewards[False] == 0.0
    assert 0.0 < rewards[True] < 1.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think><answer>1</answer></think> so <answer> 2 </answer>", "2"),
        ("<answer>1</answer> or <answer>2</answer>", None),
        ("42", None),
        ("<answer>" + "1" * 5001 + "</answer>", None),
        ("<answer>1</answer", None),
    ],
)
def test_the_answer_is_in_the_only_pair_of_tags(text: str, found: str | None) -> None:
    assert read_answer(text) == found


def test_a_call_that_holds_the_interpreter_is_ended() -> None:
    calls = BoundedCalls("re:fullmatch", num_processes=1, deadline_s=1.0)
    assert calls("a", "b") is None  # the first call has time for imports
    with pytest.raises(CallTimedOut):
        calls("(a+)+b", "a" * 40)
    assert calls("(a+)+b", "c") is None
    calls.close()
