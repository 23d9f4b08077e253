"""Which functions make up an algorithm, by kind and by the name that a config gives them.

Every function registers itself beside its code, with the formula, its source and the gradient that it claims to have.
The battery of tests and the table of docs/algorithms.md go by these entries, so that nothing is used untested or
undocumented. `polyturn.trainer.algorithms.builtin` imports all modules that register; import it before you look up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, Literal, TypeVar

from polyturn.configs.errors import did_you_mean
from polyturn.configs.schema.section import Section
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
    """Keys of the config's section that have no default, so that the battery can make one."""


class Registry(Generic[P]):
    """The functions of one kind, in the order in which they were registered; with its config bound, each is a P."""

    def __init__(self, what: str, signature: protocols.Signature) -> None:
        """`what` names one of its functions in messages: `policy loss`."""
        self.what = what
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
        if name not in self._entries:
            near = did_you_mean(name, self._entries) or f"; there are {', '.join(self._entries)}"
            raise ValueError(f"there is no {self.what} {name!r}{near}")
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


POLICY_LOSSES: Registry[protocols.PolicyLoss] = Registry("policy loss", protocols.POLICY_LOSS)
ADVANTAGES: Registry[protocols.AdvantageEstimator] = Registry("advantage", protocols.ADVANTAGE)
CORRECTIONS: Registry[protocols.Correction] = Registry("correction", protocols.CORRECTION)
REDUCERS: Registry[protocols.Reducer] = Registry("reduction", protocols.REDUCER)
KL_ESTIMATORS: Registry[protocols.KLEstimator] = Registry("KL estimator", protocols.KL_ESTIMATOR)
REWARD_POSTPROCESSORS: Registry[protocols.RewardPostprocessor] = Registry(
    "reward post-processing", protocols.REWARD_POSTPROCESSOR
)
