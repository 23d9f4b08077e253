"""GEM's environments as environments of ours."""

from __future__ import annotations

import logging
import random
import threading

import numpy as np
import pytest

import polyturn
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage

gem = pytest.importorskip("gem", reason="needs pip install 'polyturn[gem]'")

from polyturn.envs.adapters.gem import GemEnv  # noqa: E402


def make(**options: object) -> GemEnv:
    env = polyturn.make("polyturn/GEM-v0", **options)
    assert isinstance(env, GemEnv)
    return env


def play(env: GemEnv, script: object, seed: int, turns: int = 60) -> tuple[float, list[str]]:
    observation, _ = env.reset(seed=seed)
    texts = [observation[0]["content"]]
    for _ in range(turns):
        observation, reward, terminated, truncated, _ = env.step(script((), ()))  # type: ignore[operator]
        texts += [message["content"] for message in observation]
        if terminated or truncated:
            return reward, texts
    raise AssertionError("the game does not end")


@pytest.mark.parametrize(
    "game", ["game:Mastermind-v0-easy", "game:Mastermind-v0-hard", "game:GuessTheNumber-v0-hard"]
)
def test_the_oracle_wins_and_random_play_seldom(game: str) -> None:
    env = make(env=game)
    assert [play(env, env.oracle, seed)[0] for seed in range(10)] == [1.0] * 10
    assert sum(play(env, env.random_policy(seed), seed)[0] for seed in range(10)) < 8


@pytest.mark.parametrize(
    "game", ["game:Sokoban-v0-easy", "game:Game2048-v0-easy", "game:Minesweeper-v0-easy"]
)
def test_games_without_answers_have_no_oracle_and_can_be_played(game: str) -> None:
    env = make(env=game)
    assert env.oracle is None
    assert play(env, env.random_policy(0), seed=0) == play(env, env.random_policy(0), seed=0)


def test_gem_itself_reseeds_the_global_generators_and_pays_for_a_loss() -> None:
    """The defects that the adapter contains: without them these lines fail, and it can be made simpler."""
    raw = gem.make("game:GuessTheNumber-v0-easy")
    raw.reset(seed=3)
    first = random.random()
    raw.reset(seed=3)
    assert random.random() == first
    wrong = 2 if raw.game_number != 2 else 3
    raw.turn_count = raw.max_turns - 1
    _, reward, terminated, *_ = raw.step(f"\\boxed{{{wrong}}}")
    assert terminated and 0.0 < reward < 1.0


def test_the_global_generators_are_left_alone_and_episodes_do_not_disturb_each_other() -> None:
    env, other = make(env="game:Game2048-v0-easy"), make(env="game:Game2048-v0-easy")
    alone = play(env, env.random_policy(1), seed=1)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    task = env.tasks("train")[int(np.random.default_rng(0).integers(10))]
    del task
    script, disturbing = env.random_policy(1), other.random_policy(2)
    observation, _ = env.reset(seed=1)
    texts = [observation[0]["content"]]
    other.reset(seed=9)
    done = other_done = False
    while not done:
        observation, reward, terminated, truncated, _ = env.step(script((), ()))
        texts += [message["content"] for message in observation]
        done = terminated or truncated
        if not other_done:
            *_, terminated, truncated, _ = other.step(disturbing((), ()))
            other_done = terminated or truncated
    assert (reward, texts) == alone
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_threads_play_the_same_games_as_one_thread() -> None:
    expected = [play(env, env.random_policy(seed), seed) for seed in range(8) for env in [make()]]
    found: dict[int, tuple[float, list[str]]] = {}

    def run(seed: int) -> None:
        env = make()
        found[seed] = play(env, env.random_policy(seed), seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(8)] == expected


def test_a_loss_is_not_paid_unless_the_peers_return_is_asked_for() -> None:
    rewards = {}
    for kind in ("success", "return"):
        env = make(env="game:GuessTheNumber-v0-easy", reward=kind)
        env.reset(seed=0)
        wrong = 2 if env._gem.game_number != 2 else 3
        others = [n for n in range(1, 11) if n not in (wrong, env._gem.game_number)]
        for number in [*others[:3], wrong]:
            *_, reward, terminated, _, info = env.step(AssistantMessage(content=f"\\boxed{{{number}}}"))
        assert terminated
        rewards[kind] = reward
        assert info["metrics"]["peer_return"] > 0
    assert rewards["success"] == 0.0 < rewards["return"] < 1.0


def test_nonsense_is_not_paid() -> None:
    env = make()
    for text in (
        "",
        "I do not know",
        "\\boxed{1e999}",
        "\\boxed{inf}",
        " ".join(f"\\boxed{{{n}}}" for n in range(50)),
    ):
        env.reset(seed=0)
        for _ in range(60):
            _, reward, terminated, *_ = env.step(AssistantMessage(content=text))
            assert reward == 0.0
            if terminated:
                break


def test_an_exception_in_gem_is_a_fault() -> None:
    env = make()
    env.reset(seed=0)
    env._gem.game_code = None
    with pytest.raises(EnvironmentFault, match="AttributeError"):
        env.step(AssistantMessage(content="\\boxed{1 2}"))


def test_a_hanging_call_is_a_fault() -> None:
    env = make(deadline_s=2.0)
    env.reset(seed=0)
    release = threading.Event()
    env._gem.step = lambda text: release.wait(30)
    with pytest.raises(EnvironmentFault, match="follow_up failed"):
        env.step(AssistantMessage(content="\\boxed{1 2}"))
    assert not env.is_reusable
    release.set()


def test_wrong_ids_and_options_say_what_is_right() -> None:
    with pytest.raises(ValueError, match="did you mean 'game:Mastermind-v0-easy'"):
        make(env="game:Mastermind-v0-eazy")
    with pytest.raises(ValueError, match="no option 'code_lenght'; did you mean 'code_length'"):
        make(env_options={"code_lenght": 3})
    assert make(env_options={"code_length": 3}).reset(seed=0)


def test_gems_import_leaves_the_root_logger_alone() -> None:
    assert not [handler for handler in logging.getLogger().handlers if type(handler) is logging.StreamHandler]
