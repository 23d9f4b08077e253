"""What a resume may change, what it may not, and what it says of damage and of what failed before."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polyturn.agents.episode import Episode, Outcome
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.tasks import draw_order
from polyturn.envs.tasks.order import task_digest
from polyturn.rollout.factory import tasks_of
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.resume import (
    check_resume,
    forget_failure,
    identify,
    note_failure,
    with_template_date,
)
from polyturn.trainer.sinks.json_lines import JsonLinesSink, read_metrics

ROWS = [{"prompt": f"what is {i} + {i}?", "answer": str(2 * i)} for i in range(20)]
RECIPE = """\
extends: quickstart
environment: {id: polyturn/SingleTurn-v0, tasks: tasks.jsonl}
reward: {kind: rule, name: numeric}
evaluation: {tasks: tasks.jsonl}
trainer: {optimizer: {schedule: {kind: cosine}}}
"""


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "tasks.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def load(*overrides: str) -> RunConfig:
    return load_config("recipe.yaml", ["run_dir=run", *overrides])


@pytest.fixture
def begun(recipe: Path) -> RunDirectory:
    """A run of the recipe that has begun."""
    directory = RunDirectory.create(load())
    directory.record(load(), asdict(identify(load())))
    return directory


def resumed(directory: RunDirectory, *overrides: str) -> list[str]:
    """What a resume with these changes tells."""
    told: list[str] = []
    check_resume(load("resume=true", *overrides), directory, told.append)
    return told


def test_a_resume_of_the_same_tells_nothing(begun: RunDirectory) -> None:
    assert resumed(begun) == []
    # Nor do other dashboards, a timeline or a profile.
    seen_otherwise = ("metrics.sinks=[]", "metrics.timeline.every_steps=3", "trainer.profile.steps=[1]")
    assert resumed(begun, *seen_otherwise) == []


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "environment.id=polyturn/Math-v0",
        "environment.options={a: 1}",
        "environment.train_split=other",
        "environment.max_turns=3",
        "reward.name=exact_match",
        "reward={kind: environment}",
        "group_rewards=[{name: a, target: rank}]",
        "model.dialect=search_r1",
        "model.history=sampled",
        "model.tool_prompt=text",
        "environment.tasks={path: tasks.jsonl, reward: {kind: rule, name: exact_match}}",
        "rollout.samples_per_prompt=4",
        "rollout.prompts_per_step=8",
        "rollout.sampling.temperature=0.5",
    ],
)
def test_what_changes_the_data_is_refused_with_what_it_was_and_the_way_out(
    begun: RunDirectory, override: str
) -> None:
    key = override.partition("=")[0]
    before = begun.config.read_bytes()
    if key in ("environment.id", "environment.options"):
        # Whether the environment can be made so is another question.
        old = json.loads(begun.identity.read_bytes())
        section = old["config"]["environment"]
        section[key.partition(".")[2]] = "polyturn/Other-v0" if key.endswith("id") else {"a": 1}
        begun.identity.write_text(json.dumps(old))
        override = "resume=true"
    with pytest.raises(ValueError, match="cannot go on with other data") as refused:
        resumed(begun, override)
    message = str(refused.value)
    assert key in message and "the run began with" in message
    assert f"checkpoint.load={begun.path}" in message
    assert begun.config.read_bytes() == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.num_steps=80", "the cosine schedule of trainer.optimizer ends with the run"),
        ("trainer.algorithm.advantage={kind: dr_grpo}", "trained with another trainer.algorithm"),
        ("trainer.algorithm.loss.clip_low=0.1", "trained with another trainer.algorithm"),
        ("evaluation.num_tasks=8", "cannot be compared"),
        ("trainer.optimizer.learning_rate=1e-3", "trainer.optimizer.learning_rate is 0.001"),
        ("trainer.parallel={tensor: 2, data: 1}", "trainer.parallel.tensor is 2, the run began with 1"),
        ("engines.num_engines=2", "engines.num_engines is 2, the run began with 1"),
        ("environment.episode_timeout_s=7", "environment.episode_timeout_s is 7"),
        ("sglang.max_running_requests=64", "sglang.max_running_requests is 64, the run began with 128"),
        ("trainer.lora={rank: 4}", "trainer.lora is"),
    ],
)
def test_what_changes_the_training_is_told(begun: RunDirectory, override: str, says: str) -> None:
    told = resumed(begun, override)
    assert any(says in text for text in told), told
    assert any(override.partition("=")[0] in text for text in told), told


def test_a_schedule_with_an_end_of_its_own_is_not_stretched(begun: RunDirectory) -> None:
    told = resumed(begun, "trainer.num_steps=80", "trainer.optimizer.schedule.num_updates=40")
    assert not any("ends with the run" in text for text in told)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [*rows[:7], {**rows[7], "answer": "9"}, *rows[8:]],
        lambda rows: rows[:-1],
        lambda rows: [*rows, {"prompt": "more", "answer": "1"}],
        lambda rows: [rows[1], rows[0], *rows[2:]],
    ],
)
def test_a_task_file_that_was_changed_is_refused(begun: RunDirectory, recipe: Path, change: Any) -> None:
    write_rows(recipe / "tasks.jsonl", change(ROWS))
    with pytest.raises(ValueError, match="the tasks of the split 'train' are others than they were"):
        resumed(begun)


def test_files_are_told_by_their_contents_and_not_by_where_they_are(
    begun: RunDirectory, recipe: Path
) -> None:
    (recipe / "elsewhere").mkdir()
    write_rows(recipe / "elsewhere" / "tasks.jsonl", ROWS)
    told = resumed(begun, "environment.tasks=elsewhere/tasks.jsonl")
    assert any("environment.tasks" in text for text in told)


def test_another_model_at_the_same_path_is_refused(begun: RunDirectory) -> None:
    old = json.loads(begun.identity.read_bytes())
    begun.identity.write_text(json.dumps(old | {"model": "0" * 16}))
    with pytest.raises(
        ValueError, match=r"the config, tokenizer or weights in builtin:tiny-searcher are others"
    ):
        resumed(begun)


DATED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ strftime_now('%d %b %Y') }}{{ m.content }}{% endfor %}"
)


def test_a_chat_template_of_ones_own_is_told_by_its_text_and_keeps_its_day(recipe: Path) -> None:
    (recipe / "own.jinja").write_text(DATED)
    config = load("model.template=own.jinja")
    began = with_template_date(config)
    assert began.model.template_date == date.today()
    assert with_template_date(load()).model.template_date is None, "nobody asks for it"
    earlier = load("model.template=own.jinja", "model.template_date=2026-01-31")
    assert with_template_date(earlier) == earlier
    directory = RunDirectory.create(earlier)
    directory.record(earlier, asdict(identify(earlier)))
    assert resumed(directory, "model.template=own.jinja") == []
    again = with_template_date(load("model.template=own.jinja", "resume=true"))
    assert again.model.template_date == date(2026, 1, 31)
    replay = load("model.template=own.jinja", f"rollout.replay={directory.path}", "run_dir=other")
    assert with_template_date(replay) == replay.model_copy(update={"model": again.model})
    (recipe / "own.jinja").rename(recipe / "moved.jinja")
    told = resumed(directory, "model.template=moved.jinja")
    assert len(told) == 1 and "model.template is moved.jinja, the run began with own.jinja" in told[0]
    (recipe / "moved.jinja").write_text(DATED + "!")
    for override, why in (
        (
            "model.template=moved.jinja",
            "the chat template, model.template=moved.jinja, is another than it was",
        ),
        (
            "model.template_date=2026-02-01",
            "model.template_date is 2026-02-01, the run began with 2026-01-31",
        ),
        ("model.template=null", "the chat template, model.template=None, is another"),
    ):
        with pytest.raises(ValueError, match=why):
            resumed(directory, override)


def test_code_and_packages_that_have_changed_are_told(begun: RunDirectory) -> None:
    old = json.loads(begun.identity.read_bytes())
    old |= {"code": "0" * 16, "versions": {**old["versions"], "ray": "1.0"}}
    begun.identity.write_text(json.dumps(old))
    told = resumed(begun)
    assert any("the code of the environment" in text for text in told)
    assert any(text.startswith("resume: ray is ") and "began with 1.0" in text for text in told)


def test_a_run_of_an_earlier_release_is_compared_by_its_config(begun: RunDirectory) -> None:
    begun.identity.unlink()
    assert resumed(begun) == []
    with pytest.raises(ValueError, match="seed is 1, the run began with 0"):
        resumed(begun, "seed=1")
    begun.identity.write_text("{")
    with pytest.raises(ValueError, match=r"identity\.json cannot be read .* delete it"):
        resumed(begun)


def episode(config: RunConfig, sample: int, *, position: int = 0) -> Episode:
    tasks = tasks_of(config, config.environment.train_split)
    order = draw_order(tasks, seed=config.seed)
    (prompt,) = PromptCursor(len(tasks), seed=config.seed, position=position, order=order).peek(1)
    task = tasks[prompt.task_index]
    return Episode(
        episode_id=f"{prompt.group_id}.{sample}.0",
        group_id=prompt.group_id,
        env_id="e",
        task_id=task.task_id,
        task_digest=task_digest(task),
        seed=1,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=1.0,
    )


@given(position=st.integers(0, 60), seed=st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
def test_stored_episodes_of_other_tasks_are_refused_whatever_they_came_from(
    begun: RunDirectory, position: int, seed: int
) -> None:
    """Also where nothing else tells: a run without an identity, whose config.yaml was changed as well."""
    store = TrajectoryStore(begun.path)
    played = episode(load(f"seed={seed}"), 0, position=position)
    store.journal(1, played)
    store.close()
    try:
        if played.task_digest == episode(load(), 0, position=position).task_digest:
            assert resumed(begun) == []
        else:
            with pytest.raises(ValueError, match=r"is of the task .* delete .*step_000001\.journal"):
                resumed(begun)
    finally:
        store.forget(1)


def test_damage_is_told_and_no_reason_to_stop(begun: RunDirectory) -> None:
    store = TrajectoryStore(begun.path)
    for sample in range(3):
        store.journal(1, episode(load(), sample))
    store.close()
    path = store.journal_path(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (told,) = resumed(begun)
    assert str(path) in told and "record 2" in told and "is played again" in told
    assert len(store.journaled(1)) == 2


def test_damaged_metrics_are_told_and_left_out(begun: RunDirectory) -> None:
    begun.metrics.write_bytes(
        b'{"step": 1, "a": 1.0}\n{"stop": 2}\n\xff\n[1]\n{"step": 3, "a": 2.0}\n{"step": 4'
    )
    (told,) = resumed(begun)
    assert "metrics.jsonl is damaged: 3 of its rows" in told
    JsonLinesSink(begun.metrics, last_step=3).close()
    assert [row["step"] for row in read_metrics(begun.metrics)] == [1, 3]
    assert resumed(begun) == []


def test_files_of_other_names_are_not_taken_for_steps(begun: RunDirectory) -> None:
    store = TrajectoryStore(begun.path)
    store.journal(1, episode(load(), 0))
    for name in ("step_000001 (copy).journal", "step_.journal", "step_x.journal"):
        store.journal_path(1).with_name(name).touch()
    assert store.begun_after(0) == [1] and resumed(begun) == []


def test_a_step_that_fails_again_is_not_played_for_ever(begun: RunDirectory) -> None:
    store, checks = TrajectoryStore(begun.path), load().checks
    store.journal(1, episode(load(), 0))
    sentence = note_failure(begun, store, step=1, journals=[1], sentence="step 1: it differs", checks=checks)
    assert sentence.startswith("step 1: it differs; its episodes are in") and "resume=true" in sentence
    assert store.journaled(1) == [] and (begun.path / "set_aside" / "step_000001-1").is_dir()
    assert resumed(begun) == [], "once may be bad luck"
    note_failure(begun, store, step=1, journals=[1], sentence="step 1: it differs", checks=checks)
    with pytest.raises(
        ValueError, match=r"failed 2 times in a row, .* step 1: it differs.* delete .*failed_check"
    ):
        resumed(begun)
    assert any("checks" in text for text in resumed(begun, "checks.max_logprob_difference=null"))
    forget_failure(begun, 0)
    assert begun.failure.exists(), "a checkpoint of an earlier step says nothing of it"
    note_failure(begun, store, step=2, journals=[2], sentence="step 2: another", checks=checks)
    assert resumed(begun) == []
    forget_failure(begun, 2)
    assert not begun.failure.exists()


@pytest.mark.parametrize("left", ["trajectories", "journal", "checkpoints", "metrics.jsonl", "identity.json"])
def test_a_new_run_takes_nothing_over_from_one_whose_config_is_gone(recipe: Path, left: str) -> None:
    (recipe / "run" / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"holds {left} of a run whose config.yaml is gone"):
        RunDirectory.create(load())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"versions": null}', '{"config": []}', "[]"])
def test_a_damaged_identity_is_one_sentence(begun: RunDirectory, text: str) -> None:
    begun.identity.write_text(text)
    with pytest.raises(ValueError, match=r"identity\.json .* delete it to resume by config\.yaml alone"):
        resumed(begun)


@pytest.mark.parametrize("wrong", [{"step": "3"}, {"count": "2"}, {"step": None, "count": None}])
def test_a_note_of_failure_that_cannot_be_read_says_nothing(
    begun: RunDirectory, wrong: dict[str, Any]
) -> None:
    begun.failure.write_text(json.dumps({"step": 3, "count": 2, "sentence": "x", "checks": {}} | wrong))
    assert resumed(begun) == []


def test_a_failed_start_leaves_a_directory_that_a_run_can_be_made_in(recipe: Path) -> None:
    """Logs are all that is written before it is known that a run can begin."""
    directory = RunDirectory.create(load())
    directory.logs.mkdir()
    assert RunDirectory.create(load()) == directory


def test_a_record_names_the_directory_and_replaces_the_one_before(begun: RunDirectory) -> None:
    config = load("trainer.num_steps=80")
    begun.record(config, asdict(replace(identify(config), code="x")))
    assert load_config(begun.config).run_dir == begun.path
    assert begun.recorded()["config"]["trainer"]["num_steps"] == 80
