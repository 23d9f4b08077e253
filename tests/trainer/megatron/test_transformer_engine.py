"""Transformer Engine's layers against torch's, where both can run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.megatron import transformer_engine_run
from tests.support.megatron.tiny_families import make_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.stack,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a GPU and Transformer Engine",
    ),
]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_both_kinds_of_layers_compute_the_same(tmp_path, family):
    """In bfloat16, in which both round, neither is further from float32 than twice the other."""
    # Fused attention takes heads of a multiple of 8 dimensions, and matrices of a multiple of 16 rows and columns.
    sizes = {"head_dim": 32, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 304}
    path = make_tiny(family, tmp_path, **sizes)
    done = subprocess.run(
        [sys.executable, transformer_engine_run.__file__, path], capture_output=True, text=True, check=True
    )
    runs = json.loads(done.stdout.splitlines()[-1])
    engine, torch_layers, exact = runs["transformer_engine"], runs["torch"], runs["exact"]
    assert "transformer_engine" in engine["layers"] and "transformer_engine" not in torch_layers["layers"]
    assert engine["parameters"] == torch_layers["parameters"], "the same names, in the same order"
    for when in ("before", "after"):
        reference = np.array(exact[when])
        errors = [np.abs(np.array(found[when]) - reference).mean() for found in (engine, torch_layers)]
        assert 0 < max(errors) <= 2 * min(errors) + 1e-3, f"{when}: {errors}"
    assert engine["grad_norm"] == pytest.approx(torch_layers["grad_norm"], rel=0.05)
