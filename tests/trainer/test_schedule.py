"""Learning rates against their closed forms."""

import math

import pytest

from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.trainer import OptimizerConfig
from polyturn.trainer.megatron.optimizer import LearningRateSchedule


def schedule(num_updates: int | None = 12, **settings) -> LearningRateSchedule:
    config = OptimizerConfig.model_validate({"learning_rate": 2.0, "warmup_updates": 2, **settings})
    return LearningRateSchedule.from_config(config, num_updates=num_updates)


def test_constant_after_a_linear_warm_up():
    rates = schedule(None)
    assert [rates(update) for update in range(4)] == [1.0, 2.0, 2.0, 2.0]
    assert schedule(None, warmup_updates=0)(0) == 2.0


def test_cosine():
    rates = schedule(schedule={"kind": "cosine", "final_fraction": 0.1})
    for update in range(2, 13):
        expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (update - 2) / 10)) / 2)
        assert rates(update) == pytest.approx(expected)
    assert rates(1) == rates(2) == 2.0 and rates(7) == pytest.approx(1.1)
    assert rates(12) == rates(100) == pytest.approx(0.2)


def test_linear():
    rates = schedule(schedule={"kind": "linear"})
    assert [rates(update) for update in (2, 7, 12, 20)] == pytest.approx([2.0, 1.0, 0.0, 0.0])


def test_warm_up_stable_decay():
    rates = schedule(schedule={"kind": "wsd", "decay_fraction": 0.25, "final_fraction": 0.5})
    assert [rates(update) for update in (1, 2, 9, 10, 11, 12)] == pytest.approx([2, 2, 2, 5 / 3, 4 / 3, 1.0])


def test_the_end_is_the_schedules_own_or_the_runs():
    own = schedule(100, schedule={"kind": "linear", "num_updates": 12})
    assert own(12) == 0.0
    with pytest.raises(ValueError, match="a cosine schedule has an end"):
        schedule(None, schedule={"kind": "cosine"})
    config = load_config("quickstart", ["trainer.updates_per_step=2", "trainer.num_steps=30"])
    assert config.trainer.total_updates == 60


def test_a_warm_up_longer_than_the_run_never_divides_by_zero():
    rates = schedule(2, schedule={"kind": "cosine"}, warmup_updates=5)
    assert rates(4) == 2.0 and rates(5) == 2.0 and rates(6) == pytest.approx(0.2)
