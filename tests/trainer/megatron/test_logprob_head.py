"""The fused head: exact in value and gradient, whatever its tiles, and blind to padding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.sampling_support import SamplingSupport
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.megatron import logprob_head
from polyturn.trainer.megatron.logprob_head import VocabularySlice, token_logprobs
from polyturn.trainer.megatron.row_support import RowSupport


def naive(hidden, weight, targets, temperature, drawn_from=None):
    """`drawn_from`: [N, V], what each target was drawn from; None: everything."""
    logits = hidden @ weight.t() / temperature
    if drawn_from is not None:
        logits = logits.masked_fill(~drawn_from, -torch.inf)
    plain = logits.log_softmax(-1)
    terms = torch.where(plain.isinf(), 0.0, plain.exp() * plain.clamp(min=-1e9))
    return plain.gather(1, targets[:, None]).squeeze(1), -terms.sum(-1)


def draw_supports(num_columns: int, targets: torch.Tensor, *, seed: int = 2) -> torch.Tensor:
    """[N, V]: about a third of the columns and the target; of four rows the first has it alone, the last everything."""
    generator = torch.Generator().manual_seed(seed)
    drawn_from = torch.rand(len(targets), num_columns, generator=generator) < 0.3
    drawn_from[torch.arange(len(targets)), targets] = True
    drawn_from[::4] = torch.nn.functional.one_hot(targets[::4], num_columns).bool()
    drawn_from[3::4] = True
    return drawn_from


def as_support(drawn_from: torch.Tensor) -> RowSupport:
    """The same as lists, in no order; of rows with everything none."""
    restricted = ~drawn_from.all(1)
    token_ids = (drawn_from & restricted[:, None]).flip(1).nonzero()[:, 1]
    support = SamplingSupport(
        sizes=(drawn_from.sum(1) * restricted).numpy(),
        token_ids=(drawn_from.size(1) - 1 - token_ids).numpy(),
    )
    return RowSupport.of(support, torch.device("cpu"))


def alone(num_real: int) -> VocabularySlice:
    return VocabularySlice(first=0, num_real=num_real, group=None)


def make(num_rows: int, num_columns: int, *, size: int = 5, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(num_columns, size, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, num_columns, (num_rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 30),
    num_columns=st.integers(1, 30),
    tile=st.integers(1, 200),
    keep=st.booleans(),
    parts=st.sampled_from([(1, 1), (1, 0), (0, 1)]),
    temperature=st.sampled_from([1.0, 0.7]),
    is_restricted=st.booleans(),
)
def test_values_and_gradients_are_exact_whatever_the_tiles(
    num_rows, num_columns, tile, keep, parts, temperature, is_restricted
):
    """Of the whole vocabulary, and of what each token was drawn from."""
    hidden, weight, targets = make(num_rows, num_columns)
    drawn_from = draw_supports(num_columns, targets) if is_restricted else None
    factors = torch.randn(2, num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob_head, "TILE_ELEMENTS", {"cpu": tile})
        patch.setattr(logprob_head, "MIN_TILE_SIDE", 1)
        found = token_logprobs(
            hidden,
            weight,
            targets,
            columns=alone(num_columns),
            temperature=temperature,
            entropy="gradient",
            kept_elements=10**6 if keep else 0,
            support=None if drawn_from is None else as_support(drawn_from),
        )
        loss = sum(
            use * (factor * value).sum() for use, factor, value in zip(parts, factors, found, strict=True)
        )
        gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = naive(hidden, weight, targets, temperature, drawn_from)
    loss = sum(
        use * (factor * value).sum() for use, factor, value in zip(parts, factors, expected, strict=True)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(gradients, torch.autograd.grad(loss, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kept_elements", [0, 10**6])
def test_float32_is_as_good_as_float32_can_be(kept_elements):
    """Against float64, no worse than torch's own log-softmax in float32."""
    exact = make(200, 1000, size=32)
    single = [value.detach().float().requires_grad_() for value in exact[:2]]
    expected = naive(*exact, 0.8)[0]
    ours = token_logprobs(
        *single, exact[2], columns=alone(1000), temperature=0.8, entropy="value", kept_elements=kept_elements
    )[0]
    theirs = naive(*single, exact[2], 0.8)[0]
    assert ours.dtype == torch.float32
    errors = [float((value.detach() - expected.detach()).abs().max()) for value in (ours, theirs)]
    assert errors[0] <= max(2 * errors[1], 1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), single[1])
    (wanted,) = torch.autograd.grad(expected.sum(), exact[1])
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.catalogue("B23")
@pytest.mark.parametrize("kept_elements", [0, 10**6])
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_the_padding_of_the_vocabulary_is_never_read(kept_elements, poison):
    results = []
    for filling in (0.0, poison):
        hidden, weight, targets = make(7, 9, dtype=torch.float32)
        with torch.no_grad():
            weight[6:] = filling
        values = token_logprobs(
            hidden,
            weight,
            targets.clamp(max=5),
            columns=alone(6),
            temperature=1.0,
            entropy="gradient",
            kept_elements=kept_elements,
        )
        gradients = torch.autograd.grad(sum(value.sum() for value in values), (hidden, weight))
        assert (gradients[1][6:] == 0).all()
        results.append([*values, *gradients])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned) and torch.isfinite(clean).all()


