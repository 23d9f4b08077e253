"""A step's samples against their sampler: weights, counts and figures, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.trainer.algorithms.diagnostics import mismatch, mismatch_by
from polyturn.trainer.credit.off_policy import correct, drop_unusable, measure
from polyturn.trainer.data.balance import cut_into_updates, share_out
from polyturn.trainer.data.samples import TrainSample, count_samples
from polyturn.trainer.ranks.rank import PolicyRank
from polyturn.trainer.run.preflight import preflight
from tests.support.samples import make_sample

FAR = 77.0
"""Stands where nothing was sampled: it must not be read."""


def drawn_sample(
    name: str,
    log_rhos: Sequence[float],
    *,
    sequence: str | None = None,
    advantage: float = 1.0,
    versions: Sequence[int] | None = None,
    turns: Sequence[int] | None = None,
) -> TrainSample:
    """One prompt token, then one sampled token for each log(proximal / behavior), then an observation."""
    count = len(log_rhos)
    sampled = np.array([False, *[True] * count, False])

    def column(values: Sequence[float], dtype: type = np.float32) -> np.ndarray:
        return np.array([FAR, *values, FAR], dtype=dtype)

    return make_sample(
        range(count + 2),
        name=name,
        sequence_id=sequence or name,
        sampled=sampled,
        behavior_logprobs=column([-1.0 - rho for rho in log_rhos]),
        policy_versions=column(versions or [5] * count, np.int32),
        turns=column(turns or [0] * count, np.int32),
        proximal_logprobs=column([-1.0] * count),
        advantages=column([advantage] * count),
    )


def corrected(samples, algorithm: AlgorithmConfig, *, version: int):
    """The samples with weights, and the figures of the corrections and of the step."""
    found = correct(samples, algorithm)
    return found.samples, {**found.metrics, **measure([found], version=version)}


def config(*corrections: dict[str, object]) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"corrections": list(corrections)})


def test_without_corrections_there_are_figures_and_no_weights():
    samples = [drawn_sample("a", [0.1, -0.2]), drawn_sample("b", [0.3])]
    found, metrics = corrected(samples, config(), version=5)
    assert [sample.correction_weights for sample in found] == [None, None]
    rhos = [math.exp(x) for x in (0.1, -0.2, 0.3)]
    squares = sum(rho**2 for rho in rhos)
    expected = {
        "logprob_difference_mean": 0.2,
        "logprob_difference_max": 0.3,
        "kl": sum(rho - 1 - math.log(rho) for rho in rhos) / 3,
        "chi2": squares / 3 - 1,
        "ess": sum(rhos) ** 2 / (3 * squares),
        "perplexity_ratio": math.exp(-0.2 / 3),
    }
    figures = {name: metrics[f"offpolicy/{name}"] for name in expected}
    assert figures == pytest.approx(expected, rel=1e-5)
    assert not any(name.startswith("correction/") for name in metrics)


def test_weights_are_products_and_columns_of_their_samples():
    samples = [
        drawn_sample("a/0", [1.0, 0.2], sequence="a"),
        drawn_sample("a/1", [0.0], sequence="a"),
        drawn_sample("b", [math.log(1e3), 0.1]),
    ]
    found, metrics = corrected(
        samples, config({"kind": "truncated_importance", "cap": 2}, {"kind": "veto"}), version=5
    )
    columns = [sample.correction_weights.tolist() for sample in found]
    assert columns[0] == pytest.approx([0, 2.0, math.exp(0.2), 0], rel=1e-6)
    assert columns[1] == pytest.approx([0, 1.0, 0])
    assert columns[2] == [0, 0, 0, 0]
    metrics = metrics
    assert metrics["correction/truncated_importance/clipped_fraction"] == pytest.approx(2 / 5)
    assert metrics["correction/veto/rejected_sequences"] == pytest.approx(1 / 2)
    counts = {
        name: metrics[f"correction/{name}"]
        for name in ("tokens", "tokens_kept", "sequences", "sequences_kept")
    }
    assert counts == {"tokens": 5, "tokens_kept": 3, "sequences": 2, "sequences_kept": 1}
    for before, after in zip(samples, found, strict=True):
        assert after.sample_id == before.sample_id and after.num_trainable == before.num_trainable


def test_segments_of_an_episode_are_rejected_together():
    samples = [drawn_sample("a/0", [0.0, 0.0], sequence="a"), drawn_sample("a/1", [0.9], sequence="a")]
    alone = [drawn_sample("b", [0.0, 0.0])]
    rule = {"kind": "geometric_rejection", "low": 0.9, "high": 1.2}
    found, _ = corrected([*samples, *alone], config(rule), version=5)
    assert [s.correction_weights[s.sampled].tolist() for s in found] == [[0, 0], [0], [1, 1]]


def test_denominators_are_those_before_rejection():
    samples = [drawn_sample("a", [0.0, 0.0]), drawn_sample("b", [math.log(1e3), 0.1])]
    found, _ = corrected(samples, config({"kind": "veto"}), version=5)
    assert count_samples(found) == count_samples(samples)
    (shares,) = share_out(cut_into_updates(found, 1), 1)
    assert (shares[0].counts.num_tokens, shares[0].counts.num_sequences) == (4, 2)


def test_figures_by_age_and_by_turn():
    samples = [drawn_sample("a", [0.5, 0.0, 1.0], versions=[5, 3, 3], turns=[0, 1, 9])]
    _, found = corrected(samples, config({"kind": "icepop", "low": 0.9, "high": 2.0}), version=5)
    assert found["offpolicy/age_0/tokens"] == 1 and found["offpolicy/age_2/tokens"] == 2
    assert found["offpolicy/age_0/logprob_difference_mean"] == pytest.approx(0.5)
    assert found["offpolicy/age_2/logprob_difference_mean"] == pytest.approx(0.5)
    assert found["offpolicy/age_2/logprob_difference_max"] == pytest.approx(1.0)
    assert found["offpolicy/age_2/rejected_fraction"] == 0.5
    assert found["offpolicy/turn_1/chi2"] == 0 and found["offpolicy/turn_1/ess"] == 1
    assert found["offpolicy/turn_8_to_15/rejected_fraction"] == 1.0
    assert not any("age_1/" in name or "turn_2/" in name for name in found)
    _, capped = corrected(samples, config({"kind": "truncated_importance", "cap": 2}), version=5)
    assert capped["offpolicy/turn_8_to_15/clipped_fraction"] == 1.0
    assert capped["offpolicy/age_2/clipped_fraction"] == 0.5


def test_a_loss_against_the_sampler_clips_stale_tokens_before_the_first_update():
    logs = [math.log(1.1), math.log(1.4), math.log(1.4)]
    samples = [
        drawn_sample("a", logs, versions=[5, 5, 3]),
        drawn_sample("b", logs, versions=[5, 5, 3], advantage=-1.0),
    ]
    for anchor, by_age in (("behavior", {0: 1 / 4, 2: 1 / 2}), ("proximal", {0: 0.0, 2: 0.0})):
        section = AlgorithmConfig.model_validate({"loss": {"kind": "clip", "anchor": anchor}})
        _, found = corrected(samples, section, version=5)
        for age, expected in by_age.items():
            assert found[f"offpolicy/age_{age}/loss_clipped_fraction"] == expected


def test_groups_are_put_together_by_powers_of_two():
    groups = np.array([0, 3, 4, 7, 8, 15, 16, 31, 32])
    logs = np.zeros(len(groups))
    found = mismatch_by(groups, logs, logs, {})
    assert {name: figures["tokens"] for name, figures in found.items()} == {
        "0": 1, "3": 1, "4_to_7": 2, "8_to_15": 2, "16_to_31": 2, "32_to_63": 1,
    }  # fmt: skip


def test_figures_estimate_what_they_say():
    """On tokens drawn from one softmax: KL, chi-square divergence, and the effective sample size that follows."""
    generator = torch.Generator().manual_seed(0)
    policy, sampler = torch.randn(2, 6, generator=generator, dtype=torch.float64).mul(0.3).log_softmax(-1)
    tokens = torch.multinomial(sampler.exp(), 400_000, replacement=True, generator=generator)
    found = mismatch(sampler[tokens].numpy(), policy[tokens].numpy())
    kl = float((sampler.exp() * (sampler - policy)).sum())
    chi2 = float((policy.exp() ** 2 / sampler.exp()).sum()) - 1
    assert found["kl"] == pytest.approx(kl, rel=0.02)
    assert found["chi2"] == pytest.approx(chi2, rel=0.05)
    assert found["ess"] == pytest.approx(1 / (1 + chi2), rel=0.01)


def test_no_tokens_have_finite_figures():
    found, metrics = corrected([], config({"kind": "truncated_importance"}, {"kind": "veto"}), version=0)
    assert found == () and all(math.isfinite(value) for value in metrics.values())


@pytest.mark.catalogue("B31")
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_a_token_without_a_finite_engine_logprob_leaves_training_and_counts(value):
    whole, broken = drawn_sample("a", [0.1, 0.2, 0.3]), drawn_sample("b", [0.1, 0.2])
    broken.behavior_logprobs[2] = value
    whole.behavior_logprobs[0] = value  # not sampled: of no meaning
    usable, metrics = drop_unusable({"a": whole, "b": broken})
    assert metrics == {"offpolicy/unusable_tokens": 1.0}
    assert usable["a"] is whole
    assert usable["b"].sampled.tolist() == [False, True, False, False]
    assert usable["b"].token_ids.tolist() == broken.token_ids.tolist()
    counts = count_samples(list(usable.values()))
    assert counts.num_tokens == 4 and counts.tokens_of_sequence == {"a": 3, "b": 1}
    _, metrics = corrected(list(usable.values()), config({"kind": "truncated_importance"}), version=5)
    assert all(math.isfinite(figure) for figure in metrics.values())


@pytest.mark.catalogue("B31")
def test_a_sample_of_which_no_token_is_usable_is_in_no_denominator():
    lost = drawn_sample("b", [0.1])
    lost.behavior_logprobs[1] = math.nan
    usable, _ = drop_unusable({"a": drawn_sample("a", [0.1]), "b": lost})
    counts = count_samples(list(usable.values()))
    assert (counts.num_tokens, counts.num_sequences) == (1, 1)


def test_a_plugin_with_a_weight_that_is_not_one_is_refused(tmp_path):
    (tmp_path / "bad.py").write_text(
        "from polyturn.trainer.algorithms.protocols import CorrectionWeights\n"
        "def bad(behavior, proximal, mask, sequence_index, advantages, *, value):\n"
        "    return CorrectionWeights(weights=behavior * 0 + value, metrics={})\n"
    )
    for value, fails in ((0.5, False), (-1.0, True), (math.nan, True)):
        section = {"kind": "plugin", "target": f"{tmp_path}/bad.py:bad", "options": {"value": value}}
        if not fails:
            found, _ = corrected([drawn_sample("a", [0.1])], config(section), version=5)
            assert found[0].correction_weights.tolist() == [0, 0.5, 0]
            continue
        with pytest.raises(ValueError, match="one finite weight of at least 0"):
            corrected([drawn_sample("a", [0.1])], config(section), version=5)


UNSCORED = ["trainer.algorithm.proximal=behavior", "trainer.algorithm.loss.anchor=behavior"]


def test_the_samplers_logprobs_stand_in_for_a_step_that_is_not_scored():
    samples = [drawn_sample("a", [0.1, 0.2]), drawn_sample("b", [0.3])]
    # No policy is there to be asked.
    scores = PolicyRank(config=load_config("quickstart", UNSCORED), model_path="", rank=0).score(samples)
    for sample in samples:
        found = scores[sample.sample_id]["proximal_logprobs"]
        assert found[sample.sampled].tolist() == sample.behavior_logprobs[sample.sampled].tolist()


def test_a_check_that_compares_with_what_is_not_scored_is_refused_at_start():
    with pytest.raises(ConfigError, match="max_logprob_difference compares trainer and engine"):
        preflight(load_config("quickstart", UNSCORED))


def test_an_entropy_control_looks_at_the_whole_step_beside_the_corrections() -> None:
    """Of six tokens the two likeliest have the largest advantage: they take the entropy."""
    rising = drawn_sample("up", [0.0] * 3, advantage=2.0)
    falling = drawn_sample("down", [0.0] * 3, advantage=-1.0)
    rising.proximal_logprobs[1:4] = [-0.1, -0.2, -3.0]
    falling.proximal_logprobs[1:4] = [-2.0, -2.5, -1.9]
    for control, column, expected in (
        ({"kind": "kl_cov", "fraction": 0.34, "coefficient": 0.5}, "kl_weights", [0.5, 0.5, 0.0]),
        (
            {"kind": "clip_cov", "fraction": 0.34, "low": 2.0, "high": 5.0},
            "correction_weights",
            [0.0, 0.0, 1.0],
        ),
    ):
        algorithm = AlgorithmConfig.model_validate({"entropy_control": control})
        found = correct([rising, falling], algorithm)
        columns = [getattr(sample, column)[sample.sampled].tolist() for sample in found.samples]
        assert columns == [expected, [0.0] * 3 if column == "kl_weights" else [1.0] * 3]
        assert found.metrics["entropy_control/chosen_tokens"] == 2 and not found.rejected.any()
    both = AlgorithmConfig.model_validate(
        {"entropy_control": control, "corrections": [{"kind": "truncated_importance", "cap": 1.5}]}
    )
    weights = [
        sample.correction_weights[sample.sampled].tolist()
        for sample in correct([rising, falling], both).samples
    ]
    assert (
        weights[0][:2] == [0.0, 0.0]
        and weights[0][2] == pytest.approx(math.exp(-2.0))
        and max(weights[1]) <= 1.5
    )
    with pytest.raises(ValueError, match="entropy_control goes by the logprobs of the step's start"):
        AlgorithmConfig.model_validate(
            {
                "entropy_control": control,
                "proximal": "behavior",
                "loss": {"kind": "clip", "anchor": "behavior"},
            }
        )
