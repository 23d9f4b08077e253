"""What an algorithm's config comes to in a run."""

from __future__ import annotations

import pytest

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.objective import ClipLoss


@pytest.mark.parametrize(
    ("overrides", "anchor"),
    [
        ([], None),
        (["rollout.max_staleness=2"], "behavior"),
        (["rollout.max_staleness=2", "trainer.algorithm.loss.anchor=proximal"], "proximal"),
        (["rollout.max_staleness=2", "trainer.algorithm.corrections=[{kind: truncated_importance}]"], None),
        (["rollout.max_staleness=2", "trainer.algorithm.corrections=[{kind: veto}]"], "behavior"),
    ],
)
def test_old_tokens_are_compared_with_who_drew_them_unless_a_correction_weighs_them(
    overrides: list[str], anchor: str | None
) -> None:
    algorithm = load_config("quickstart", overrides).algorithm
    assert isinstance(algorithm.loss, ClipLoss) and algorithm.loss.anchor == anchor
