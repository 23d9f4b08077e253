"""Every registered loss under every reduction, and the examples', over real process groups."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from polyturn.envs.plugins import load_plugin
from polyturn.trainer.algorithms.protocols import PolicyLoss, Reducer
from polyturn.trainer.algorithms.registry import POLICY_LOSSES, REDUCERS
from polyturn.trainer.algorithms.tokens import TokenBatch, TokenLoss
from polyturn.trainer.battery import BatteryFailure, cases, check_over_ranks
from polyturn.trainer.battery.ranks import LAYOUTS, Layout, Sums, require_sums, sums_on_rank
from tests.support.megatron.ranks_pool import RankContext, RankPool

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "algorithms"


def losses() -> dict[str, PolicyLoss]:
    own = load_plugin(POLICY_LOSSES.signature, f"{EXAMPLES / 'loss.py'}:simple_policy_optimization")
    return {**{case.name: case.function for case in cases(POLICY_LOSSES)}, "plug-in": own}


def reducers() -> dict[str, Reducer]:
    own = load_plugin(REDUCERS.signature, f"{EXAMPLES / 'reduction.py'}:root_length")
    return {**{case.name: case.function for case in cases(REDUCERS)}, "plug-in": own}


def on_rank(context: RankContext, layout: Layout) -> Sums:
    address = f"tcp://{context.master_address}:{context.master_port}"
    return sums_on_rank(context.rank, layout, address, losses(), reducers())


@pytest.mark.stack
@pytest.mark.catalogue("B14", "B18", "B19")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.num_ranks}x{layout.num_slices}")
def test_ranks_add_up_to_one_process(rank_pool: RankPool, layout: Layout) -> None:
    for sums in rank_pool.run(layout.num_ranks, on_rank, layout):
        assert all(bool(total[1:].any()) for total in sums.values())
        require_sums(sums, losses(), reducers(), 0)


def over_the_micro_batch(batch: TokenBatch, *, loss: PolicyLoss) -> TokenLoss:
    """A mean over what this rank happens to have."""
    found = loss(batch)
    return TokenLoss(values=found.values / batch.mask.sum().clamp(min=1), clipped=found.clipped)


def broken_on_rank(context: RankContext, layout: Layout) -> Sums:
    address = f"tcp://{context.master_address}:{context.master_port}"
    return sums_on_rank(context.rank, layout, address, broken(), reducers())


def broken() -> dict[str, PolicyLoss]:
    return {"broken": functools.partial(over_the_micro_batch, loss=losses()["clip"])}


@pytest.mark.stack
@pytest.mark.catalogue("B14", "B18", "B19")
def test_a_mean_over_a_rank_is_found(rank_pool: RankPool) -> None:
    for sums in rank_pool.run(2, broken_on_rank, LAYOUTS[0]):
        with pytest.raises(BatteryFailure, match=r"broken under .* over ranks"):
            require_sums(sums, broken(), reducers(), 0)


@pytest.mark.stack
def test_a_plugins_author_starts_ranks_with_one_call() -> None:
    """Of functions that a spawned process can import; it starts the processes by itself."""
    (clip,) = (case.function for case in cases(POLICY_LOSSES) if case.name == "clip")
    (token_mean,) = (case.function for case in cases(REDUCERS) if case.name == "token_mean")
    check_over_ranks({"clip": clip}, {"token_mean": token_mean})
