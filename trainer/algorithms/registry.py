"""Which functions make up an algorithm, by kind and by the name that a config gives them, and plug-ins of users.

Every function registers itself beside its code, with the formula, its source and the gradient that it claims to have.
The battery of tests and the table of docs/algorithms.md go by these entries, so that nothing is used untested or
undocumented. The modules with those that ship are imported when a registry is first asked.

Nothing here needs torch, so that a plug-in's signature is checked before anything starts.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar, cast

from polyturn.configs.errors import ConfigError, did_you_mean
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.section import Plugin, Section
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.trainer.algorithms import protocols

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P")

Gradient = Literal[
    "zero",
    "policy_gradient",
    "on_policy_gradient",
    "scaled_policy_gradient",
    "reverse_kl",
    "forward_kl",
    "reverse_minus_forward_kl",
    "biased",
]
"""What the expectation of a gradient is claimed to be, for tokens drawn from a behavior policy mu.

zero: nothing. policy_gradient: that of the expected advantage (losses) or reward (advantages) under the policy, for
any mu. on_policy_gradient: the same, where mu, the proximal policy and the policy are one. scaled_policy_gradient: a
multiple of it, (G - 1) / G for groups of G. reverse_kl: that of KL(policy || reference). forward_kl: that of
KL(reference || policy). reverse_minus_forward_kl: their difference. biased: none of these.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A registered function."""

    name: str
    """The `kind` that a config names it by."""
    function: Callable[..., Any]
    config: type[Section] | None
    """The section that the function takes as its argument `config`; None if it takes none."""
    formula: str
    """In one line, in the notation of docs/algorithms.md."""
    paper: str
    """arXiv ids, joined by `, `; or another source in words."""
    gradients: Mapping[str, Gradient]
    """The claim, by placement. Policy losses and advantages: `loss`. KL estimators: `loss` for a term of the loss,
    `loss_times_ratio` for one times policy / behavior with the ratio's own gradient, `loss_times_detached_ratio` for
    one without it, `reward` for one that is taken off the reward without gradient. Empty: nothing is claimed."""
    example: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the config's section as the battery makes one: those without a default, or whose default would leave
    nothing to see in a few tokens."""


class Registry(Generic[P]):
    """The functions of one kind, in the order in which they were registered; with its config bound, each is a P."""

    def __init__(self, signature: Signature, *modules: str) -> None:
        """Those that ship register in `modules`."""
        self.what = signature.what
        self._modules = modules
        self.signature = signature
        self._entries: dict[str, Entry] = {}

    def register(
        self,
        name: str,
        *,
        formula: str,
        paper: str,
        config: type[Section] | None = None,
        gradients: Mapping[str, Gradient] | None = None,
        example: Mapping[str, Any] | None = None,
    ) -> Callable[[F], F]:
        """A decorator that registers a function under the name and returns it unchanged."""
        assert name not in self._entries, f"there are two {self.what}s called {name!r}"

        def add(function: F) -> F:
            self._entries[name] = Entry(
                name=name,
                function=function,
                config=config,
                formula=formula,
                paper=paper,
                gradients=MappingProxyType(dict(gradients or {})),
                example=MappingProxyType(dict(example or {})),
            )
            return function

        return add

    def __getitem__(self, name: str) -> Entry:
        """The entry of that name. Raises `ValueError`, which names the nearest."""
        entries = self._filled()
        if name not in entries:
            near = did_you_mean(name, entries) or f"; there are {', '.join(entries)}"
            raise ValueError(f"there is no {self.what} {name!r}{near}")
        return entries[name]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._filled().values())

    def __len__(self) -> int:
        return len(self._filled())

    def _filled(self) -> Mapping[str, Entry]:
        for module in self._modules:
            importlib.import_module(f"{__package__}.{module}")
        return self._entries


POLICY_LOSSES: Registry[protocols.PolicyLoss] = Registry(protocols.POLICY_LOSS, "losses")
ADVANTAGES: Registry[protocols.AdvantageEstimator] = Registry(
    protocols.ADVANTAGE, "group_advantages", "token_advantages", "tree_advantages"
)
CORRECTIONS: Registry[protocols.Correction] = Registry(protocols.CORRECTION, "corrections")
ENTROPY_CONTROLS: Registry[protocols.EntropyControl] = Registry(protocols.ENTROPY_CONTROL, "entropy_control")
REDUCERS: Registry[protocols.Reducer] = Registry(protocols.REDUCER, "reductions")
KL_ESTIMATORS: Registry[protocols.KLEstimator] = Registry(protocols.KL_ESTIMATOR, "kl")
REWARD_POSTPROCESSORS: Registry[protocols.RewardPostprocessor] = Registry(
    protocols.REWARD_POSTPROCESSOR, "shaping"
)


def bind(registry: Registry[P], config: Section) -> P:
    """The function that a section names by its `kind`, with the section bound, to be called as its protocol says.

    Raises:
        ValueError: there is none of that name, or it is a plug-in that `load_plugin` refuses.
    """
    if isinstance(config, Plugin):
        return cast(P, _loaded_once(registry, config.target, json.dumps(config.options)))
    entry = registry[getattr(config, "kind")]  # noqa: B009 - a Section in general has none
    function = functools.partial(entry.function, config=config) if entry.config else entry.function
    return cast(P, function)


@functools.cache
def _loaded_once(registry: Registry[Any], target: str, options: str) -> Any:
    """A plug-in is bound for every micro-batch, but an object of a class is made once in a process."""
    return load_plugin(registry.signature, target, json.loads(options))


def check_plugins(config: AlgorithmConfig, *, where: str = "trainer.algorithm") -> None:
    """Load all plug-ins that an algorithm names. Raises ConfigError with a sentence for the first that is wrong.

    `where` is the algorithm's key in the config.
    """
    places: tuple[tuple[str, Registry[Any], Section], ...] = (
        ("reward_shaping", REWARD_POSTPROCESSORS, config.reward_shaping),
        ("advantage", ADVANTAGES, config.advantage),
        ("loss", POLICY_LOSSES, config.loss),
        ("reduction", REDUCERS, config.reduction),
        ("entropy_control", ENTROPY_CONTROLS, config.entropy_control),
        *((f"corrections.{i}", CORRECTIONS, section) for i, section in enumerate(config.corrections)),
    )
    for key, registry, section in places:
        if isinstance(section, Plugin):
            try:
                load_plugin(registry.signature, section.target, section.options)
            except ValueError as error:
                raise ConfigError(f"{where}.{key}: {error}") from error
