"""What the start says of top-p, top-k and min-p, and what the metrics tell of them."""

from __future__ import annotations

import numpy as np
import pytest

from polyturn.agents.sampling_support import SamplingSupport
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import preset_directory, resolve_model_path
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.rollout.factory import evaluation_sampling, training_sampling
from polyturn.trainer.run.metrics import support_metrics
from polyturn.trainer.run.model_checks import check_sampling
from polyturn.trainer.run.preflight import preflight
from tests.support.samples import make_sample

LARGE = ModelShape.read(preset_directory("qwen3-4b"))
SMALL = ModelShape.read(resolve_model_path("builtin:tiny-searcher"))


@pytest.mark.catalogue("B24")
def test_a_top_k_that_nobody_asked_for_is_told():
    config = load_config("quickstart", ["rollout.sampling.top_p=0.9"])
    (warning,) = check_sampling(config, LARGE)
    assert "that is 4,096 of the 151,936 tokens" in warning
    assert check_sampling(config, SMALL) == []
    assert check_sampling(load_config("quickstart"), LARGE) == []
    assert check_sampling(load_config("quickstart", ["rollout.sampling.top_k=20"]), LARGE) == []


@pytest.mark.catalogue("B24")
@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rollout.sampling.min_p=0.1"], "rollout.sampling.min_p: SGLang cannot draw by seed"),
        (["evaluation.min_p=0.1"], "evaluation.min_p: SGLang cannot draw by seed"),
        (["evaluation.suites=[{name: other, min_p: 0.1}]"], "suites 'other': SGLang cannot draw by seed"),
    ],
)
def test_min_p_does_not_go_with_seeds(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        preflight(load_config("quickstart", ["rollout.sampling.seeded=true", *overrides]))


@pytest.mark.catalogue("B24")
def test_speculative_decoding_records_nothing():
    config = load_config("quickstart", ["rollout.sampling.top_k=20"])
    config = config.model_copy(update={"sglang": {"speculative_algorithm": "NGRAM"}})
    with pytest.raises(ConfigError, match=r"unset sglang\.speculative_algorithm"):
        check_sampling(config, SMALL)


@pytest.mark.catalogue("B24")
def test_training_asks_for_a_record_where_tokens_are_left_out_and_evaluation_never():
    model = resolve_model_path("builtin:tiny-searcher")
    config = load_config("quickstart", ["rollout.sampling.top_p=0.7", "evaluation.top_k=5"])
    sampling = training_sampling(config, model_path=model)
    assert (sampling.top_p, sampling.top_k, sampling.records_support) == (0.7, SMALL.vocab_size, True)
    held_out = evaluation_sampling(config.evaluation)
    assert (held_out.top_p, held_out.top_k, held_out.records_support) == (1.0, 5, False)
    plain = training_sampling(load_config("quickstart"), model_path=model)
    assert (plain.top_k, plain.records_support) == (-1, False)


def test_the_sizes_of_supports_are_counted_where_tokens_are_trained_on():
    support = SamplingSupport(sizes=np.array([0, 3, 0, 1]), token_ids=np.array([5, 6, 7, 8]))
    samples = [make_sample([1, 5, 2, 8], support=support), make_sample([1, 2])]
    assert support_metrics(samples) == {"sampling/support_mean": 2.0, "sampling/support_max": 3.0}
    assert support_metrics(samples[1:]) == {}
