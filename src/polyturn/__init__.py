"""Polyturn: an RL gym for multi-turn tool use.

    import polyturn

    class Arithmetic(polyturn.ToolEnv): ...       # an environment, and
    polyturn.register("my/Arithmetic-v0", Arithmetic)
    env = polyturn.make("polyturn/SearchR1-v0")   # one that is there; gymnasium.make knows it too
    run = polyturn.train("quickstart", seed=1)    # the directory of the finished run
    [report] = polyturn.evaluate("quickstart")    # of its policy, on tasks held out

These names are all that most programs need; the packages below have the rest. Each is loaded when it is first used, so
that `import polyturn` takes milliseconds, and needs neither torch, Ray, SGLang nor Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from polyturn.envs.builtin import register_with_gymnasium
from polyturn.version import __version__

if TYPE_CHECKING:
    from polyturn.configs.errors import ConfigError, Interrupted, RunFailure
    from polyturn.configs.schema.run import RunConfig
    from polyturn.envs.faults import EnvironmentFault
    from polyturn.envs.messages import (
        AssistantMessage,
        EpisodeView,
        ListTasks,
        Message,
        Observation,
        Score,
        Task,
        TaskSource,
    )
    from polyturn.envs.registry import list_environments, make, register
    from polyturn.envs.rewards.answers import exact_match
    from polyturn.envs.tool_env import ToolEnv
    from polyturn.runs import EvaluationReport, evaluate, load_config, train
    from polyturn.tools.tool import tool
    from polyturn.tools.types import ToolCall, ToolError, ToolResult, ToolSpec

__all__ = [
    "AssistantMessage",
    "ConfigError",
    "EnvironmentFault",
    "EpisodeView",
    "EvaluationReport",
    "Interrupted",
    "ListTasks",
    "Message",
    "Observation",
    "RunConfig",
    "RunFailure",
    "Score",
    "Task",
    "TaskSource",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "ToolResult",
    "ToolSpec",
    "__version__",
    "evaluate",
    "exact_match",
    "list_environments",
    "load_config",
    "make",
    "register",
    "tool",
    "train",
]

_HOMES = {
    "polyturn.configs.errors": ("ConfigError", "Interrupted", "RunFailure"),
    "polyturn.configs.schema.run": ("RunConfig",),
    "polyturn.envs.faults": ("EnvironmentFault",),
    "polyturn.envs.messages": (
        "AssistantMessage",
        "EpisodeView",
        "ListTasks",
        "Message",
        "Observation",
        "Score",
        "Task",
        "TaskSource",
    ),
    "polyturn.envs.registry": ("list_environments", "make", "register"),
    "polyturn.envs.rewards.answers": ("exact_match",),
    "polyturn.envs.tool_env": ("ToolEnv",),
    "polyturn.runs": ("EvaluationReport", "evaluate", "load_config", "train"),
    "polyturn.tools.tool": ("tool",),
    "polyturn.tools.types": ("ToolCall", "ToolError", "ToolResult", "ToolSpec"),
}
"""Where the public names are; the imports above say the same to editors and type checkers."""
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

register_with_gymnasium()


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'polyturn' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
