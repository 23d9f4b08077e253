"""What is looked at before a run starts: the chat template, room for answers, the labels that rewards need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import Dialect, HermesDialect, TagDialect
from polyturn.agents.dialects.families import dialect_of_model
from polyturn.agents.policies.episodes import NamedPolicy
from polyturn.agents.template_check import first_fault
from polyturn.agents.turns import shape_of
from polyturn.configs.dialects import AUTO
from polyturn.configs.schema.branching import NoBranching
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import (
    AssistantMessage,
    EnvironmentChoice,
    ListTasks,
    Message,
    Task,
    TaskSource,
    where_of,
)
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.registry import make
from polyturn.envs.rewards.factory import make_group_rewards
from polyturn.envs.rewards.rules import check_label
from polyturn.envs.tasks import MixtureTasks, SlicedTasks
from polyturn.envs.tasks.files import FileTasks
from polyturn.rollout.factory import dialect_of, renderer_of, run_reward, tasks_of
from polyturn.tools.types import ToolCall, ToolSpec

logger = logging.getLogger(__name__)


def check_prompts(source: TaskSource, *, tokenizer_path: Path, max_tokens: int) -> None:
    """Count the prompts of tasks in memory that alone fill `max_tokens`, the template and the tools aside.

    A source that is read from disk is not looked at: what is too long there fails when it is played, and is counted.

    Raises:
        ValueError: no prompt of the source leaves room for an answer.
    """
    if not isinstance(source, ListTasks) or not tokenizer_path.is_file():
        return
    # A token takes a byte at least, so nearly all prompts are known to be short without being tokenised.
    long = [task for task in (source[i] for i in range(len(source))) if _num_bytes(task) >= max_tokens]
    if not long:
        return
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    counts = {task.task_id: len(tokenizer.encode(_text(task), add_special_tokens=False).ids) for task in long}
    too_long = {task_id: count for task_id, count in counts.items() if count >= max_tokens}
    if not too_long:
        return
    task_id, count = next(iter(too_long.items()))
    found = (
        f"{len(too_long):,} of {len(source):,} prompts leave no room for an answer in max_tokens_per_episode="
        f"{max_tokens:,}, such as that of task {task_id!r} with {count:,} tokens"
    )
    if len(too_long) == len(source):
        raise ValueError(f"{found}; raise environment.max_tokens_per_episode, or shorten them")
    logger.warning("%s: their episodes will fail and be counted", found)


def _text(task: Task) -> str:
    return "\n".join(message["content"] for message in task.messages)


def _num_bytes(task: Task) -> int:
    return len(_text(task).encode("utf-8", "replace"))


MAX_STORED = 20_000
"""So many tasks of each file are looked at; of a longer one they are spread evenly."""
MAX_MADE = 32
"""The first so many tasks of a source that makes them are looked at."""


def check_rewards(config: RunConfig) -> None:
    """Raise `ValueError` for a reward or group reward that cannot be had."""
    try:
        run_reward(config)
    except ValueError as error:
        raise ValueError(f"reward: {error}") from error
    try:
        make_group_rewards(config.group_rewards)
    except ValueError as error:
        raise ValueError(f"group_rewards: {error}") from error


def check_named_policy(config: RunConfig, policy: NamedPolicy) -> None:
    """Raise `ValueError` where a policy that is named cannot play what an evaluation plays, or nothing can."""
    check_rewards(config)
    with closing(make(config.environment.id, **config.environment.options)) as env:
        policy.check(env)
    check_tasks(config, tasks_of(config, config.evaluation.split))


def check_branching(config: RunConfig) -> None:
    """Raise `ValueError` where episodes are to branch in the run's only environment, and cannot."""
    environment = config.environment
    if isinstance(config.rollout.branching, NoBranching) or environment.tasks is not None:
        return
    with closing(make(environment.id, **environment.options)) as env:
        if not env.is_replayable:
            raise ValueError(
                f"rollout.branching: {environment.id} does not say that it can be rebuilt from its seed and actions "
                "(is_replayable), so that every sample would be played from the start; set rollout.branching.kind=none"
            )


def check_tasks(config: RunConfig, source: TaskSource) -> None:
    """Raise `ValueError` for tasks whose label cannot be paid, or whose environment cannot be made.

    The message counts those of the first source that has such, and names the first.
    """
    checks = _Checks(config)
    try:
        for one in source.sources if isinstance(source, MixtureTasks) else (source,):
            _check_source(one, checks)
    finally:
        checks.close()


def _check_source(source: TaskSource, checks: _Checks) -> None:
    first, num_wrong, num_tasks = "", 0, 0
    for index in _looked_at(source):
        num_tasks += 1
        task = source[index]
        try:
            checks.check(task)
        except ValueError as error:
            num_wrong += 1
            where = where_of(source, index)
            named = where if where.startswith("task ") else f"{where}: task {task.task_id!r}"
            first = first or f"{named}: {error}"
    if num_wrong:
        others = (
            f"; so it is with {num_wrong:,} of the {num_tasks:,} tasks looked at" if num_wrong > 1 else ""
        )
        raise ValueError(first + others)


