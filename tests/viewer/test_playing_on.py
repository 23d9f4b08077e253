"""A stored episode is played on from a turn, with a policy behind a real endpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from polyturn.agents.policies.named import make_policy
from polyturn.configs.loading.loader import dump_config, load_config
from polyturn.envs.registry import make
from polyturn.rollout.factory import episode_limits, tasks_of
from polyturn.rollout.store import TrajectoryStore
from polyturn.viewer.answers import Answers, Conflict
from polyturn.viewer.catalogue import Catalogue
from polyturn.viewer.parameters import BadParameter
from polyturn.viewer.playing_on import PlayingOn
from tests.support.chat_server import chat_server, message
from tests.viewer.api_types import read_api_types


async def stored_run(path: Path, *, options: dict[str, Any] | None = None) -> Path:
    """A run with one episode of a real task, which the oracle played."""
    config = load_config("quickstart").model_copy(update={"run_dir": path})
    path.mkdir()
    (path / "config.yaml").write_text(dump_config(config))
    task = tasks_of(config, config.environment.train_split)[3]
    env = make(config.environment.id)
    episode = await make_policy("oracle").play(
        env=env, task=task, seed=5, limits=episode_limits(config), episode_id="played", group_id="g00000000"
    )
    env.close()
    assert episode.reward == 1.0 and episode.num_turns == 3
    store = TrajectoryStore(path)
    store.write_step(1, [episode])
    store.close()
    return path


async def played_on(path: Path, url: str, **wanted: Any) -> dict[str, Any]:
    answers = Answers(Catalogue([path]))
    playing = PlayingOn(answers, make_policy(f"openai:{url}", {"model": "m"}))  # type: ignore[arg-type]
    try:
        assert answers.policy is not None and playing.has_token(answers.policy["token"])
        assert not playing.has_token("") and not playing.has_token("é\udc80")
        body = {"run": path.name, "set": "train", "step": 1, "id": "played", **wanted}
        identity = await playing.begin(body)
        while (found := playing.played(identity))["state"] == "playing":
            await asyncio.sleep(0.01)
        return found
    finally:
        await playing.close()


async def test_the_turns_before_are_as_they_were_and_the_policy_takes_the_next(tmp_path: Path) -> None:
    path = await stored_run(tmp_path / "run")
    async with chat_server(message("It is \\boxed{nowhere}.")) as server:
        found = await played_on(path, server.url, turn=2)
    assert read_api_types().problems(found, "Played") == []
    assert found["state"] == "done" and found["differences"] == [] and found["reward"] == 0.0
    stored = TrajectoryStore(path).read_step(1)[0].messages
    assert [shown["text"] for shown in found["messages"][:-1]] == [one["content"] for one in stored[:-1]]
    assert "nowhere" in found["messages"][-1]["text"]
    (asked,) = server.requests
    assert len(asked["messages"]) == len(stored) - 1


async def test_another_world_is_told_apart(tmp_path: Path) -> None:
    path = await stored_run(tmp_path / "run")
    config = path / "config.yaml"
    stored = TrajectoryStore(path).read_step(1)[0]
    messages = [dict(one) for one in stored.messages]
    place = next(index for index, one in enumerate(messages) if one["role"] == "tool")
    messages[place]["content"] = "something else"
    object.__setattr__(stored, "messages", tuple(messages))
    TrajectoryStore(path).write_step(1, [stored])
    async with chat_server(message("I do not know.")) as server:
        found = await played_on(path, server.url, turn=1)
        assert found["differences"] == [f"before turn 2: message {place + 1} is another than it was"]
        with pytest.raises(BadParameter, match="turns"):
            await played_on(path, server.url, turn=9)
        object.__setattr__(stored, "task_id", "a task that is gone")
        TrajectoryStore(path).write_step(1, [stored])
        with pytest.raises(Conflict, match="a task that is gone"):
            await played_on(path, server.url, turn=0)
        config.unlink()
        with pytest.raises(Conflict, match="cannot be rebuilt"):
            await played_on(path, server.url, turn=0)
