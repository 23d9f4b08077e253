"""Batch arithmetic and placement."""

from __future__ import annotations

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.sizing.arithmetic import check_batch

BATCH = ["rollout.prompts_per_step=6", "rollout.samples_per_prompt=4"]


@pytest.mark.parametrize(("batch", "updates"), [(24, 1), (12, 2), (8, 3)])
def test_a_batch_that_adds_up(batch: int, updates: int) -> None:
    overrides = [*BATCH, f"trainer.global_batch_size={batch}", f"trainer.updates_per_step={updates}"]
    assert check_batch(load_config("quickstart", overrides)) == (
        f"6 prompts x 4 samples = 24 episodes a step = {batch} global batch x {updates} update(s)"
    )


@pytest.mark.parametrize(
    ("updates", "fix"),
    [(2, "trainer.global_batch_size=12"), (5, "trainer.global_batch_size=24 trainer.updates_per_step=1")],
)
def test_a_batch_that_does_not_shows_both_sides_and_a_fix_that_works(updates: int, fix: str) -> None:
    overrides = [*BATCH, "trainer.global_batch_size=7", f"trainer.updates_per_step={updates}"]
    with pytest.raises(ConfigError) as caught:
        check_batch(load_config("quickstart", overrides))
    assert f"but 6 x 4 = 24 and 7 x {updates} = {7 * updates}; for example set {fix}" in str(caught.value)
    check_batch(load_config("quickstart", [*overrides, *fix.split()]))


def test_groups_of_one_and_empty_ranks_are_refused() -> None:
    one = ["rollout.samples_per_prompt=1", "rollout.prompts_per_step=4", "trainer.global_batch_size=4"]
    with pytest.raises(ConfigError, match="a group of one episode has no baseline"):
        check_batch(load_config("quickstart", one))
    # A critic is a baseline, and so is the batch.
    for advantage in ("{kind: ppo_gae}", "{kind: rloo, singletons: batch_mean}"):
        check_batch(load_config("quickstart", [*one, f"trainer.algorithm.advantage={advantage}"]))
    few = ["rollout.samples_per_prompt=2", "rollout.prompts_per_step=1", "trainer.global_batch_size=2"]
    with pytest.raises(ConfigError, match=r"trainer.parallel.data=4 ranks"):
        check_batch(load_config("quickstart", [*few, "trainer.parallel.data=4"]))
