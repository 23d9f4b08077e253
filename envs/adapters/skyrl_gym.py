"""Environments of SkyRL-Gym (NovaSky; needs `polyturn[skyrl-gym]`)."""

from __future__ import annotations

import difflib
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polyturn.envs.adapters.peer import (
    PeerEpisode,
    PeerStep,
    PeerTextEnv,
    RewardKind,
    SeededTasks,
    check_size,
    check_split,
    require,
)
from polyturn.envs.messages import AssistantMessage, ListTasks, Message, Script, Task, TaskSource
from polyturn.envs.tasks import JsonlTasks
from polyturn.tools.types import ToolSpec

# How each environment wants a right answer written.
_ANSWERS: Mapping[str, Callable[[Any], str]] = {
    "gsm8k": "#### {}".format,
    "gsm8k_multi_turn": "#### {}".format,
    "aime": "Answer: {}".format,
    "search": lambda truth: f"<answer>{_first(truth['target'])}</answer>",
}
_INSTRUCTION: Mapping[str, str] = {
    "gsm8k": "Let's think step by step and output the final answer after '####'.",
    "gsm8k_multi_turn": "Let's think step by step and output the final answer after '####'.",
    "aime": "Let's think step by step and write the final answer as 'Answer: ' and the number.",
}


class SkyRLGymEnv(PeerTextEnv):
    """Environments of SkyRL-Gym by their ids, such as `gsm8k` or `search`.

    Tasks are rows as SkyRL-Gym's data sets have them, `{"prompt": messages, "reward_spec": {"ground_truth": ...}}`; all
    but the prompt goes to the environment as `extras`. Without rows, sums in words are made up.
    """

    def __init__(
        self,
        *,
        env: str = "gsm8k",
        env_config: Any = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
        path: str | Path | None = None,
        size: int = 100_000,
        reward: RewardKind = "success",
        deadline_s: float = 30.0,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            env: An id of SkyRL-Gym's registry.
            env_config: What the environment takes as `env_config`, such as SkyRL-Gym's `SearchEnvConfig`.
            rows: Tasks; they are what every split has.
            path: A JSONL file of tasks: `prompt`, `answer` (the ground truth), and extras in `metadata`.
            size: Made-up tasks of each split.
            reward: `success`: 1.0 where the last step was paid 1 or more, else 0.0; `return`: the sum of all steps.
            deadline_s: For one call of SkyRL-Gym.
            split: `train`, `validation` or `heldout`.
            render_mode: None or "ansi".

        Raises:
            MissingPackage: SkyRL-Gym is not installed.
            ValueError: an environment that it does not have, or one that needs rows and has none.
        """
        registry = require("skyrl_gym", extra="skyrl-gym").registry
        if env not in registry:
            near = difflib.get_close_matches(env, registry, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(registry))}"
            raise ValueError(f"SkyRL-Gym has no environment {env!r}; {hint}")
        if rows is None and path is None and env not in _INSTRUCTION:
            raise ValueError(f"SkyRL-Gym's {env!r} needs tasks: pass rows=... or path=...")
        check_size(size)
        check_split(split)
        super().__init__(reward=reward, deadline_s=deadline_s, split=split, render_mode=render_mode)
        self._env_name, self._env_config, self._size = env, env_config, size
        self._given_tasks = (
            JsonlTasks(path) if path is not None else _tasks_of_rows(rows) if rows is not None else None
        )
        self.oracle = self._tell_answer if env in _ANSWERS else None

    def tasks(self, split: str) -> TaskSource:
        """The rows, or made-up sums with seeds that are disjoint between `train`, `validation` and `heldout`."""
        check_split(split)
        if self._given_tasks is not None:
            return self._given_tasks
        return SeededTasks(self._env_name, split, self._size, self._made_up)

    def random_policy(self, seed: int) -> Script:
        """Right in its form, with a random number."""
        rng = random.Random(seed)
        written = _ANSWERS.get(self._env_name, str)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            number = str(rng.randrange(1000))
            return AssistantMessage(
                content=written({"target": number} if self._env_name == "search" else number)
            )

        return script

    def seed_of(self, task: Task) -> int:
        return zlib.crc32(task.task_id.encode())

    def open_episode(self, task: Task) -> tuple[PeerEpisode, Sequence[Message]]:
        import skyrl_gym

        # Some environments read one name, some the other.
        extras = {"reward_spec": {"ground_truth": task.label}, "reward_model": {"ground_truth": task.label}}
        extras |= {"extra_info": {}, **task.metadata}
        env = skyrl_gym.make(self._env_name, env_config=self._env_config, extras=extras)
        episode = _SkyRLEpisode(env)
        prompt, _ = env.init([dict(message) for message in task.messages])
        return episode, [{"role": message["role"], "content": message["content"]} for message in prompt]

    def _tell_answer(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        del messages, tools
        return AssistantMessage(content=_ANSWERS[self._env_name](self.task.label))

    def _made_up(self, task_id: str, seed: int) -> Task:
        rng = random.Random(seed)
        name, thing = rng.choice(("Ada", "Ben", "Cleo", "Dan")), rng.choice(("marbles", "stamps", "shells"))
        had, boxes, each, lost = (
            rng.randint(2, 99),
            rng.randint(2, 12),
            rng.randint(2, 20),
            rng.randint(1, 20),
        )
        question = (
            f"{name} has {had} {thing}, gets {boxes} boxes with {each} {thing} each, and loses {lost} of them. "
            f"How many {thing} does {name} have now? {_INSTRUCTION[self._env_name]}"
        )
        return Task.from_prompt(task_id, question, label=str(had + boxes * each - lost))


class _SkyRLEpisode:
    def __init__(self, env: Any) -> None:
        self._env = env

    def step(self, text: str) -> PeerStep:
        output = self._env.step(text)
        messages: list[Message] = [
            {"role": message["role"], "content": message["content"]} for message in output["observations"]
        ]
        metrics = {
            f"skyrl_{name}": float(value)
            for name, value in self._env.get_metrics().items()
            if isinstance(value, (int, float))
        }
        return PeerStep(
            messages=messages, reward=float(output["reward"]), done=bool(output["done"]), metrics=metrics
        )

    def close(self) -> None:
        self._env.close()


def _tasks_of_rows(rows: Sequence[Mapping[str, Any]]) -> ListTasks:
    tasks = []
    for number, row in enumerate(rows):
        truth = (row.get("reward_spec") or row.get("reward_model") or {}).get("ground_truth")
        if truth is None or "prompt" not in row:
            raise ValueError(
                f"row {number} needs 'prompt' and 'reward_spec' with 'ground_truth'; it has {sorted(row)}"
            )
        extras = {name: value for name, value in row.items() if name != "prompt"}
        prompt = row["prompt"]
        messages = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
        task_id = str(row.get("id", f"row-{number}"))
        tasks.append(Task(task_id=task_id, messages=messages, label=truth, metadata=extras))
    return ListTasks(tasks)


def _first(target: Any) -> Any:
    return target if isinstance(target, str) else next(iter(target))