def _looked_at(source: TaskSource) -> Iterator[int]:
    """The positions of the tasks to check."""
    inner = source.source if isinstance(source, SlicedTasks) else source
    if not isinstance(inner, FileTasks | ListTasks):
        yield from range(min(MAX_MADE, len(source)))
        return
    num_checked = getattr(inner, "num_checked", None)
    size = len(source) if num_checked is None else min(num_checked, len(source))
    step = max(1, -(-size // MAX_STORED))
    yield from range(0, size, step)


class _Checks:
    """Checks tasks against what grades them; equal labels and environments once. Close it at the end."""

    def __init__(self, config: RunConfig) -> None:
        self._reward = run_reward(config)
        self._default = EnvironmentChoice(env_id=config.environment.id, options=config.environment.options)
        self._environments: dict[str, PlayedEnv] = {}
        self._found: dict[Any, str | None] = {}

    def check(self, task: Task) -> None:
        """Raise `ValueError` for a task that cannot be played or paid."""
        environment = self._environment(task.environment or self._default)
        reward = task.reward if task.reward is not None else self._reward
        key = (id(environment), id(reward), type(task.label), task.label)
        try:
            problem = self._found[key]
        except (KeyError, TypeError):  # a label that is a list or a mapping has no hash
            problem = self._problem(environment, reward, task.label)
            if isinstance(task.label, str | int | float):
                self._found[key] = problem
        if problem is not None:
            raise ValueError(problem)

    def close(self) -> None:
        """Close the environments."""
        for environment in self._environments.values():
            environment.close()

    def _problem(self, environment: PlayedEnv, reward: Any, label: Any) -> str | None:
        try:
            if reward is not None:
                check_label(reward, label)
            if reward is None or getattr(reward, "uses_environment_grade", False):
                environment.check_label(label)
        except ValueError as error:
            return str(error)
        return None

    def _environment(self, choice: EnvironmentChoice) -> PlayedEnv:
        key = f"{choice.env_id} {choice.options!r}"
        if key not in self._environments:
            self._environments[key] = make(choice.env_id, **choice.options)
        return self._environments[key]


_QUESTION: Message = {"role": "user", "content": "q"}
_CALL = AssistantMessage(
    content="c", reasoning="r", tool_calls=(ToolCall(id="call_0", name="search", arguments={"query": "x"}),)
)
_RESULT: Message = {"role": "tool", "tool_call_id": "call_0", "name": "search", "content": "x"}


def check_chat_template(config: RunConfig, directory: Path) -> list[str]:
    """Try the model's chat template as the run will use it.

    Returns:
        Sentences about what it does that one may not expect.

    Raises:
        ValueError: the run cannot use it.
    """
    dialect = dialect_of(config.model, directory)
    renderer = renderer_of(config.model, directory, dialect)
    notes: list[str] = []
    if config.model.dialect == AUTO:
        name = dialect_of_model(directory, config.model.template)
        notes.append(f"model.dialect: auto reads calls as `{name}` does")
    if not isinstance(dialect, TagDialect):
        with closing(make(config.environment.id, **config.environment.options)) as env:
            specs = env.tools
        notes += _tool_notes(renderer, specs, dialect, config.model.dialect) if specs else ()
        if config.model.history == "template":
            notes += _history_notes(renderer, with_tools=bool(specs))
            _check_turn_by_turn(renderer)
    return notes


def _tool_notes(
    renderer: ChatRenderer, specs: tuple[ToolSpec, ...], dialect: Dialect, name: str
) -> list[str]:
    notes = []
    if renderer.form.results_as_text:
        notes.append(
            "the chat template has no tools: specs and results are written as text (model.tool_prompt)"
        )
    elif not _shows_tools(renderer, specs):
        notes.append(
            "the chat template does not show tools to the model: the task's own messages must describe them, or set "
            "model.tool_prompt: text"
        )
    if renderer.form.calls_as_text:
        if not isinstance(dialect, HermesDialect):
            notes.append(
                f"calls are written as text in the way of model.dialect: hermes, which {name} does not read"
            )
    elif (written := renderer.written_call()) is not None:
        read = dialect.parse(written, tools=specs)
        if not any(call.error is None for call in read.tool_calls):
            notes.append(
                f"the chat template writes tool calls as {written.strip()!r}, which model.dialect: {name} does not "
                "read; set model.dialect: auto, or model.tool_prompt: text to have the model told how to call"
            )
    return notes


def _shows_tools(renderer: ChatRenderer, specs: tuple[ToolSpec, ...]) -> bool:
    try:
        return renderer.shows_tools(specs)
    except ValueError as error:
        raise ValueError(
            f"{error} where it is given the environment's tools; model.tool_prompt: text has them written as text"
        ) from error


def _check_turn_by_turn(renderer: ChatRenderer) -> None:
    fault = first_fault(renderer)
    if fault is not None:
        raise ValueError(
            f"the chat template renders a conversation whole otherwise than turn by turn: behind {fault.before!r} "
            f"stands {fault.template!r}, not {fault.turn_by_turn!r}; model.history: sampled keeps turns as they were "
            "sampled, and model.template takes another template"
        )


def _history_notes(renderer: ChatRenderer, *, with_tools: bool) -> list[str]:
    call = _CALL.to_message()
    behind = {
        "a tool's result": shape_of([_QUESTION, call, _RESULT], with_tools=with_tools),
        "a user's message": shape_of(
            [_QUESTION, {"role": "assistant", "content": "c", "reasoning": "r"}, _QUESTION],
            with_tools=with_tools,
        ),
    }
    changed = [what for what, shape in behind.items() if not renderer.continues_shape(shape)]
    if not changed:
        return []
    return [
        f"the chat template rewrites earlier turns behind {' and '.join(changed)}, by dropping thoughts or moving "
        "tools: episodes go on in a new segment there; model.history: sampled keeps turns as they were sampled"
    ]
