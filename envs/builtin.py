"""The environments that come with the package, and how Gymnasium learns of them.

It loads no environment, and not Gymnasium either, which offers no entry point to packages. So it waits for somebody to
import that: `gymnasium.make("polyturn/SearchR1-v0")` works in every program that imports both, in whichever order.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentInfo:
    """A registered environment."""

    env_id: str
    entry_point: str
    """`module:Class`."""
    description: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the constructor that `make` may override."""


BUILTIN: tuple[EnvironmentInfo, ...] = (
    EnvironmentInfo(
        env_id="polyturn/TwoHopSearch-v0",
        entry_point="polyturn.envs.two_hop.env:TwoHopSearchEnv",
        description="Questions over a synthetic knowledge base that take two searches in sequence.",
    ),
    EnvironmentInfo(
        env_id="polyturn/CustomerService-v0",
        entry_point="polyturn.envs.customer_service.env:CustomerServiceEnv",
        description="A shop's agent with a policy and tools talks to a customer; records and words are checked.",
    ),
    EnvironmentInfo(
        env_id="polyturn/SearchR1-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="Search-R1: a question, a search engine, tags; exact match (arXiv 2503.09516).",
        kwargs={"style": "search_r1"},
    ),
    EnvironmentInfo(
        env_id="polyturn/Search-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="Search-R1's task with native tool calls.",
        kwargs={"style": "native"},
    ),
    EnvironmentInfo(
        env_id="polyturn/ASearcher-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="ASearcher's way to search and read pages, in tags (arXiv 2508.07976).",
        kwargs={"style": "asearcher"},
    ),
    EnvironmentInfo(
        env_id="polyturn/R1Searcher-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="R1-Searcher's way to search, in tags (arXiv 2503.05592).",
        kwargs={"style": "r1_searcher"},
    ),
    EnvironmentInfo(
        env_id="polyturn/ReSearch-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="ReSearch's way to search, in tags with a boxed answer (arXiv 2503.19470).",
        kwargs={"style": "research"},
    ),
    EnvironmentInfo(
        env_id="polyturn/ReCall-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="ReCall's way to search, with JSON tool calls and a boxed answer.",
        kwargs={"style": "recall"},
    ),
    EnvironmentInfo(
        env_id="polyturn/DeepResearcher-v0",
        entry_point="polyturn.envs.search.env:SearchEnv",
        description="DeepResearcher's way to search, with JSON calls of several queries (arXiv 2504.03160).",
        kwargs={"style": "deep_researcher"},
    ),
    EnvironmentInfo(
        env_id="polyturn/SolveCritiqueSelect-v0",
        entry_point="polyturn.envs.multi_agent:SolveCritiqueSelectEnv",
        description="Solvers, critics and a selector over one policy, each with a ledger and a reward of its own.",
    ),
    EnvironmentInfo(
        env_id="polyturn/CodeBreaker-v0",
        entry_point="polyturn.envs.games.code_breaker:CodeBreakerEnv",
        description="Find a hidden code from what each guess tells.",
    ),
    EnvironmentInfo(
        env_id="polyturn/TreasureHunt-v0",
        entry_point="polyturn.envs.games.treasure_hunt:TreasureHuntEnv",
        description="Walk through a house, find the key that fits, and take the treasure out of a chest.",
    ),
    EnvironmentInfo(
        env_id="polyturn/PythonTool-v0",
        entry_point="polyturn.envs.code.python_env:PythonToolEnv",
        description="Number puzzles, with a stateful Python interpreter in a sandbox as the tool.",
    ),
    EnvironmentInfo(
        env_id="polyturn/CodeUnitTests-v0",
        entry_point="polyturn.envs.code.env:CodeUnitTestsEnv",
        description="Write a function; unit tests in a sandbox grade it (rows in the form of HumanEval).",
    ),
    EnvironmentInfo(
        env_id="polyturn/CodeStdio-v0",
        entry_point="polyturn.envs.code.env:CodeStdioEnv",
        description="Write a program; what it prints is graded (rows in the form of LiveCodeBench).",
    ),
    EnvironmentInfo(
        env_id="polyturn/Harbor-v0",
        entry_point="polyturn.envs.harbor.env:HarborEnv",
        description="Tasks of Harbor and Terminal-Bench: a shell in the task's container, graded by the task's tests.",
    ),
    EnvironmentInfo(
        env_id="polyturn/GSM8K-v0",
        entry_point="polyturn.envs.math.env:GSM8KEnv",
        description="School problems in words (arXiv 2110.14168): a sample, or the whole from a file.",
    ),
    EnvironmentInfo(
        env_id="polyturn/Math-v0",
        entry_point="polyturn.envs.math.env:MathEnv",
        description="Problems with an answer, of any file or made from a seed; the math verifier grades.",
    ),
    EnvironmentInfo(
        env_id="polyturn/MathCalculator-v0",
        entry_point="polyturn.envs.math.env:MathEnv",
        description="Problems with an answer, and a calculator as the tool.",
        kwargs={"calculator": True},
    ),
    EnvironmentInfo(
        env_id="polyturn/MathRetry-v0",
        entry_point="polyturn.envs.math.env:MathEnv",
        description="Problems with an answer, and three attempts: a wrong one is told so and earns less.",
        kwargs={"max_attempts": 3, "attempt_decay": 0.5},
    ),
    EnvironmentInfo(
        env_id="polyturn/SingleTurn-v0",
        entry_point="polyturn.envs.single_turn:SingleTurnEnv",
        description="A prompt and an answer, graded by a rule: for task files that need no environment of their own.",
    ),
    EnvironmentInfo(
        env_id="polyturn/ReasoningGym-v0",
        entry_point="polyturn.envs.adapters.reasoning_gym:ReasoningGymEnv",
        description="The procedural datasets of reasoning-gym, less those whose scorers are broken.",
    ),
    EnvironmentInfo(
        env_id="polyturn/TextEnv-v0",
        entry_point="polyturn.envs.adapters.text_env:TextEnvAdapter",
        description="Any text-only Gymnasium environment (env_id=...); by itself, the frozen lake.",
    ),
    EnvironmentInfo(
        env_id="polyturn/GEM-v0",
        entry_point="polyturn.envs.adapters.gem:GemEnv",
        description="The environments of GEM by their ids.",
    ),
    EnvironmentInfo(
        env_id="polyturn/SkyRLGym-v0",
        entry_point="polyturn.envs.adapters.skyrl_gym:SkyRLGymEnv",
        description="The environments of SkyRL-Gym by their ids.",
    ),
    EnvironmentInfo(
        env_id="polyturn/OpenEnv-v0",
        entry_point="polyturn.envs.adapters.openenv:OpenEnvEnv",
        description="The environment of an OpenEnv server; without one, a small game served on this machine.",
    ),
    EnvironmentInfo(
        env_id="polyturn/Verifiers-v0",
        entry_point="polyturn.envs.adapters.verifiers:VerifiersEnv",
        description="Tasksets of verifiers, played as conversations and scored by their own rewards.",
    ),
)


def register_builtin() -> None:
    """Register them with Gymnasium; calling it again changes nothing."""
    import gymnasium  # a large package that most of this one does without

    for info in BUILTIN:
        if info.env_id not in gymnasium.registry:
            gymnasium.register(info.env_id, info.entry_point, kwargs=dict(info.kwargs), order_enforce=False)


def register_with_gymnasium() -> None:
    """Register them where Gymnasium is imported already, else as soon as it has been."""
    if "gymnasium" in sys.modules:
        register_builtin()
    else:
        sys.meta_path.insert(0, _OnceGymnasiumIsImported())


class _OnceGymnasiumIsImported:
    """A finder that finds one module as the others do and goes away; once that is loaded, we register with it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if name != "gymnasium":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            register_builtin()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
