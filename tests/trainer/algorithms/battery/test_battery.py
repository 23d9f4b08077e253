"""Every registered function, at its defaults and at every other choice that its section offers, under every check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from polyturn.trainer.algorithms.losses import value_loss
from polyturn.trainer.algorithms.registry import POLICY_LOSSES, REDUCERS, Registry
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss
from polyturn.trainer.battery import Case, cases, checks, run_check
from polyturn.trainer.battery.kit import REGISTRIES

SUMS = {"token_sum"}
"""Reductions whose loss grows with the batch, on purpose."""


def every_check() -> Iterator[Any]:
    for registry in REGISTRIES:
        for case in cases(registry):
            for check in checks(registry, case.gradients):
                if registry is REDUCERS and check == "duplication" and case.entry.name in SUMS:
                    continue
                yield pytest.param(registry, case, check, id=f"{registry.what}-{case.name}-{check}")


@pytest.mark.parametrize(("registry", "case", "check"), every_check())
def test_registered(registry: Registry[Any], case: Case, check: str) -> None:
    run_check(registry, check, case.function, gradients=case.gradients)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("check", checks(POLICY_LOSSES))
def test_the_value_loss(check: str, clip: float | None) -> None:
    """It is reduced like a policy loss, so the same must hold of it: values for logprobs, returns for advantages."""

    def loss(batch: TokenBatch) -> TokenLoss:
        old = batch.proximal_logprobs
        return value_loss(batch.logprobs, batch.advantages, batch.mask, old_values=old, clip=clip)

    run_check(POLICY_LOSSES, check, loss)
