"""The run directory: what is complete, what is newest, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polyturn.configs.schema.run import RunConfig
from polyturn.trainer.checkpoints.manifest import describe_file, find_faults, write_manifest
from polyturn.trainer.checkpoints.sources import find_source
from polyturn.trainer.run.directory import RunDirectory, RunState, runs_of
from polyturn.trainer.sinks.json_lines import JsonLinesSink, read_metrics


def make_config(tmp_path: Path, **changes: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "output_dir": tmp_path,
            "environment": {"id": "polyturn/TwoHopSearch-v0"},
            "model": {"path": "somewhere"},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2},
            "trainer": {"num_steps": 1, "global_batch_size": 4},
            **changes,
        }
    )


def save(directory: RunDirectory, step: int, keep_last: int = 2) -> None:
    partial = directory.begin_checkpoint(step)
    partial.mkdir(parents=True)
    ranks_file = partial / "rank-00000-of-00001.safetensors"
    ranks_file.write_bytes(bytes(1000))
    write_manifest(partial, {}, [describe_file(ranks_file)])
    state = RunState(step=step, policy_version=step, prompt_position=16 * step, maxima={"initial_kl": 0.0})
    directory.commit_checkpoint(state, keep_last=keep_last)


def raise_warning(text: str) -> None:
    raise AssertionError(text)


def test_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(tmp_path))
    for step in (1, 2, 3):
        save(directory, step)
    directory.begin_checkpoint(4).mkdir()  # what a crash in the middle of saving leaves
    found = directory.sound_checkpoint(find_faults, warn=raise_warning)
    assert found is not None
    assert found[1] == RunState(step=3, policy_version=3, prompt_position=48, maxima={"initial_kl": 0.0})
    assert sorted(p.name for p in directory.checkpoints.iterdir()) == [
        "step_000002",
        "step_000003",
        "step_000004.partial",
    ]


def test_a_checkpoint_without_state_does_not_count(tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(tmp_path))
    (directory.checkpoints / "step_000001").mkdir(parents=True)
    assert directory.sound_checkpoint(find_faults, warn=raise_warning) is None


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["rank-00000-of-00001.safetensors", "trainer.json", "state.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    directory = RunDirectory.create(make_config(tmp_path))
    for step in (1, 2):
        save(directory, step)
    older, newer = sorted(directory.checkpoints.iterdir())
    damage(newer / name)
    warnings: list[str] = []
    found = directory.sound_checkpoint(find_faults, warn=warnings.append)
    assert found is not None and found[0] == older and found[1].step == 1
    # Without a state a directory is no checkpoint at all: nobody is told of it.
    if not (damage is Path.unlink and name == "state.json"):
        (warning,) = warnings
        assert str(newer) in warning and str(older) in warning and name in warning
    damage(older / "trainer.json")
    with pytest.raises(ValueError, match=r"none of the checkpoints .* can be used"):
        directory.sound_checkpoint(find_faults, warn=warnings.append)


def test_what_a_crash_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(tmp_path))
    directory.begin_checkpoint(3).mkdir(parents=True)
    save(directory, 2)
    assert [path.name for path in directory.checkpoints.iterdir()] == ["step_000002"]


def test_resume_takes_the_newest_run_of_the_name(tmp_path: Path) -> None:
    for name in (
        "trial-20260101-000000",
        "trial-20260102-000000",
        "trial-20260102-000000-2",
        "other-20270101-000000",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "trial-20280101-000000").mkdir()  # nothing was started there
    assert RunDirectory.to_resume(make_config(tmp_path)).path.name == "trial-20260102-000000-2"


def test_runs_of_one_second_and_steps_of_seven_digits_are_ordered_by_their_numbers(tmp_path: Path) -> None:
    for number in ("", "-2", "-9", "-10"):
        (tmp_path / f"trial-20260102-000000{number}").mkdir()
    (tmp_path / "trial-20260101-235959-11").mkdir()
    (tmp_path / "trial-more-20270101-000000").mkdir()
    assert [path.name.removeprefix("trial-") for path in runs_of("trial", tmp_path)] == [
        "20260102-000000-10",
        "20260102-000000-9",
        "20260102-000000-2",
        "20260102-000000",
        "20260101-235959-11",
    ]
    directory = RunDirectory.create(make_config(tmp_path, run_dir=tmp_path / "mine"))
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(directory, step)
    assert sorted(p.name for p in directory.checkpoints.iterdir()) == ["step_1000000", "step_1000001"]
    found = directory.sound_checkpoint(find_faults, warn=raise_warning)
    assert found is not None and found[1].step == 1_000_001
    source = find_source(directory.path)
    assert source is not None and source.path.name == "step_1000001"


def test_a_checkpoint_of_the_same_step_replaces_the_one_before(tmp_path: Path) -> None:
    directory = RunDirectory.create(make_config(tmp_path))
    save(directory, 1)
    save(directory, 1)
    assert [path.name for path in directory.checkpoints.iterdir()] == ["step_000001"]


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no run of 'trial'"):
        RunDirectory.to_resume(make_config(tmp_path))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    config = make_config(tmp_path, run_dir=tmp_path / "mine")
    RunDirectory.create(config).config.touch()
    with pytest.raises(ValueError, match="already holds a run"):
        RunDirectory.create(config)


def test_resumed_metrics_drop_unfinished_steps_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(path, last_step=0)
    for step in (1, 2, 3):
        sink.write(step, {"reward/mean": step / 4, "train/loss": float("nan")})
    sink.close()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "rew')
    resumed = JsonLinesSink(path, last_step=2)
    resumed.write(3, {"reward/mean": 0.5})
    resumed.close()
    assert [(row["step"], row["reward/mean"]) for row in read_metrics(path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.5),
    ]
    assert read_metrics(path)[0]["train/loss"] is None
