"""Evaluations beside training: what is due, what is skipped, how late a result is, and what of it is written down."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.evaluation.held_out import EvaluationResult
from polyturn.rollout.evaluation.worker import on_own_engines
from polyturn.rollout.player import RolloutError
from polyturn.rollout.suites import Suite, suites_of
from polyturn.trainer.run.evaluations import Evaluations, check_evaluations
from polyturn.trainer.run.served_checks import check_served_models

RESULT = EvaluationResult(
    mean=0.5,
    low=0.25,
    high=0.75,
    method="wilson",
    num_tasks=8,
    num_episodes=8,
    num_failed=1,
    num_truncated=2,
    mean_turns=3.0,
    oldest_version=4,
    newest_version=4,
)


def config_of(**evaluation: Any) -> RunConfig:
    return load_config("quickstart").model_copy(
        update={"evaluation": RunConfig.model_fields["evaluation"].annotation(**evaluation)}
    )


class Engine:
    """Gives results when it is told to."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.results: list[Future[EvaluationResult | None]] = []

    def play(self, suite: Suite, step: int) -> Future[EvaluationResult | None]:
        self.begun.append((suite.name, step))
        self.results.append(Future())
        return self.results[-1]


SUITES = [
    {"name": "math", "every_steps": 3, "split": "aime", "num_tasks": 30, "temperature": 0.0},
    {"name": "never", "every_steps": 0},
]


def evaluations(tmp_path: Path, engine: Engine) -> Evaluations:
    config = config_of(every_steps=2, suites=SUITES)
    return Evaluations(suites_of(config), engine.play, tmp_path / "evaluation" / "results.jsonl")


def test_suites_are_due_by_themselves_with_their_own_sampling() -> None:
    config = config_of(every_steps=2, suites=[*SUITES, {"name": "same"}])
    suites = suites_of(config)
    due = {step: [suite.name for suite in suites if suite.is_due(step)] for step in range(1, 7)}
    assert due == {1: [], 2: ["", "same"], 3: ["math"], 4: ["", "same"], 5: [], 6: ["", "math", "same"]}
    assert [suite.prefix for suite in suites] == [
        "heldout",
        "heldout/math",
        "heldout/never",
        "heldout/same",
    ]
    math = suites[1].config
    assert (math.evaluation.split, math.evaluation.num_tasks, math.evaluation.temperature) == (
        "aime",
        30,
        0.0,
    )
    assert math.environment == config.environment and suites[0].config is config
    own = {"id": "polyturn/MathCalculator-v0", "max_turns": 2}
    (_, other) = suites_of(config_of(suites=[{"name": "other", "environment": own}]))
    assert (other.config.environment.id, other.config.environment.max_turns) == (own["id"], 2)
    with pytest.raises(ValidationError, match="two suites have the name 'math'"):
        config_of(suites=[SUITES[0], SUITES[0]])


def test_a_result_comes_late_and_says_how_late_and_of_which_versions(tmp_path: Path) -> None:
    engine = Engine()
    beside = evaluations(tmp_path, engine)
    assert beside.begin(1, engine_step=1, version=1) == [] and beside.collect(1) == []
    assert [suite.name for suite in beside.begin(2, engine_step=2, version=2)] == [""]
    assert beside.collect(2) == [] and beside.are_under_way
    assert [suite.name for suite in beside.begin(3, engine_step=3, version=3)] == ["math"]
    engine.results[0].set_result(replace(RESULT, oldest_version=2, newest_version=3))
    counted = {"user_leaks": 0.5}
    engine.results[1].set_result(replace(RESULT, oldest_version=3, newest_version=3, metrics=counted))
    main, math = beside.collect(4)
    assert (main.step, main.lag, main.version, main.is_pinned) == (2, 2, 2, False)
    assert (math.step, math.lag, math.version, math.is_pinned) == (3, 1, 3, True)
    assert not beside.are_under_way and beside.collect(5) == []
    assert math.figures == {
        "heldout/math/mean": 0.5,
        "heldout/math/low": 0.25,
        "heldout/math/high": 0.75,
        "heldout/math/env/user_leaks": 0.5,
        "heldout/math/user_fault_share": 0.0,
        "heldout/math/num_user_faults": 0.0,
        "heldout/math/num_tasks": 8.0,
        "heldout/math/num_episodes": 8.0,
        "heldout/math/num_failed": 1.0,
        "heldout/math/num_truncated": 2.0,
        "heldout/math/mean_turns": 3.0,
        "heldout/math/oldest_version": 3.0,
        "heldout/math/newest_version": 3.0,
        "heldout/math/step": 3.0,
        "heldout/math/version": 3.0,
        "heldout/math/lag": 1.0,
        "heldout/math/pinned": 1.0,
    }
    lines = [orjson.loads(line) for line in (tmp_path / "evaluation" / "results.jsonl").open("rb")]
    assert [(line["suite"], line["step"], line["lag"], line["mean"]) for line in lines] == [
        ("heldout", 2, 2, 0.5),
        ("math", 3, 1, 0.5),
    ]


