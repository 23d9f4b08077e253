"""The environments that come with the package."""

from __future__ import annotations

from polyturn.envs.registry import register


def register_builtin() -> None:
    """Register them; calling it again changes nothing."""
    register(
        "polyturn/TwoHopSearch-v0",
        "polyturn.envs.two_hop.env:TwoHopSearchEnv",
        description="Questions over a synthetic knowledge base that take two searches in sequence.",
    )
    register(
        "polyturn/CustomerService-v0",
        "polyturn.envs.customer_service.env:CustomerServiceEnv",
        description="A shop's agent with a policy and tools talks to a customer; records and words are checked.",
    )
    register(
        "polyturn/SearchR1-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="Search-R1: a question, a search engine, tags; exact match (arXiv 2503.09516).",
        kwargs={"style": "search_r1"},
    )
    register(
        "polyturn/Search-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="Search-R1's task with native tool calls.",
        kwargs={"style": "native"},
    )
    register(
        "polyturn/ASearcher-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="ASearcher's way to search and read pages, in tags (arXiv 2508.07976).",
        kwargs={"style": "asearcher"},
    )
    register(
        "polyturn/R1Searcher-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="R1-Searcher's way to search, in tags (arXiv 2503.05592).",
        kwargs={"style": "r1_searcher"},
    )
    register(
        "polyturn/ReSearch-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="ReSearch's way to search, in tags with a boxed answer (arXiv 2503.19470).",
        kwargs={"style": "research"},
    )
    register(
        "polyturn/ReCall-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="ReCall's way to search, with JSON tool calls and a boxed answer.",
        kwargs={"style": "recall"},
    )
    register(
        "polyturn/DeepResearcher-v0",
        "polyturn.envs.search.env:SearchEnv",
        description="DeepResearcher's way to search, with JSON calls of several queries (arXiv 2504.03160).",
        kwargs={"style": "deep_researcher"},
    )
    register(
        "polyturn/SolveCritiqueSelect-v0",
        "polyturn.envs.multi_agent:SolveCritiqueSelectEnv",
        description="Solvers, critics and a selector over one policy, each with a ledger and a reward of its own.",
    )
    register(
        "polyturn/CodeBreaker-v0",
        "polyturn.envs.games.code_breaker:CodeBreakerEnv",
        description="Find a hidden code from what each guess tells.",
    )
    register(
        "polyturn/TreasureHunt-v0",
        "polyturn.envs.games.treasure_hunt:TreasureHuntEnv",
        description="Walk through a house, find the key that fits, and take the treasure out of a chest.",
    )
    register(
        "polyturn/PythonTool-v0",
        "polyturn.envs.code.python_env:PythonToolEnv",
        description="Number puzzles, with a stateful Python interpreter in a sandbox as the tool.",
    )
    register(
        "polyturn/CodeUnitTests-v0",
        "polyturn.envs.code.env:CodeUnitTestsEnv",
        description="Write a function; unit tests in a sandbox grade it (rows in the form of HumanEval).",
    )
    register(
        "polyturn/CodeStdio-v0",
        "polyturn.envs.code.env:CodeStdioEnv",
        description="Write a program; what it prints is graded (rows in the form of LiveCodeBench).",
    )
    register(
        "polyturn/GSM8K-v0",
        "polyturn.envs.math.env:GSM8KEnv",
        description="School problems in words (arXiv 2110.14168): a sample, or the whole from a file.",
    )
    register(
        "polyturn/Math-v0",
        "polyturn.envs.math.env:MathEnv",
        description="Problems with an answer, of any file or made from a seed; the math verifier grades.",
    )
    register(
        "polyturn/MathCalculator-v0",
        "polyturn.envs.math.env:MathEnv",
        description="Problems with an answer, and a calculator as the tool.",
        kwargs={"calculator": True},
    )
    register(
        "polyturn/MathRetry-v0",
        "polyturn.envs.math.env:MathEnv",
        description="Problems with an answer, and three attempts: a wrong one is told so and earns less.",
        kwargs={"max_attempts": 3, "attempt_decay": 0.5},
    )
    register(
        "polyturn/SingleTurn-v0",
        "polyturn.envs.single_turn:SingleTurnEnv",
        description="A prompt and an answer, graded by a rule: for task files that need no environment of their own.",
    )
    register(
        "polyturn/ReasoningGym-v0",
        "polyturn.envs.adapters.reasoning_gym:ReasoningGymEnv",
        description="The procedural datasets of reasoning-gym, less those whose scorers are broken.",
    )
    register(
        "polyturn/TextEnv-v0",
        "polyturn.envs.adapters.text_env:TextEnvAdapter",
        description="Any text-only Gymnasium environment (env_id=...); by itself, the frozen lake.",
    )
    register(
        "polyturn/GEM-v0",
        "polyturn.envs.adapters.gem:GemEnv",
        description="The environments of GEM by their ids.",
    )
    register(
        "polyturn/SkyRLGym-v0",
        "polyturn.envs.adapters.skyrl_gym:SkyRLGymEnv",
        description="The environments of SkyRL-Gym by their ids.",
    )
    register(
        "polyturn/OpenEnv-v0",
        "polyturn.envs.adapters.openenv:OpenEnvEnv",
        description="The environment of an OpenEnv server; without one, a small game served on this machine.",
    )
    register(
        "polyturn/Verifiers-v0",
        "polyturn.envs.adapters.verifiers:VerifiersEnv",
        description="Tasksets of verifiers, played as conversations and scored by their own rewards.",
    )