@pytest.mark.parametrize("kept_elements", [0, 10**6])
def test_extremes(kept_elements):
    hidden = torch.eye(2, requires_grad=True)
    weight = torch.tensor([[1000.0, 0.0], [0.0, 0.0], [-1000.0, 0.0]], requires_grad=True)
    values, entropies = token_logprobs(
        hidden,
        weight,
        torch.tensor([1, 2]),
        columns=alone(3),
        temperature=2.0,
        entropy="gradient",
        kept_elements=kept_elements,
    )
    assert values.tolist() == pytest.approx([-500.0, -math.log(3)])
    assert entropies.tolist() == pytest.approx([0.0, math.log(3)])
    (values.sum() + entropies.sum()).backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    assert weight.grad[:, 1].tolist() == pytest.approx([-1 / 6, -1 / 6, 1 / 3])


def test_no_rows_make_no_fuss():
    hidden, weight, targets = make(0, 4)
    values, entropies = token_logprobs(
        hidden, weight, targets, columns=alone(4), temperature=1.0, entropy="gradient"
    )
    (values.sum() + entropies.sum()).backward()
    assert hidden.grad.shape == (0, 5) and (weight.grad == 0).all()


def test_entropies_only_when_wanted():
    hidden, weight, targets = make(3, 4)
    settings = {"columns": alone(4), "temperature": 1.0}
    assert token_logprobs(hidden, weight, targets, entropy="none", **settings)[1] is None
    values, entropies = token_logprobs(hidden, weight, targets, entropy="value", **settings)
    assert values.requires_grad and not entropies.requires_grad


def test_a_frozen_weight_gets_no_gradient():
    hidden, weight, targets = make(3, 4)
    values, _ = token_logprobs(
        hidden, weight.detach(), targets, columns=alone(4), temperature=1.0, entropy="none"
    )
    (found,) = torch.autograd.grad(values.sum(), hidden)
    (expected,) = torch.autograd.grad(naive(hidden, weight, targets, 1.0)[0].sum(), hidden)
    torch.testing.assert_close(found, expected)


def score_my_columns(context, parallel, num_columns, kept_elements, drawn_from):
    """A rank's values and gradients, its columns of the weight those that Megatron-core would give it."""
    from polyturn.trainer.megatron.logprob_head import vocabulary_slice

    hidden, weight, targets = make(6, num_columns)
    width = -(-num_columns // parallel.tensor)
    filled = torch.full((width * parallel.tensor, 5), float("nan"), dtype=torch.float64)
    filled[:num_columns] = weight.detach()
    mine = filled[context.rank * width : (context.rank + 1) * width].clone().requires_grad_()
    with context.joined(parallel):
        columns = vocabulary_slice(width, num_columns)
        values = token_logprobs(
            hidden,
            mine,
            targets,
            columns=columns,
            temperature=0.7,
            entropy="gradient",
            kept_elements=kept_elements,
            support=None if drawn_from is None else as_support(drawn_from),
        )
        gradients = torch.autograd.grad(sum(value.sum() for value in values), (hidden, mine))
    return [tensor.detach() for tensor in (*values, *gradients)]


@pytest.mark.stack
@pytest.mark.parametrize(
    ("num_ranks", "num_columns", "is_restricted"), [(2, 11, False), (4, 5, False), (2, 11, True)]
)
def test_columns_of_several_ranks_are_those_of_one(rank_pool, num_ranks, num_columns, is_restricted):
    """With 5 columns on 4 ranks one rank has padding alone. A row's support may all be another rank's."""
    hidden, weight, targets = make(6, num_columns)
    drawn_from = None
    if is_restricted:
        drawn_from = draw_supports(num_columns, targets)
        width = -(-num_columns // num_ranks)
        drawn_from[1] = torch.arange(num_columns) // width == targets[1] // width
    expected = naive(hidden, weight, targets, 0.7, drawn_from)
    gradients = torch.autograd.grad(sum(value.sum() for value in expected), (hidden, weight))
    for kept_elements in (0, 10**6):
        found = rank_pool.run(
            num_ranks,
            score_my_columns,
            ParallelConfig(tensor=num_ranks),
            num_columns,
            kept_elements,
            drawn_from,
        )
        for rank in found:
            for ours, theirs in zip(rank[:2], expected, strict=True):
                torch.testing.assert_close(ours, theirs.detach(), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(sum(rank[2] for rank in found), gradients[0])
        torch.testing.assert_close(torch.cat([rank[3] for rank in found])[:num_columns], gradients[1])
        assert (torch.cat([rank[3] for rank in found])[num_columns:] == 0).all()


@pytest.mark.parametrize("kept_elements", [0, 10**6])
def test_bfloat16_operands_make_float32_sums(kept_elements):
    """Logits are never rounded to bfloat16: against float64 of the same numbers the error is float32's."""
    hidden, weight, targets = make(50, 400, size=32, dtype=torch.bfloat16)
    values, entropies = token_logprobs(
        hidden,
        weight,
        targets,
        columns=alone(400),
        temperature=0.8,
        entropy="gradient",
        kept_elements=kept_elements,
    )
    assert values.dtype == entropies.dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = naive(*wide, targets, 0.8)
    for ours, theirs in zip((values, entropies), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=3e-5, rtol=1e-5)
    gradients = torch.autograd.grad(values.sum(), (hidden, weight))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected[0].sum(), wide), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, atol=1e-2, rtol=1e-2)
