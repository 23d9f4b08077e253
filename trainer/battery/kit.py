"""The battery: what every function of an algorithm must pass, ours or a plug-in's.

For a plug-in, in a test of its author's:

    run_battery(POLICY_LOSSES, "my_loss.py:my_loss", {"beta": 0.1})

or, one test for each check:

    @pytest.mark.parametrize("check", checks(POLICY_LOSSES))
    def test_my_loss(check):
        run_check(POLICY_LOSSES, check, my_loss)
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from polyturn.configs.schema.section import Section
from polyturn.envs.plugins import load_plugin
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    ENTROPY_CONTROLS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
    Entry,
    Gradient,
    Registry,
    bind,
)
from polyturn.trainer.battery.invariances import BatteryFailure, Check
from polyturn.trainer.battery.rewards import ADVANTAGE_CHECKS, POSTPROCESSOR_CHECKS
from polyturn.trainer.battery.softmax import (
    check_advantage_gradient,
    check_kl_gradient,
    check_loss_gradient,
)
from polyturn.trainer.battery.token_losses import KL_CHECKS, LOSS_CHECKS
from polyturn.trainer.battery.token_weights import CONTROL_CHECKS, CORRECTION_CHECKS, REDUCER_CHECKS

P = TypeVar("P")
Claims = Mapping[str, Gradient]

_CHECKS: tuple[tuple[Registry[Any], Mapping[str, Check]], ...] = (
    (POLICY_LOSSES, LOSS_CHECKS),
    (ADVANTAGES, ADVANTAGE_CHECKS),
    (CORRECTIONS, CORRECTION_CHECKS),
    (ENTROPY_CONTROLS, CONTROL_CHECKS),
    (REDUCERS, REDUCER_CHECKS),
    (KL_ESTIMATORS, KL_CHECKS),
    (REWARD_POSTPROCESSORS, POSTPROCESSOR_CHECKS),
)
REGISTRIES: tuple[Registry[Any], ...] = tuple(registry for registry, _ in _CHECKS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A function under test."""

    name: str
    """`clip` or, with an option that is not at its default, `clip-anchor=behavior`."""
    function: Any
    """With its config bound, as its protocol says."""
    entry: Entry
    gradients: Claims
    """Its entry's at the defaults. With another option an advantage claims nothing, a loss only what all do."""


def checks(registry: Registry[Any], gradients: Claims | None = None) -> dict[str, Check]:
    """The checks of a kind of function by name; their docstrings say what must hold.

    Args:
        gradients: What the function claims, as in `Entry.gradients`: one check more for each claim.
    """
    found = dict(next(found for known, found in _CHECKS if known is registry))
    for placement, claim in (gradients or {}).items():
        found[f"gradient_as_{placement}"] = _claim_check(registry, placement, claim)
    return found


def _claim_check(registry: Registry[Any], placement: str, claim: Gradient) -> Check:
    if registry is KL_ESTIMATORS:
        return lambda function, seed: check_kl_gradient(function, placement, claim, seed)
    assert placement == "loss" and registry in (POLICY_LOSSES, ADVANTAGES), (registry.what, placement)
    check = check_loss_gradient if registry is POLICY_LOSSES else check_advantage_gradient
    return lambda function, seed: check(function, claim, seed)


def cases(registry: Registry[Any]) -> Iterator[Case]:
    """Every registered function with its defaults, and once more for each other choice that its section offers."""
    for entry in registry:
        if entry.config is None:
            yield Case(name=entry.name, function=entry.function, entry=entry, gradients=entry.gradients)
            continue
        base = {"kind": entry.name, **entry.example}
        for suffix, changes in _variants(entry.config, entry.example):
            config = entry.config.model_validate({**base, **changes})
            claims = _claims_with_options(registry, entry) if changes else entry.gradients
            function = bind(registry, config)
            yield Case(name=entry.name + suffix, function=function, entry=entry, gradients=claims)


def _claims_with_options(registry: Registry[Any], entry: Entry) -> Claims:
    """An option may turn off what makes a gradient exact, but on-policy it is the policy's."""
    if registry is not POLICY_LOSSES:
        return {}
    return {
        placement: "on_policy_gradient" if claim == "policy_gradient" else claim
        for placement, claim in entry.gradients.items()
    }


def run_check(
    registry: Registry[P],
    check: str,
    function: P | str,
    options: Mapping[str, Any] | None = None,
    *,
    gradients: Claims | None = None,
    seed: int = 0,
) -> None:
    """Apply one check to a function, or to a plug-in by its target and options.

    Args:
        gradients: What the function claims, as in `Entry.gradients`.

    Raises:
        BatteryFailure: the function does not pass.
        ValueError: there is no such plug-in, or it has a wrong signature.
    """
    loaded: Any = (
        load_plugin(registry.signature, function, options) if isinstance(function, str) else function
    )
    checks(registry, gradients)[check](loaded, seed)


def run_battery(
    registry: Registry[P],
    function: P | str,
    options: Mapping[str, Any] | None = None,
    *,
    gradients: Claims | None = None,
    skip: tuple[str, ...] = (),
    seed: int = 0,
) -> None:
    """Apply all checks of its kind to a function, or to a plug-in by its target and options.

    Args:
        gradients: What the function claims, as in `Entry.gradients`.
        skip: Checks that do not apply, such as `duplication` to a reduction that is a sum.

    Raises:
        BatteryFailure: one or more checks failed; a sentence for each.
        ValueError: there is no such plug-in, or it has a wrong signature.
    """
    failures = []
    for name in checks(registry, gradients):
        if name not in skip:
            try:
                run_check(registry, name, function, options, gradients=gradients, seed=seed)
            except BatteryFailure as failure:
                failures.append(f"{name}: {failure}")
    if failures:
        raise BatteryFailure("; ".join(failures))


def _variants(config: type[Section], example: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The defaults, then each field that is a choice, a switch or off by its default, at each other value."""
    yield "", {}
    hints = typing.get_type_hints(config)
    for name, field in config.model_fields.items():
        if name == "kind":
            continue
        default = example.get(name, field.default)
        is_share = any(getattr(limit, "le", None) == 1 for limit in field.metadata)
        for choice in _choices(hints[name], default, is_share=is_share):
            if choice != default:
                yield f"-{name}={choice}", {name: choice}


def _choices(hint: Any, default: Any, *, is_share: bool) -> tuple[Any, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    if hint is bool:
        return (False, True)
    if default is None and float in typing.get_args(hint):
        return (3.0,)
    # A coefficient that is off, and a discount that is none.
    if hint is float and (default == 0.0 or (default == 1.0 and is_share)):
        return (0.5,)
    return ()
