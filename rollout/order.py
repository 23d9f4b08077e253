"""Which of the groups under way a step is trained on: pure functions of what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from polyturn.configs.schema.rollout import FifoOrder, RolloutConfig, WindowedOrder
from polyturn.envs.plugins import Signature, load_plugin


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupUnderWay:
    """A group that has begun and that no step has been trained on."""

    position: int
    """How many prompts were drawn before its own, over the whole run."""
    is_complete: bool
    """Whether all its episodes have ended."""
    age: int
    """How many steps its oldest token will be old in this step."""


class GroupOrder(Protocol):
    """Chooses the groups of a step."""

    def __call__(self, groups: Sequence[GroupUnderWay], num_groups: int) -> Sequence[int] | None:
        """The positions of `num_groups` complete ones, or None to wait until more of them are.

        `groups` are in the order in which they were drawn.
        """
        ...


SIGNATURE = Signature(
    what="group order",
    arguments=("groups", "num_groups"),
    text="def order(groups: Sequence[GroupUnderWay], num_groups: int) -> Sequence[int] | None",
    wrong_results=(str, bytes, float, int, bool),
)


def make_order(config: RolloutConfig) -> GroupOrder:
    """The order that the config names. Raises `ValueError` for a plug-in that cannot be called so."""
    order = config.order
    if isinstance(order, FifoOrder):
        return fifo
    if isinstance(order, WindowedOrder):
        return WindowedFifo(config.window)
    return cast(GroupOrder, load_plugin(SIGNATURE, order.target, order.options))


def fifo(groups: Sequence[GroupUnderWay], num_groups: int) -> list[int] | None:
    """Those that were drawn first, once all of them are complete."""
    first = groups[:num_groups]
    if len(first) < num_groups or not all(group.is_complete for group in first):
        return None
    return [group.position for group in first]


@dataclass(frozen=True, slots=True)
class WindowedFifo:
    """The earliest complete ones among the first `window`.

    In the order of completion, quick episodes are trained on early and slow ones by ever older weights; in the order of
    drawing, the slowest holds up all. Within a window a group is overtaken by less than `window` others.
    """

    window: int

    def __call__(self, groups: Sequence[GroupUnderWay], num_groups: int) -> list[int] | None:
        complete = [group.position for group in groups[: self.window] if group.is_complete]
        return complete[:num_groups] if len(complete) >= num_groups else None