def test_weights_that_came_before_the_first_token_are_other_weights(tmp_path: Path) -> None:
    engine = Engine()
    beside = evaluations(tmp_path, engine)
    for step, oldest, newest, pinned in ((2, 3, 3, 0.0), (4, 4, 4, 1.0), (8, -1, -1, 1.0)):
        beside.begin(step, engine_step=step, version=step)
        engine.results[-1].set_result(replace(RESULT, oldest_version=oldest, newest_version=newest))
        (ended,) = beside.collect(step)
        assert ended.figures["heldout/pinned"] == pinned


def test_what_is_due_while_the_one_before_is_under_way_is_skipped_and_counted(tmp_path: Path) -> None:
    engine = Engine()
    beside = evaluations(tmp_path, engine)
    for step in range(1, 7):
        beside.begin(step, engine_step=step, version=step)
    assert engine.begun == [("", 2), ("math", 3)]
    assert beside.figures == {"heldout/skipped": 2.0, "heldout/math/skipped": 1.0}
    engine.results[0].set_result(RESULT)
    assert [one.step for one in beside.collect(6)] == [2]
    beside.begin(8, engine_step=8, version=8)
    assert engine.begun[-1] == ("", 8)
    engine.results[-1].set_result(RESULT)
    beside.begin(10, engine_step=10, version=10)
    assert engine.begun[-1] == ("", 10), "what has ended does not stand in the way, told or not"
    engine.results[-1].set_result(RESULT)
    assert [(one.step, one.lag) for one in beside.collect(11)] == [(8, 3), (10, 1)]
    assert beside.figures["heldout/skipped"] == 2.0


def test_what_was_stopped_is_no_result_and_what_failed_is_raised(tmp_path: Path) -> None:
    engine = Engine()
    beside = evaluations(tmp_path, engine)
    beside.begin(2, engine_step=2, version=2)
    engine.results[0].set_result(None)
    beside.wait()
    assert beside.collect(2) == []
    beside.begin(4, engine_step=4, version=4)
    engine.results[1].set_exception(RolloutError("every episode failed"))
    with pytest.raises(RolloutError):
        beside.wait()
    with pytest.raises(RolloutError):
        beside.collect(4)
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.stop_at={metric: heldout/mean, at_least: 0.9}"], "set evaluation.every_steps"),
        (
            [
                "rollout={play_while_training: false, max_staleness: 1}",
                "evaluation.training_waits=before_sync",
            ],
            "when the engines rest",
        ),
        (
            ["trainer.stop_at={metric: heldout/maths/mean, at_least: 0.9}"],
            "no evaluation 'heldout/maths', did you mean 'heldout/math'",
        ),
        (
            ["trainer.stop_at={metric: heldout/maen, at_least: 0.9}"],
            "heldout has no figure 'maen', did you mean 'mean'",
        ),
        (
            [
                "checkpoint={keep_best: {metric: heldout/mean}, every_steps: 4}",
                "evaluation.every_steps=6",
            ],
            "checkpoint.every_steps divide",
        ),
        (
            [
                "checkpoint.keep_best={metric: heldout/mean}",
                "evaluation.every_steps=3",
                "weight_sync.every_steps=2",
                "rollout.max_staleness=1",
            ],
            "let weight_sync.every_steps divide the other",
        ),
        (
            [
                "checkpoint.keep_best={metric: heldout/math/mean}",
                "evaluation.training_waits=never",
            ],
            "is of no one checkpoint",
        ),
    ],
)
def test_figures_that_will_not_be_there_are_refused_at_the_start(overrides: list[str], message: str) -> None:
    config = load_config("quickstart", ["evaluation.suites=[{name: math, every_steps: 2}]", *overrides])
    with pytest.raises(ConfigError, match=message):
        check_evaluations(config)


