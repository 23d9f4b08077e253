"""Loads tasksets, and says what of theirs needs more than a conversation."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from polyturn.envs.messages import Message
from polyturn.envs.tasks import ListTasks, Task


@functools.lru_cache(maxsize=16)
def load_taskset(path: str, config: str) -> tuple[Any, tuple[Any, ...]]:
    """The taskset at `module:Class` with options as JSON, and its tasks. Shared, and to be left unchanged.

    Raises:
        ValueError: there is none, or it does not take these options, or never ends.
    """
    import verifiers.v1 as vf
    from verifiers.v1.utils.generic import concrete_type

    module, _, name = path.partition(":")
    try:
        kind: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"taskset must be 'module:Class', and {path!r} is none: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, vf.Taskset)):
        raise ValueError(f"{path!r} is no verifiers.v1.Taskset")
    config_kind = concrete_type(kind, vf.TasksetConfig) or vf.TasksetConfig
    make: Any = kind
    taskset = make(config_kind(**json.loads(config)))
    if not taskset.bounded:
        raise ValueError(f"{path!r} never ends; make a taskset of its first tasks, with `take`")
    return taskset, tuple(taskset)


@functools.lru_cache(maxsize=32)
def load_tasks(path: str, config: str, first: int, end: int) -> ListTasks:
    """The tasks at the positions from `first` to `end`, less the last, as tasks of ours."""
    _, tasks = load_taskset(path, config)
    return ListTasks([task_of(task) for task in tasks[first:end]])


def refuse_what_needs_a_runtime(kind: type, task: Any) -> None:
    """Raises ValueError where a task's hooks want the machine that verifiers would have started for a rollout."""
    import verifiers.v1 as vf

    needs = [hook for hook in ("setup", "finalize") if getattr(kind, hook) is not getattr(vf.Task, hook)]
    for hook in [*task.hooks("reward"), *task.hooks("metric")]:
        runtime = inspect.signature(hook).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            needs.append(hook.__name__)
    if getattr(kind, "NEEDS_CONTAINER", False):
        needs.append("NEEDS_CONTAINER")
    if task.hooks("stop"):
        needs.append("@stop")
    if needs:
        raise ValueError(
            f"{kind.__name__} cannot be played as a conversation: {', '.join(needs)} needs the runtime of a verifiers "
            "rollout. Play it with verifiers itself."
        )


def task_of(task: Any) -> Task:
    """A task of ours; ids are those of the data where it has some."""
    data = task.data
    messages: list[Message] = []
    if data.system_prompt:
        messages.append({"role": "system", "content": data.system_prompt})
    if isinstance(data.prompt, str):
        messages.append({"role": "user", "content": data.prompt})
    else:
        messages += [
            {"role": message.role, "content": _text(message.content)} for message in data.prompt or ()
        ]
    return Task(
        task_id=str(data.id or data.idx),
        messages=tuple(messages),
        label=getattr(data, "answer", None),
        metadata={"idx": data.idx},
    )


def _text(content: Any) -> str:
    from verifiers.v1.types import content_text

    return str(content_text(content) or "")


def new_trace(task: Any) -> Any:
    """An empty trace of an episode on `task`, as verifiers keeps it."""
    import verifiers.v1 as vf
    from verifiers.v1.state import state_cls

    return vf.Trace(
        task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        state=state_cls(type(task))(),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
    )


def record(trace: Any, message: Mapping[str, Any]) -> None:
    """Add a message of the conversation to a trace."""
    import verifiers.v1 as vf
    from verifiers.v1.types import AssistantMessage, SystemMessage, ToolMessage, UserMessage

    kinds = {"assistant": AssistantMessage, "system": SystemMessage, "tool": ToolMessage, "user": UserMessage}
    fields = {name: value for name, value in message.items() if name != "tool_calls"}
    if calls := message.get("tool_calls"):
        fields["tool_calls"] = [
            {
                "id": call["id"],
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"]),
            }
            for call in calls
        ]
    trace.nodes.append(
        vf.MessageNode(
            parent=len(trace.nodes) - 1 if trace.nodes else None,
            message=kinds[message["role"]](**fields),
            sampled=message["role"] == "assistant",
        )
    )
