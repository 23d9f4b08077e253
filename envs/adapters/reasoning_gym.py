"""Tasks of reasoning-gym's procedural datasets, answered in one message.

Needs `polyturn[reasoning-gym]` (Open-Thought, Apache-2.0), whose code runs in `reasoning_gym_worker`.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import random
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from polyturn.envs.adapters.bounded import BoundedCalls, CallFailed, CallTimedOut, shared_calls
from polyturn.envs.adapters.peer import FIRST_SEED, MAX_SIZE, check_split, require_installed
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import AssistantMessage, Message, Script, Task, TaskSource
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.types import ToolSpec

SYSTEM_PROMPT = (
    "Solve the problem. You may think first. End with the final answer alone, in the form that the problem asks for, "
    "between <answer> and </answer>."
)
DEFAULT_DATASETS = (
    "basic_arithmetic",
    "chain_sum",
    "leg_counting",
    "letter_counting",
    "spell_backward",
    "word_sorting",
)
MAX_ANSWER_CHARACTERS = 5000
_OPEN, _CLOSE = "<answer>", "</answer>"


class ReasoningGymEnv(ToolEnv):
    """One task of a dataset of reasoning-gym; the reward is 1.0 where its scorer pays in full, else 0.0.

    The dataset code runs in worker processes: what hangs there is killed, and its random state stays there. Where a
    scorer raises at an answer, or does not end, but pays the right answer of the same task, it is the answer's fault:
    no reward, and `scorer_raised` or `scorer_timed_out` in the metrics. Otherwise it is an `EnvironmentFault`.
    """

    def __init__(
        self,
        *,
        dataset: str | Sequence[str] = DEFAULT_DATASETS,
        config: Mapping[str, Any] | None = None,
        size: int = 100_000,
        first_seed: int = 0,
        partial_credit: bool = False,
        allow_defects: bool = False,
        deadline_s: float = 5.0,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        """
        Args:
            dataset: A name, or several, which take turns.
            config: Options of the dataset; with several datasets, options by dataset.
            size: Tasks of each split.
            first_seed: Added to the seeds of all tasks.
            partial_credit: Reward what the scorer pays, be it less than 1. Many pay something for any answer.
            allow_defects: Take datasets with known defects too.
            deadline_s: For making or scoring one task.
            split: `train`, `validation` or `heldout`.
            render_mode: None or "ansi".

        Raises:
            MissingPackage: reasoning-gym is not installed.
            ValueError: a dataset that does not exist or has known defects, options that it does not take.
        """
        require_installed("reasoning_gym", extra="reasoning-gym")
        if not 1 <= size <= MAX_SIZE - first_seed or first_seed < 0:
            raise ValueError(
                f"size and first_seed must be positive and end below {MAX_SIZE}, not {size}, {first_seed}"
            )
        names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
        by_dataset = {names[0]: dict(config or {})} if isinstance(dataset, str) else dict(config or {})
        self._calls = shared_calls(
            "polyturn.envs.adapters.reasoning_gym_worker:serve", num_processes=2, deadline_s=deadline_s
        )
        self._configs = _checked(self._calls, names, by_dataset, allow_defects)
        self._size = size
        self._first_seed = first_seed
        self._partial_credit = partial_credit
        check_split(split)
        super().__init__(split=split, render_mode=render_mode)

    def tasks(self, split: str) -> TaskSource:
        """The tasks of `train`, `validation` or `heldout`: disjoint seeds, though a small dataset may repeat itself."""
        check_split(split)
        return ReasoningGymTasks(self._calls, self._configs, split, self._size, self._first_seed)

    def grade(self, message: AssistantMessage) -> Mapping[str, float]:
        """What the dataset's scorer pays for the one answer between the tags."""
        answer = read_answer(message.content)
        if answer is None:
            self.metrics["no_answer"] = 1.0
            return {"score": 0.0}
        paid = self._judged(answer)
        self.metrics["paid_by_scorer"] = paid
        return {"score": paid if self._partial_credit else float(paid >= 1.0)}

    def oracle(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
        """The package's own answer."""
        del messages, tools
        return AssistantMessage(content=f"<answer>{self.task.label}</answer>")

    def random_policy(self, seed: int) -> Script:
        """Answers with numbers."""
        rng = random.Random(seed)

        def script(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> AssistantMessage:
            del messages, tools
            return AssistantMessage(content=f"<answer>{rng.randrange(1000)}</answer>")

        return script

    def _judged(self, answer: str) -> float:
        try:
            return self._paid(answer)
        except (CallFailed, CallTimedOut) as error:
            try:
                sound = self._paid(str(self.task.label)) == 1.0
            except (CallFailed, CallTimedOut):
                sound = False
            if not sound:
                raise EnvironmentFault(f"the scorer of {self.task.task_id} failed: {error}") from error
            self.metrics["scorer_timed_out" if isinstance(error, CallTimedOut) else "scorer_raised"] = 1.0
            return 0.0

    def _paid(self, answer: str) -> float:
        item = self.task.metadata
        paid = self._calls("score", item["dataset"], item["config"], item["seed"], answer)
        if not math.isfinite(paid):
            raise CallFailed(f"it paid {paid}")
        return min(max(paid, 0.0), 1.0)


class ReasoningGymTasks:
    """Tasks by position, each made when it is asked for; several datasets take turns."""

    def __init__(
        self, calls: BoundedCalls, configs: Mapping[str, str], split: str, size: int, first_seed: int
    ) -> None:
        self._calls, self._configs, self._split, self._size = calls, configs, split, size
        self._names = tuple(configs)
        self._first_seed = FIRST_SEED[split] + first_seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> Task:
        if not 0 <= index < self._size:
            raise IndexError(f"task {index} of {self._size}")
        name = self._names[index % len(self._names)]
        config, seed = self._configs[name], self._first_seed + index // len(self._names)
        try:
            item = self._calls("item", name, config, seed)
        except (CallFailed, CallTimedOut) as error:
            raise EnvironmentFault(
                f"reasoning-gym could not make item {seed} of {name!r}: {error}"
            ) from error
        return Task(
            task_id=f"{name}/{self._split}/{index}",
            messages=(
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": item["question"]},
            ),
            label=item["answer"],
            metadata={"dataset": name, "config": config, "seed": seed},
        )

    def find(self, task_id: str) -> Task:
        """The task of that id. Raises ValueError where there is none."""
        name, _, rest = task_id.partition("/")
        split, _, index = rest.partition("/")
        known = name in self._configs and split == self._split and index.isdecimal() and len(index) < 12
        if not known or not int(index) < self._size or self._names[int(index) % len(self._names)] != name:
            raise ValueError(f"no task {task_id!r}; ids look like {self._names[0]}/{self._split}/0")
        return self[int(index)]


def read_answer(text: str) -> str | None:
    """The answer between the only pair of tags after the thinking; None for none, several, or one too long."""
    said = text.rpartition("</think>")[2]
    _, opened, rest = said.partition(_OPEN)
    answer, closed, rest = rest.partition(_CLOSE)
    _, opened_again, rest = rest.partition(_OPEN)
    if not opened or not closed or (opened_again and _CLOSE in rest) or len(answer) > MAX_ANSWER_CHARACTERS:
        return None
    return answer.strip()


def known_defects() -> Mapping[str, Sequence[str]]:
    """Datasets whose items or scorers are broken, and how, as `measure` finds them."""
    defects: Mapping[str, Sequence[str]] = _measured_defects()["datasets"]
    return defects


def known_defects_version() -> str:
    """The version of reasoning-gym that they were measured on."""
    return str(_measured_defects()["version"])


@functools.cache
def _measured_defects() -> Mapping[str, Any]:
    text = resources.files(__package__).joinpath("reasoning_gym_defects.json").read_text(encoding="utf-8")
    measured: Mapping[str, Any] = json.loads(text)
    return measured


def _checked(
    calls: BoundedCalls, names: Sequence[str], configs: Mapping[str, Any], allow_defects: bool
) -> dict[str, str]:
    """The options of each dataset as JSON. Raises ValueError."""
    if not names:
        raise ValueError("name at least one dataset of reasoning-gym")
    if strays := sorted(set(configs) - set(names)):
        raise ValueError(
            f"config has options of {strays[0]!r}, which is none of the datasets {', '.join(names)}"
        )
    known = calls("names")
    checked = {}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"reasoning-gym has no dataset {name!r}; {hint}")
        if name in known_defects() and not allow_defects:
            raise ValueError(
                f"dataset {name!r} of reasoning-gym is left out: {'; '.join(known_defects()[name])}. "
                "Pass allow_defects=True to take it nevertheless."
            )
        checked[name] = _checked_config(calls, name, configs.get(name, {}))
    return checked


def _checked_config(calls: BoundedCalls, name: str, config: Mapping[str, Any]) -> str:
    if taken := {"seed", "size"} & set(config):
        raise ValueError(f"{min(taken)!r} is an argument of the environment, not an option of {name!r}")
    text = json.dumps(dict(config), sort_keys=True)
    try:
        calls("check", name, text)
    except CallFailed as error:
        raise ValueError(
            f"dataset {name!r} of reasoning-gym does not take the options {text}: {error}"
        ) from error
    return text
