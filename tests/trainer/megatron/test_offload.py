"""State that goes to the host's memory between updates comes back bit for bit, and was not on the device meanwhile."""

from __future__ import annotations

import pytest

from polyturn.configs.schema.trainer import LoraConfig, ParallelConfig
from tests.support.megatron.layout_runs import make_samples
from tests.support.megatron.layout_table import make_steady
from tests.support.megatron.offload_runs import train_by_turns

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(
    ("family", "layout", "settings"),
    [
        ("qwen3", ParallelConfig(data=2), {"dtype": "float32"}),
        ("qwen3_moe", ParallelConfig(data=2, expert=2), {"dtype": "bfloat16"}),
        ("qwen3", ParallelConfig(tensor=2), {"dtype": "bfloat16", "lora": LoraConfig(rank=4)}),
    ],
    ids=["float32", "experts", "adapters"],
)
def test_training_goes_on_bit_for_bit_after_the_state_was_away(rank_pool, tmp_path, family, layout, settings):
    path = make_steady(family, tmp_path / "model")
    runs = rank_pool.run(2, train_by_turns, path, layout, make_samples(), settings, tmp_path / "checkpoint")
    for plain, by_turns in runs:
        assert by_turns.metrics == plain.metrics
        assert by_turns.weights.keys() == plain.weights.keys()
        for name, tensor in plain.weights.items():
            assert tensor.equal(by_turns.weights[name]), name
        assert by_turns.num_left == [0, 0] * 3, "nothing of it was left"
        training, weights = by_turns.num_bytes[:2]
        assert min(training, weights) > 0 and by_turns.num_bytes == [training, weights] * 3
