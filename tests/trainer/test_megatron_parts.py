"""The parts under the policy: source rewrites, pack layout, logprobs, optimizer."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyturn.trainer.megatron.attention import MAX_PADDING, lay_out
from polyturn.trainer.megatron.cpu import NUM_REWRITES, rewrite_source
from polyturn.trainer.megatron.optimizer import FusedLayoutAdam


def test_another_release_of_megatron_fails_at_once():
    name = "megatron.core.optimizer.grad_scaler"
    source = 'scale = torch.tensor([1.0], device="cuda")\n'
    with pytest.raises(ValueError, match=r"names CUDA 1 times where megatron-core 0\.16\.1 does 5"):
        rewrite_source(name, source)
    whole = source * NUM_REWRITES[name]
    assert rewrite_source(name, whole) == whole.replace('"cuda"', '"cpu"')


def test_imported_megatron_was_rewritten():
    from megatron.core.optimizer import clip_grads

    constants = clip_grads.get_grad_norm_fp32.__code__.co_consts
    assert "cpu" in constants and "cuda" not in constants


def test_megatron_imported_too_early_is_refused():
    code = (
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('megatron.core')\n"
        "try: import polyturn.trainer.megatron\n"
        "except ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "imported before" in result.stdout


def test_the_trainer_does_not_import_the_engine():
    code = "import sys, polyturn.trainer.base_model.supervised; print('sglang' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25))
def test_a_layout_holds_every_token_once_and_little_padding(lengths):
    layout = lay_out(lengths)
    num_tokens = sum(lengths)
    assert torch.equal(layout.gather[layout.scatter], torch.arange(num_tokens))
    assert sum(rows * length for rows, length in layout.shapes) == len(layout.gather)
    assert len(layout.gather) * (1 - MAX_PADDING) <= num_tokens
    starts = [0, *itertools.accumulate(lengths)]
    places = set()
    for start, length in zip(starts, lengths, strict=False):
        rows = layout.scatter[start : start + length].tolist()
        assert rows == list(range(rows[0], rows[0] + length)), "a sequence lies in one piece"
        places.add(rows[0])
    borders = itertools.accumulate([0, *(length for rows, length in layout.shapes for _ in range(rows))])
    assert places <= set(borders), "and begins where a row of its batch begins"


def test_sequences_of_one_length_are_not_moved():
    layout = lay_out([7] * 5)
    assert layout.is_identity and layout.shapes == ((5, 7),)


def test_adam_is_torchs_adamw_with_the_fused_layout():
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(5, 3, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.2}
    our_optimizer = FusedLayoutAdam([ours], **settings)
    their_optimizer = torch.optim.AdamW([theirs], **settings)
    for _ in range(4):
        ours.grad = torch.randn(5, 3, generator=generator)
        theirs.grad = ours.grad.clone()
        our_optimizer.step()
        their_optimizer.step()
        torch.testing.assert_close(ours, theirs)
    assert our_optimizer.param_groups[0]["step"] == 4
    assert set(our_optimizer.state[ours]) == {"exp_avg", "exp_avg_sq"}
