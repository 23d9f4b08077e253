"""The prompt cursor: every task once per epoch, and an exact position."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.rollout.groups import PromptCursor


@given(
    num_tasks=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 15), max_size=12),
    cut=st.integers(0, 12),
)
@pytest.mark.catalogue("B45")
def test_resumed_cursor_draws_what_an_uninterrupted_one_draws(num_tasks, seed, sizes, cut):
    whole = PromptCursor(num_tasks, seed=seed)
    uninterrupted = [prompt for size in sizes for prompt in whole.take(size)]
    first = PromptCursor(num_tasks, seed=seed)
    before = [prompt for size in sizes[:cut] for prompt in first.take(size)]
    second = PromptCursor(num_tasks, seed=seed, position=first.position)
    after = [prompt for size in sizes[cut:] for prompt in second.take(size)]
    assert before + after == uninterrupted
    assert second.position == whole.position == sum(sizes)


def test_every_epoch_draws_every_task_once_in_another_order():
    cursor = PromptCursor(50, seed=3)
    epochs = [cursor.take(50) for _ in range(3)]
    for number, prompts in enumerate(epochs):
        assert sorted(prompt.task_index for prompt in prompts) == list(range(50))
        assert {prompt.epoch for prompt in prompts} == {number}
    assert len({tuple(prompt.task_index for prompt in prompts) for prompts in epochs}) == 3


def test_group_ids_never_repeat_and_seeds_differ():
    prompts = PromptCursor(7, seed=1).take(70)
    assert max(Counter(prompt.group_id for prompt in prompts).values()) == 1
    others = PromptCursor(7, seed=2).take(70)
    assert [p.task_index for p in prompts] != [p.task_index for p in others]


def test_empty_task_source_is_refused():
    with pytest.raises(ValueError, match="empty"):
        PromptCursor(0, seed=0)
