"""A run's stored steps are trained on again, and what cannot be replayed is refused before anything starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import orjson
import pytest

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.errors import ConfigError, Interrupted
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.replay import ReplayedSteps
from polyturn.rollout.scheduler import Frontier
from polyturn.rollout.source import RolloutStart
from polyturn.rollout.store import TrajectoryStore, read_episodes
from polyturn.tools.interruption import InterruptGuard
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.preflight import preflight
from polyturn.trainer.run.progress import PlainProgress
from polyturn.trainer.run.resume import identify
from polyturn.trainer.run.rollout_only import check_rollout_only, play_steps

SMALL = (
    "trainer.num_steps=3",
    "trainer.global_batch_size=4",
    "trainer.parallel.data=1",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=2",
)
UNEVALUATED = ("evaluation.before=false", "evaluation.after=false")
SEGMENT = Segment(
    token_ids=[1, 2, 3],
    sampled=[False, True, True],
    logprobs=[0.0, -1.0, -2.0],
    policy_versions=[-1, 0, 0],
    turns=[0, 0, 0],
)


def episode(position: int, sample: int) -> Episode:
    return Episode(
        episode_id=f"g{position:08d}.{sample}.0",
        group_id=f"g{position:08d}",
        env_id="polyturn/TwoHop-v0",
        task_id=str(position),
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=float(sample),
        segments=(SEGMENT,),
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of three steps; in the second one a sample was dropped, and steps took groups out of order."""
    config = load_config("quickstart", SMALL)
    directory = RunDirectory(tmp_path_factory.mktemp("recorded"))
    directory.record(config, asdict(identify(config)))
    store = TrajectoryStore(directory.path)
    for step, positions in ((1, (0, 2)), (2, (1, 4)), (3, (3, 5))):
        episodes = [episode(position, sample) for position in positions for sample in range(2)]
        store.write_step(step, episodes[: 3 if step == 2 else 4])
    return directory.path


def replaying(recorded: Path, *overrides: str) -> RunConfig:
    return load_config("quickstart", (*SMALL, *UNEVALUATED, f"rollout.replay={recorded}", *overrides))


def test_groups_come_back_as_they_were_trained_on(recorded: Path, tmp_path: Path) -> None:
    source = ReplayedSteps(recorded, samples_per_prompt=2)
    store = TrajectoryStore(tmp_path)
    source.begin(RolloutStart(step=1, version=1, frontier=Frontier(position=1, ahead=(2,))), store)
    told: list[Episode] = []
    taken = source.take(on_episode=told.append)
    assert taken is not None and [group.prompt.position for group in taken.groups] == [1, 4]
    assert [(len(group.episodes), group.num_dropped, group.num_missing) for group in taken.groups] == [
        (2, 0, 0),
        (1, 1, 0),
    ]
    assert told == read_episodes(TrajectoryStore(recorded).path(2))
    assert source.standing().frontier == Frontier(position=3, ahead=(4,))
    source.stop()
    assert source.take(on_episode=told.append) is None


def test_what_can_be_replayed_passes_and_what_changes_the_weights_is_told(
    recorded: Path, tmp_path: Path
) -> None:
    out = f"output_dir={tmp_path}"
    assert preflight(replaying(recorded, out)) == []
    # Engines are not started: what they could not have here is of no account.
    assert preflight(replaying(recorded, out, "engines.device=cuda")) == []
    told = preflight(replaying(recorded, out, "trainer.optimizer.learning_rate=0.5"))
    assert len(told) == 1 and "trainer.optimizer.learning_rate is 0.5" in told[0]
    assert told[0].endswith("its weights will be others than those of that run")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("rollout.prompts_per_step=4", "trainer.global_batch_size=8"),
            "prompts_per_step is 4, the run began with 2",
        ),
        (("rollout.samples_per_prompt=4", "trainer.global_batch_size=8"), "samples_per_prompt is 4"),
        (
            ("trainer.num_steps=4",),
            "has 3 steps, and trainer.num_steps is 4: the first that is missing is step 4",
        ),
        (
            ("evaluation.before=true", "evaluation.every_steps=2"),
            "evaluation.before=false evaluation.every_steps=0",
        ),
        (("rollout.replay=nowhere",), "nowhere is no run directory"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    recorded: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.replay") as refused:
        preflight(replaying(recorded, *overrides))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def another_tokenizer(model: Path) -> None:
    path = model / "tokenizer_config.json"
    path.write_bytes(orjson.dumps({**orjson.loads(path.read_bytes()), "model_max_length": 17}))


def no_other_run(model: Path) -> None:
    del model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(another_tokenizer, "the config, tokenizer or weights in"), (no_other_run, "is also run_dir")],
)
def test_another_model_and_the_run_itself_are_refused(
    recorded: Path, tmp_path: Path, change: Callable[[Path], None], sentence: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve_model_path("builtin:tiny-searcher"), model)
    change(model)
    where = f"run_dir={recorded}" if change is no_other_run else f"output_dir={tmp_path}"
    config = replaying(recorded, f"model.path={model}", where)
    with pytest.raises(ConfigError) as refused:
        # What else preflight refuses of a directory that holds a run comes before.
        preflight(config.model_copy(update={"resume": change is no_other_run}))
    assert sentence in str(refused.value)


def test_steps_are_stored_one_by_one_and_gone_on_with(recorded: Path, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    config = load_config("quickstart", SMALL)

    def play(until: int) -> None:
        shown = config.model_copy(update={"trainer": config.trainer.model_copy(update={"num_steps": until})})
        source = ReplayedSteps(recorded, samples_per_prompt=2)
        play_steps(shown, directory, source, PlainProgress(num_steps=until), InterruptGuard())

    play(2)
    stands = orjson.loads(directory.rollout.read_bytes())
    assert (stands["step"], stands["prompt_position"], stands["prompts_ahead"]) == (2, 3, [4])
    play(3)
    ours, theirs = TrajectoryStore(tmp_path), TrajectoryStore(recorded)
    assert ours.steps() == [1, 2, 3]
    assert all(ours.read_step(step) == theirs.read_step(step) for step in (1, 2, 3))


def test_asked_to_stop_it_says_where_it_goes_on(recorded: Path, tmp_path: Path) -> None:
    source = ReplayedSteps(recorded, samples_per_prompt=2)
    source.stop()
    config = load_config("quickstart", SMALL)
    with pytest.raises(Interrupted, match=f"stopped after step 0; `resume=true run_dir={tmp_path}`"):
        play_steps(config, RunDirectory(tmp_path), source, PlainProgress(num_steps=3), InterruptGuard())


def test_rollout_alone_and_training_do_not_go_on_with_each_other(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.replay: steps are played here"):
        check_rollout_only(replaying(recorded))
    assert check_rollout_only(load_config("quickstart", (*SMALL, f"output_dir={tmp_path}"))) == []
    shutil.copytree(recorded, tmp_path / "run")
    config = load_config("quickstart", (*SMALL, f"run_dir={tmp_path / 'run'}", "resume=true"))
    (tmp_path / "run" / "rollout.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"was only played, by `polyturn rollout`"):
        preflight(config)
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="is of a training run"):
        check_rollout_only(config)
