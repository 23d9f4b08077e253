"""The FP8 recipes: one for GPUs, its twin for CPUs, and the warning for those who leave the correction out."""

from __future__ import annotations

from polyturn.configs.loading.loader import load_config
from polyturn.trainer.run.model_checks import check_rounding


def test_the_recipe_and_its_twin_differ_in_the_device_alone() -> None:
    full, small = load_config("fp8_rollout", ()), load_config("fp8_rollout_cpu", ())
    assert (full.weight_sync.dtype, full.engines.device) == ("fp8_block", "cuda")
    assert (small.weight_sync.dtype, small.engines.device) == ("fp8_rounded", "cpu")
    assert full.algorithm.corrections == small.algorithm.corrections
    assert check_rounding(full) == check_rounding(small) == []
    # What FP8 engines hold is laid out anew; what is only rounded is compared.
    assert not (full.checks.enabled and full.checks.weights_equal)
    assert small.checks.enabled and small.checks.weights_equal
    (told,) = check_rounding(load_config("fp8_rollout", ["trainer.algorithm.corrections=[]"]))
    assert told.startswith("weight_sync.dtype: fp8_block: the engines sample from weights rounded to FP8")
    against_sampler = ["trainer.algorithm.corrections=[]", "trainer.algorithm.loss.anchor=behavior"]
    assert check_rounding(load_config("fp8_rollout", against_sampler)) == []
    assert check_rounding(load_config("quickstart", ())) == []
