"""The order in which tasks are drawn: complete, seeded, exact in its proportions, and resumable anywhere."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tasks import GeneratedTasks, MixtureTasks, draw_order, order
from polyturn.envs.tasks.order import MixtureOrder, ShuffledOrder, permuted


def some_tasks(count, name="t"):
    return ListTasks([Task.from_prompt(f"{name}-{i}", "p") for i in range(count)])


@given(size=st.integers(1, 300), key=st.text(max_size=5))
@settings(max_examples=60)
def test_the_keyed_permutation_is_one(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_the_keyed_permutation_mixes_well():
    """Neighbours end up far apart: of 10,000 the mean distance is a third, as for independent draws."""
    size = 10_000
    places = [permuted(index, size, "seed") for index in range(2000)]
    distances = [abs(a - b) for a, b in itertools.pairwise(places)]
    assert 0.3 < sum(distances) / len(distances) / size < 0.37
    assert places != [permuted(index, size, "other") for index in range(2000)]


@pytest.mark.parametrize("listed", [True, False])
def test_every_epoch_has_every_task_once_in_another_order(monkeypatch, listed):
    if not listed:
        monkeypatch.setattr(order, "MAX_LISTED", 10)
    shuffled = ShuffledOrder(37, seed=3)
    epochs = [[shuffled[37 * epoch + index] for index in range(37)] for epoch in range(3)]
    for number, draws in enumerate(epochs):
        assert sorted(draw.task_index for draw in draws) == list(range(37))
        assert {draw.epoch for draw in draws} == {number}
    assert len({tuple(draw.task_index for draw in draws) for draws in epochs}) == 3


def test_sources_that_are_huge_or_endless_are_shuffled_without_a_list():
    endless = draw_order(GeneratedTasks(lambda index, seed: {"prompt": "p", "answer": index}), seed=1)
    drawn = [endless[position].task_index for position in range(200)]
    assert len(set(drawn)) == 200
    assert max(drawn) > 2**60
    assert (
        drawn[150]
        == draw_order(GeneratedTasks(lambda i, s: {"prompt": "p", "answer": i}), seed=1)[150].task_index
    )


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    num_draws=st.integers(1, 3000),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_proportions_are_exact(weights, num_draws, seed):
    """After whole blocks each source was drawn from as often as its weight says, but for rounding."""
    mixture = MixtureTasks([some_tasks(5, str(i)) for i in range(len(weights))], weights=weights)
    mixed = MixtureOrder(mixture, seed=seed)
    block = mixed._block
    num_draws = min(-(-num_draws // block), 5) * block
    counts = Counter(mixed[position].task_index // 5 for position in range(num_draws))
    for source, weight in enumerate(weights):
        assert abs(counts[source] - num_draws * weight / sum(weights)) < 1 + 1e-6


def test_each_source_of_a_mixture_has_epochs_of_its_own():
    mixture = MixtureTasks([some_tasks(10, "a"), some_tasks(3, "b")], weights=[1, 1])
    mixed = draw_order(mixture, seed=0)
    draws = [mixed[position] for position in range(640)]
    for start, size in ((0, 10), (10, 3)):
        own = [draw for draw in draws if start <= draw.task_index < start + size]
        for epoch in range(len(own) // size):
            part = own[epoch * size : (epoch + 1) * size]
            assert sorted(draw.task_index - start for draw in part) == list(range(size))
            assert {draw.epoch for draw in part} == {epoch}
    longest_run = max(len(run) for run in "".join("ab"[d.task_index >= 10] for d in draws).split("b"))
    assert 2 <= longest_run < 30, "sources are shuffled within a block"


def test_a_mixture_is_resumed_at_any_position():
    mixture = MixtureTasks([some_tasks(10, "a"), some_tasks(3, "b")], weights=[0.3, 0.7])
    whole = [MixtureOrder(mixture, seed=5)[position] for position in (0, 63, 64, 1000, 10**12)]
    mixed = MixtureOrder(mixture, seed=5)
    assert [mixed[position] for position in (10**12, 1000, 64, 63, 0)] == whole[::-1]
    other = MixtureOrder(mixture, seed=6)
    assert [other[position] for position in range(64)] != [mixed[position] for position in range(64)]


def test_a_weight_of_next_to_nothing_is_refused():
    mixture = MixtureTasks([some_tasks(1, "a"), some_tasks(1, "b")], weights=[1, 1e-9], names=["a", "b"])
    with pytest.raises(ValueError, match="b: its weight is less than a millionth"):
        MixtureOrder(mixture, seed=0)
