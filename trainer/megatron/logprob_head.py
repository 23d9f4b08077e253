"""The output layer of a model, asked for logprobs and entropies of chosen tokens instead of logits.

The logits of a micro-batch, tokens x vocabulary in float32, would be its largest tensor by far. They are made and used
up tile by tile, and made again tile by tile in the backward pass, so that only a tile of them exists at a time. Where
they are few they are kept instead: making them twice would cost time and save nothing.

Where a token was drawn from a part of the vocabulary, all of its row but that part becomes a logit below any other: the
softmax, its entropy and both gradients are then over the part, in every way of computing them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from polyturn.trainer.megatron.row_support import LOWEST, RowSupport

TILE_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits worked on at a time: on a CPU what fits its cache, on a GPU what keeps temporary memory small."""
KEPT_ELEMENTS = {"cpu": 2**25, "cuda": 2**27}
"""Up to so many logits (128 MiB, 512 MiB) are kept for the backward pass."""
MIN_TILE_SIDE = 64

Entropy = Literal["none", "value", "gradient"]
"""Whether entropies are computed, and whether gradients flow through them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularySlice:
    """The columns of the vocabulary that this tensor-parallel rank holds."""

    first: int
    """The token id of the first one."""
    num_real: int
    """The columns behind these are padding: they are never read, and their gradient is 0."""
    group: dist.ProcessGroup | None
    """The ranks that hold the other columns, too; None: there are no others."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    columns: VocabularySlice,
    temperature: float,
    entropy: Entropy,
    kept_elements: int | None = None,
    support: RowSupport | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logprobs and entropies [N], float32, of the softmax of hidden weight^T / temperature.

    With z = logits / temperature and p = softmax(z): d logp_t / dz = [target] - p, and dH / dz = -p (log p + H). The
    gradient to `hidden` is this rank's part, to be summed over the tensor-parallel ranks. With a support the softmax,
    and so the entropy, is over each row's: p = 0 elsewhere.

    Args:
        hidden: [N, H], of any float dtype.
        weight: [V', H], this rank's rows of the output layer's weight.
        targets: [N] token ids.
        entropy: "none" gives None for the entropies, "value" entropies without gradient.
        kept_elements: in place of KEPT_ELEMENTS.
        support: what each target, which is among them, was drawn from; None: the whole vocabulary.
    """
    limit = KEPT_ELEMENTS[hidden.device.type] if kept_elements is None else kept_elements
    num_rows = hidden.size(0)
    if support is not None:
        hidden, targets = (
            hidden.index_select(0, support.open_rows),
            targets.index_select(0, support.open_rows),
        )
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = wants_gradient and hidden.size(0) * columns.num_real <= limit
    logprobs, entropies = _TokenLogprobs.apply(
        hidden, weight, targets, columns, temperature, entropy, keep, support
    )
    if support is None:
        return logprobs, entropies
    logprobs, entropies = (
        None if found is None else found.new_zeros(num_rows).index_copy(0, support.open_rows, found)
        for found in (logprobs, entropies)
    )
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        columns: VocabularySlice,
        temperature: float,
        entropy: Entropy,
        keep: bool,
        support: RowSupport | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        places = targets - columns.first
        operands = _operands(hidden, weight, columns)
        make = partial(_tile, operands, temperature=temperature, support=support, first=columns.first)
        sums = _RowSums.start(operands[0], with_entropies=entropy != "none")
        kept = None
        if keep:
            kept = make(slice(0, hidden.size(0)), slice(0, operands[1].size(0)))
            for rows in _row_tiles(kept):
                exponentials = sums.add(kept[rows], rows, places[rows])
                if entropy != "gradient":
                    kept[rows] = exponentials
        else:
            for rows, cols in _tiles(operands):
                sums.add(make(rows, cols), rows, places[rows] - cols.start)
        # What is kept is relative to the peak of this rank's columns; what is made anew, to the peak of all.
        shift = sums.peak
        if columns.group is not None and hidden.size(0):
            sums = sums.over_ranks(columns.group)
        shift = shift if keep else sums.peak
        log_total = sums.total.log()
        entropies = None if sums.weighted is None else log_total - sums.weighted / sums.total
        ctx.set_materialize_grads(False)
        ctx.columns, ctx.temperature, ctx.entropy, ctx.kept = columns, temperature, entropy, kept
        ctx.support = support
        ctx.save_for_backward(hidden, weight, places, shift, shift - sums.peak - log_total, entropies)
        if entropies is not None and entropy == "value":
            ctx.mark_non_differentiable(entropies)
        return sums.chosen - sums.peak - log_total, entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None, None, None]:
        hidden, weight, places, shift, offset, entropies = ctx.saved_tensors
        operands = _operands(hidden, weight, ctx.columns)
        slopes = _Slopes.of(
            grad_logprobs,
            grad_entropies,
            offset=offset,
            entropies=entropies if ctx.entropy == "gradient" else None,
            temperature=ctx.temperature,
        )
        gradients = _Gradients.start(operands, weight, wanted=ctx.needs_input_grad)
        kept, ctx.kept = ctx.kept, None
        if kept is not None:
            for rows in _row_tiles(kept):
                slopes.apply(kept[rows], rows, places[rows])
            gradients.add(kept, slice(0, kept.size(0)), slice(0, kept.size(1)))
        else:
            for rows, cols in _tiles(operands):
                tile = _tile(
                    operands,
                    rows,
                    cols,
                    temperature=ctx.temperature,
                    support=ctx.support,
                    first=ctx.columns.first,
                )
                tile.sub_(shift[rows, None])
                if ctx.entropy != "gradient":
                    tile.exp_()
                slopes.apply(tile, rows, places[rows] - cols.start)
                gradients.add(tile, rows, cols)
        grad_hidden = None if gradients.hidden is None else gradients.hidden.to(hidden.dtype)
        grad_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


@dataclass(slots=True)
class _RowSums:
    """Of each row, over the columns seen so far, with z the logits and m the largest: float32 [N] each."""

    peak: torch.Tensor
    """m"""
    total: torch.Tensor
    """Sum of exp(z - m)."""
    weighted: torch.Tensor | None
    """Sum of exp(z - m) (z - m); None where no entropies are wanted."""
    chosen: torch.Tensor
    """The target's z; 0 while its column has not been seen."""

    @classmethod
    def start(cls, hidden: torch.Tensor, *, with_entropies: bool) -> _RowSums:
        zeros = hidden.new_zeros(hidden.size(0), dtype=_wide(hidden))
        return cls(
            torch.full_like(zeros, LOWEST),
            zeros.clone(),
            zeros.clone() if with_entropies else None,
            zeros.clone(),
        )

    def add(self, tile: torch.Tensor, rows: slice, places: torch.Tensor) -> torch.Tensor:
        """Take in a tile of logits of these rows; returns exp(z - m). With entropies the tile becomes z - m.

        `places` are the targets' columns in the tile, or outside it.
        """
        if tile.numel() == 0:
            return tile
        here = (places >= 0) & (places < tile.size(1))
        found = tile.gather(1, places.clamp(0, tile.size(1) - 1)[:, None]).squeeze(1)
        self.chosen[rows] += torch.where(here, found, 0.0)
        before = self.peak[rows]
        peak = torch.maximum(before, tile.amax(-1))
        shrink = (before - peak).exp()
        tile.sub_(peak[:, None])
        exponentials = tile.exp() if self.weighted is not None else tile.exp_()
        if self.weighted is not None:
            moved = self.weighted[rows] + (before - peak) * self.total[rows]
            self.weighted[rows] = shrink * moved + torch.linalg.vecdot(exponentials, tile)
        self.total[rows] = shrink * self.total[rows] + exponentials.sum(-1)
        self.peak[rows] = peak
        return exponentials

    def over_ranks(self, group: dist.ProcessGroup) -> _RowSums:
        """The same over the columns of all ranks."""
        peak = self.peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        shrink = (self.peak - peak).exp()
        parts = [self.chosen, shrink * self.total]
        if self.weighted is not None:
            parts.append(shrink * (self.weighted + (self.peak - peak) * self.total))
        sums = torch.stack(parts)
        dist.all_reduce(sums, group=group)
        return _RowSums(peak, sums[1], sums[2] if self.weighted is not None else None, sums[0])


@dataclass(frozen=True, slots=True)
class _Slopes:
    """The loss's gradient to the logits, row by row: with x = z - shift, exp(x) (constant + slope x)."""

    constant: torch.Tensor
    slope: torch.Tensor | None
    chosen: torch.Tensor
    """Added at the target."""

    @classmethod
    def of(
        cls,
        grad_logprobs: torch.Tensor | None,
        grad_entropies: torch.Tensor | None,
        *,
        offset: torch.Tensor,
        entropies: torch.Tensor | None,
        temperature: float,
    ) -> _Slopes:
        """With `offset` such that log p = x + offset; `entropies` only where gradients flow through them."""
        scale = offset.exp() / temperature
        grad = torch.zeros_like(offset) if grad_logprobs is None else grad_logprobs
        constant, slope = -grad * scale, None
        if entropies is not None:
            slope = torch.zeros_like(scale) if grad_entropies is None else -grad_entropies * scale
            constant = constant + slope * (offset + entropies)
        return cls(constant, slope, grad / temperature)

    def apply(self, tile: torch.Tensor, rows: slice, places: torch.Tensor) -> None:
        """Turn a tile of exp(x), or with a slope of x, into the gradient, in place."""
        if tile.numel() == 0:
            return
        if self.slope is None:
            tile.mul_(self.constant[rows, None])
        else:
            factors = (tile * self.slope[rows, None]).add_(self.constant[rows, None])
            tile.exp_().mul_(factors)
        here = (places >= 0) & (places < tile.size(1))
        values = torch.where(here, self.chosen[rows], 0.0)
        tile.scatter_add_(1, places.clamp(0, tile.size(1) - 1)[:, None], values[:, None])


@dataclass(slots=True)
class _Gradients:
    """The gradients to hidden states and weight, summed over tiles."""

    operands: tuple[torch.Tensor, torch.Tensor]
    hidden: torch.Tensor | None
    weight: torch.Tensor | None

    @classmethod
    def start(
        cls, operands: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, *, wanted: Sequence[bool]
    ) -> _Gradients:
        wide = _wide(weight)
        return cls(
            operands,
            torch.zeros_like(operands[0], dtype=wide) if wanted[0] else None,
            torch.zeros_like(weight, dtype=wide) if wanted[1] else None,
        )

    def add(self, tile: torch.Tensor, rows: slice, cols: slice) -> None:
        hidden, weight = self.operands
        tile = tile.to(hidden.dtype)
        if self.hidden is not None:
            _add_product(self.hidden[rows], tile, weight[cols])
        if self.weight is not None:
            _add_product(self.weight[cols], tile.t(), hidden[rows])


def _add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """target += left right, accumulated in the target's precision."""
    if left.dtype == target.dtype:
        target.addmm_(left, right)
    else:
        target += torch.mm(left, right, out_dtype=target.dtype)


def _operands(
    hidden: torch.Tensor, weight: torch.Tensor, columns: VocabularySlice
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is multiplied: [N, H] and the real rows of the weight. A CPU has no product of bfloat16 in float32."""
    real = weight[: columns.num_real]
    if hidden.device.type == "cpu":
        return hidden.to(_wide(hidden)), real.to(_wide(hidden))
    return hidden, real


def _tile(
    operands: tuple[torch.Tensor, torch.Tensor],
    rows: slice,
    cols: slice,
    *,
    temperature: float,
    support: RowSupport | None,
    first: int,
) -> torch.Tensor:
    """The logits of these rows and columns; `first` is the token id of the weight's first row."""
    logits = _logits(operands[0][rows], operands[1][cols], temperature)
    if support is not None:
        support.restrict(logits, rows, first + cols.start)
    return logits


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = _wide(hidden)
    logits = (
        torch.mm(hidden, weight.t()) if hidden.dtype == wide else torch.mm(hidden, weight.t(), out_dtype=wide)
    )
    return logits if temperature == 1.0 else logits.div_(temperature)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_tiles(logits: torch.Tensor) -> Iterator[slice]:
    yield from _cuts(logits.size(0), TILE_ELEMENTS[logits.device.type] // max(logits.size(1), 1))


def _tiles(operands: tuple[torch.Tensor, torch.Tensor]) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile. The longer side is cut: what is read and written once a tile is then least."""
    hidden, weight = operands
    num_rows, num_columns = hidden.size(0), weight.size(0)
    shorter = max(min(num_rows, num_columns), 1)
    step = max(TILE_ELEMENTS[hidden.device.type] // shorter, MIN_TILE_SIDE)
    if num_rows >= num_columns:
        yield from ((rows, slice(0, num_columns)) for rows in _cuts(num_rows, step))
    else:
        yield from ((slice(0, num_rows), cols) for cols in _cuts(num_columns, step))


def _cuts(length: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


class LogprobHead:
    """Makes a model's forward pass return logprobs (and entropies) at chosen positions of a pack, never logits.

    Most tokens of a multi-turn episode are observations, whose logits nobody reads, and the logits of the others are
    used up as they are made: see `token_logprobs`. `ask` it before each forward pass. The output is
    [1, N, 1 or 2], float32: logprobs, then entropies; `split_scores` takes it apart.

    A pipeline stage without the output layer needs no head.
    """

    def __init__(self, model: GPTModel, *, vocab_size: int) -> None:
        self._asked: tuple[torch.Tensor, torch.Tensor, float, Entropy, RowSupport | None] | None = None
        self._layer = model.output_layer
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._vocab_size = vocab_size
        # The layer is still called as a module, so that hooks that gather its weight run.
        self._layer.forward = self._score

    def ask(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        *,
        temperature: float,
        entropy: Entropy,
        support: RowSupport | None = None,
    ) -> None:
        """Say what the next forward pass scores.

        Args:
            rows: [N]: positions in the pack whose next token is scored.
            targets: [N]: those tokens.
            support: what they were drawn from; None: the whole vocabulary.
        """
        self._asked = rows, targets, temperature, entropy, support

    def _score(
        self, hidden: torch.Tensor, weight: torch.Tensor | None = None, **_kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        """[T, 1, H], of this rank's tokens under sequence parallelism -> [N, 1, 1 or 2]."""
        assert self._asked is not None, "the forward pass was not told which tokens to score"
        rows, targets, temperature, entropy, support = self._asked
        weight = self._layer.weight if weight is None else weight
        # Each rank has the gradient of its columns: the backward pass of either call sums them up.
        if self._sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        logprobs, entropies = token_logprobs(
            hidden.squeeze(1).index_select(0, rows),
            weight,
            targets,
            columns=vocabulary_slice(weight.size(0), self._vocab_size),
            temperature=temperature,
            entropy=entropy,
            support=support,
        )
        scores = [logprobs] if entropies is None else [logprobs, entropies]
        return torch.stack(scores, -1)[:, None], None


def vocabulary_slice(num_columns: int, vocab_size: int) -> VocabularySlice:
    """The columns of this tensor-parallel rank, which holds `num_columns` of the padded vocabulary."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    first = parallel_state.get_tensor_model_parallel_rank() * num_columns
    return VocabularySlice(
        first=first,
        num_real=min(max(vocab_size - first, 0), num_columns),
        group=parallel_state.get_tensor_model_parallel_group() if size > 1 else None,
    )


def split_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output of a model with a `LogprobHead` -> logprobs [N] and, where they were asked for, entropies [N]."""
    columns = scores.squeeze(0).unbind(-1)
    return columns[0], columns[1] if len(columns) > 1 else None