def test_figures_that_will_be_there_or_are_of_other_kinds_are_taken() -> None:
    check_evaluations(
        load_config(
            "quickstart",
            [
                "evaluation.every_steps=4",
                "checkpoint={every_steps: 2, keep_best: {metric: heldout/mean}}",
                "trainer.stop_at={metric: env/anything, at_most: 0}",
            ],
        )
    )


def test_engines_of_their_own_keep_one_version_while_nothing_waits(tmp_path: Path) -> None:
    overrides = [
        "evaluation={every_steps: 3, engines: {device: cpu, num_engines: 2}}",
        "checkpoint={keep_best: {metric: heldout/mean}, every_steps: 3}",
        "rollout={play_while_training: false, max_staleness: 1}",
        "weight_sync.every_steps=2",
    ]
    config = load_config("quickstart", overrides)
    check_evaluations(config)
    assert config.evaluation.waits == "never" and not config.evaluation.mixes_versions
    (model,) = config.served_models
    assert (model.path, model.dtype, model.engines.num_engines) == (config.model.path, config.model.dtype, 2)
    assert config_of(engines={}, training_waits="until_done").evaluation.waits == "until_done"
    with pytest.raises(ConfigError, match="the evaluations have their own"):
        load_config("quickstart", [*overrides, "evaluation.training_waits=before_sync"])
    with pytest.raises(ConfigError, match=r"evaluation\.engines: this run plays nothing"):
        load_config("quickstart", [*overrides, "rollout.replay=somewhere"])
    with pytest.raises(ConfigError, match=r"is what the engines of evaluation\.engines are called"):
        load_config("quickstart", [*overrides, "judges=[{name: evaluation, urls: ['http://127.0.0.1:1']}]"])


def test_what_is_due_while_engines_of_their_own_are_busy_is_skipped(tmp_path: Path) -> None:
    beside = evaluations(tmp_path, Engine())
    assert [beside.is_due(step) for step in range(1, 5)] == [False, True, True, True]
    for step in range(1, 7):
        beside.skip(step)
    assert beside.figures == {"heldout/skipped": 3.0, "heldout/math/skipped": 2.0}


def test_engines_of_their_own_are_asked_for_whole_weights_though_the_runs_get_adapters() -> None:
    overrides = ["trainer.lora={}", "weight_sync={kind: adapter}", "evaluation.engines={num_engines: 2}"]
    config = load_config("quickstart", overrides)
    played = on_own_engines(config)
    assert config.serves_adapters and not played.serves_adapters
    assert played.engines.num_engines == 2
    assert played.engines.request_timeout_s == config.engines.request_timeout_s


def test_a_model_that_is_stored_quantised_cannot_be_evaluated_on_engines_of_their_own(tmp_path: Path) -> None:
    stored = orjson.loads((resolve_model_path("builtin:tiny-searcher") / "config.json").read_bytes())
    for path in resolve_model_path("builtin:tiny-searcher").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_bytes(orjson.dumps({**stored, "quantization_config": {"bits": 8}}))
    config = load_config("quickstart", [f"model.path={tmp_path}", "evaluation.engines={device: cuda}"])
    with pytest.raises(ConfigError, match=r"evaluation\.engines: they are started from .* quantised"):
        check_served_models(config)
