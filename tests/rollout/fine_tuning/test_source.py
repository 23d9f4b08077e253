"""Which rows a run is trained on, in which step, and which are held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.fine_tuning.source import TaughtSteps, load_rows
from polyturn.rollout.scheduler import Frontier
from polyturn.rollout.source import RolloutStart
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.run.preflight import preflight
from polyturn.trainer.run.supervised import (
    check_supervised,
    data_digest,
    figures_of_supervised,
    supervised_run,
)


def write(path: Path, num_rows: int, *, per_task: int = 1) -> Path:
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"Question {number}"},
                    {"role": "assistant", "content": "Answer " * (1 + number)},
                ],
                "metadata": {"task_id": f"t{number // per_task}"},
            }
        )
        for number in range(num_rows)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def config(data: Path, *overrides: str) -> RunConfig:
    return load_config("quickstart", (f"supervised.data=[{data}]", "trainer.parallel.data=1", *overrides))


def test_every_epoch_has_all_rows_once_and_a_resume_goes_on_where_it_was(tmp_path: Path) -> None:
    given = config(write(tmp_path / "a.jsonl", 7), "supervised.epochs=2", "supervised.heldout_share=0")
    rows = load_rows(given)
    run = supervised_run(load_config("quickstart", ()).model_copy(update={"supervised": given.supervised}), 7)
    assert (run.trainer.num_steps, run.trainer.global_batch_size) == (2, 7)
    run = run.model_copy(update={"rollout": run.rollout.model_copy(update={"prompts_per_step": 3})})
    source, store = TaughtSteps(run, rows), TrajectoryStore(tmp_path)
    source.begin(RolloutStart(step=0, version=0, frontier=Frontier()), store)
    steps = [source.take(on_episode=lambda _: None) for _ in range(5)]
    tasks = [[group.episodes[0].task_id for group in step.groups] for step in steps if step is not None]
    assert [len(step) for step in tasks] == [3, 3, 3, 3, 2]
    flat = [task for step in tasks for task in step]
    assert (
        sorted(flat[:7]) == sorted(flat[7:]) == [f"t{number}" for number in range(7)] and flat[:7] != flat[7:]
    )
    again = TaughtSteps(run, rows)
    again.begin(RolloutStart(step=3, version=3, frontier=Frontier(position=9)), store)
    taken = again.take(on_episode=lambda _: None)
    assert taken is not None and [group.episodes[0].task_id for group in taken.groups] == tasks[3]
    assert again.standing().frontier.position == 12
    store.close()


def test_rows_of_a_task_are_all_held_out_or_none_and_long_ones_are_counted(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", 20, per_task=2)
    rows = load_rows(config(data, "supervised.heldout_share=0.3"))
    held = Counter(row.task_id for row in rows.heldout)
    assert set(held.values()) == {2} and len(held) == 3 and len(rows.train) == 14
    assert not held.keys() & {row.task_id for row in rows.train}
    short = load_rows(
        config(data, "supervised.max_tokens=48", f"supervised.heldout=[{write(tmp_path / 'b', 1)}]")
    )
    assert short.num_too_long > 0 and len(short.train) == 20 - short.num_too_long and len(short.heldout) == 1
    with pytest.raises(ConfigError, match=r"no row of .* can be trained on: all 20 are longer than 2 tokens"):
        load_rows(config(data, "supervised.max_tokens=2"))
    assert "20 rendered" in rows.summary()


def test_a_run_on_rows_passes_the_preflight_and_what_sft_did_not_make_does_not(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", 9)
    given = config(data, f"output_dir={tmp_path}", "environment.options={world_seed: 3}")
    run = supervised_run(given, 9)
    # The environment is not asked for tasks, engines are not started and need no GPU here.
    assert (
        preflight(run.model_copy(update={"engines": run.engines.model_copy(update={"device": "cuda"})})) == []
    )
    assert not run.plays and run.trainer.algorithm.loss.kind == "supervised"
    with pytest.raises(ConfigError, match="fine-tuned by `polyturn sft"):
        check_supervised(given)
    with pytest.raises(
        ConfigError, match=r"trainer.num_steps is 3, and 9 rows in 1 epoch\(s\) of 9 a step are 1"
    ):
        supervised_run(given, 9, num_steps=3)
    before = data_digest(run)
    write(data, 8)
    assert data_digest(run) != before


def test_figures_of_what_was_sampled_are_not_told_of_rows() -> None:
    row = {
        "train/loss": 1.0,
        "train/policy_kl": 2.0,
        "offpolicy/kl": 3.0,
        "reward/mean": 0.0,
        "seconds/step": 1.0,
    }
    assert figures_of_supervised(row) == {"train/loss": 1.0, "seconds/step": 1.0}
