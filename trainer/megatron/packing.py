"""A rank's samples as micro-batches of tensors: side by side, or as a tree whose shared prefixes are computed once.

The rows of a pack are where a trainable token is predicted: the model scores those alone, and the objective takes the
samples' columns at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from polyturn.agents.sampling_support import SamplingSupport
from polyturn.configs.schema.trainer import ParallelConfig, SharedPrefix
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch
from polyturn.trainer.data.balance import pack, pack_by_prefix, prefix_keys, split_packs
from polyturn.trainer.data.prefix_tree import Node, PrefixTree, Sharing, build_tree
from polyturn.trainer.data.samples import TrainSample
from polyturn.trainer.megatron.attention import ContextSlice, PackedSequences, pack_lengths
from polyturn.trainer.megatron.row_support import RowSupport
from polyturn.trainer.megatron.tree_attention import describe_tree


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """A pack with N trainable tokens, as a rank holds it: all of its T tokens, or a part of each sequence.

    Without context parallelism M = N: the rank computes the rows of all trainable tokens. With it, every row is
    computed by one rank of those that share the pack.
    """

    samples: tuple[TrainSample, ...]
    input_ids: torch.Tensor
    """[1, T]"""
    position_ids: torch.Tensor
    """[1, T]"""
    sequences: PackedSequences
    rows: torch.Tensor
    """[M]: the position among this rank's tokens whose logits predict a trainable token, sample by sample."""
    targets: torch.Tensor
    """[M]: that token."""
    own_rows: torch.Tensor
    """[M]: which of the N rows they are, ascending."""
    sample_of_row: torch.Tensor
    """[N]: the index in `samples`."""
    routed_experts: torch.Tensor | None = None
    """[T, layers x experts per token] int16: what the engine chose, -1 where no record is. None: nothing to replay."""
    support: RowSupport | None = None
    """What the M targets were drawn from. None: all of them from the whole vocabulary."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.sample_of_row)

    @property
    def sharing(self) -> Sharing:
        """What is computed of the samples, all ranks that share them taken together."""
        return self.sequences.sharing or Sharing.none([len(sample) for sample in self.samples])


def make_micro_batches(
    samples: Sequence[TrainSample],
    *,
    max_tokens: int,
    parallel: ParallelConfig,
    device: torch.device,
    shared_prefix: SharedPrefix = "off",
) -> list[PackedBatch]:
    """This rank's micro-batches, as many as every other rank's. Collective.

    Args:
        max_tokens: of a micro-batch on one rank; the ranks that share sequences hold so many each.
        shared_prefix: "group" puts samples with a common prefix together, "tree" computes it once for all of them.
    """
    gather = pack if shared_prefix == "off" else pack_by_prefix
    packs = gather(samples, max_tokens * parallel.context)
    most = torch.tensor(len(packs), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    multiple = parallel.micro_batch_multiple()
    num_packs = -(-max(int(most), 1) // multiple) * multiple
    place = parallel.place(dist.get_rank())
    if shared_prefix == "tree":
        return [
            make_tree_batch(group, device=device, multiple=parallel.pack_multiple())
            for group in split_packs(packs, num_packs)
        ]
    return [
        make_packed_batch(
            group,
            device=device,
            multiple=parallel.pack_multiple(),
            part=ContextSlice(size=parallel.context, rank=place.context),
        )
        for group in split_packs(packs, num_packs)
    ]


def predicting_rows(sampled: np.ndarray) -> np.ndarray:
    """Where the trainable tokens are predicted: token t by the logits at t - 1. The one shift that there is."""
    return np.flatnonzero(sampled) - 1


def make_packed_batch(
    samples: Sequence[TrainSample],
    *,
    device: torch.device,
    multiple: int = 1,
    part: ContextSlice | None = None,
) -> PackedBatch:
    """Lay samples side by side; the pack is filled up to a multiple of `multiple` tokens with a sequence nobody reads.

    No samples make a pack of `multiple` such tokens.

    Args:
        part: what this rank holds of each sequence. Sequences are padded at their ends, so that they divide evenly, and
            `multiple` must be a multiple of what they are padded to.
    """
    part = part or ContextSlice()
    whole = _lay_side_by_side(samples, multiple=multiple, sequence_multiple=part.sequence_multiple)
    held = part.positions(whole.lengths).numpy()
    place = np.full(len(whole.token_ids), -1)
    place[held] = np.arange(len(held))
    own_rows = np.flatnonzero(place[whole.rows] >= 0)
    rows = whole.rows[own_rows]
    return PackedBatch(
        samples=tuple(samples),
        input_ids=torch.from_numpy(whole.token_ids[held])[None].to(device),
        position_ids=torch.from_numpy(whole.positions[held])[None].to(device),
        sequences=pack_lengths(whole.lengths, device, part),
        rows=torch.from_numpy(place[rows]).to(device),
        targets=torch.from_numpy(whole.token_ids[rows + 1]).to(device),
        own_rows=torch.from_numpy(own_rows).to(device),
        sample_of_row=torch.from_numpy(whole.sample_of_row).to(device),
        routed_experts=_lay_routing(samples, whole.lengths, held, device),
        support=_lay_support(samples, own_rows, device),
    )


def _lay_support(
    samples: Sequence[TrainSample], own_rows: npt.NDArray[np.int64], device: torch.device
) -> RowSupport | None:
    """What the tokens were drawn from that are predicted at these of the pack's rows."""
    parts = [None if s.support is None else s.support.take(s.sampled) for s in samples]
    whole = SamplingSupport.joined(parts, [sample.num_trainable for sample in samples])
    return None if whole is None else RowSupport.of(whole.take(own_rows), device)


def _lay_routing(
    samples: Sequence[TrainSample], lengths: Sequence[int], held: npt.NDArray[np.int64], device: torch.device
) -> torch.Tensor | None:
    """The samples' routing at the places of a pack that this rank holds; their lengths there may be padded."""
    widths = {sample.routed_experts.shape[1] for sample in samples if sample.routed_experts is not None}
    if not widths:
        return None
    (width,) = widths
    whole = np.full((sum(lengths), width), -1, dtype=np.int16)
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        if sample.routed_experts is not None:
            whole[start : start + len(sample)] = sample.routed_experts
        start += length
    return torch.from_numpy(whole[held]).to(device)


@dataclass(frozen=True, kw_only=True, slots=True)
class _WholePack:
    lengths: list[int]
    """Of its sequences, padding included."""
    token_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    sample_of_row: npt.NDArray[np.int64]


def _lay_side_by_side(samples: Sequence[TrainSample], *, multiple: int, sequence_multiple: int) -> _WholePack:
    assert multiple % sequence_multiple == 0, (multiple, sequence_multiple)
    lengths = [len(sample) + -len(sample) % sequence_multiple for sample in samples]
    num_filling = -sum(lengths) % multiple if lengths else multiple
    starts = np.cumsum([0, *lengths])[: len(samples)]
    if num_filling:
        lengths = [*lengths, num_filling]
    token_ids = np.zeros(sum(lengths), dtype=np.int64)
    for sample, start in zip(samples, starts, strict=True):
        token_ids[start : start + len(sample)] = sample.token_ids
    rows = [predicting_rows(sample.sampled) + start for sample, start in zip(samples, starts, strict=True)]
    return _WholePack(
        lengths=lengths,
        token_ids=token_ids,
        positions=np.concatenate([np.arange(length) for length in lengths]),
        rows=np.concatenate([np.zeros(0, dtype=np.int64), *rows]),
        sample_of_row=np.repeat(np.arange(len(samples)), [len(r) for r in rows]),
    )


def scatter_rows(batch: PackedBatch, values: torch.Tensor) -> list[np.ndarray]:
    """Values [N] at the trainable tokens -> a float32 column [T] for each sample, 0 elsewhere."""
    flat = values.detach().float().cpu().numpy()
    columns = []
    offset = 0
    for sample in batch.samples:
        column = np.zeros(len(sample), dtype=np.float32)
        column[sample.sampled] = flat[offset : offset + sample.num_trainable]
        offset += sample.num_trainable
        columns.append(column)
    return columns


def make_tree_batch(
    samples: Sequence[TrainSample], *, device: torch.device, multiple: int = 1
) -> PackedBatch:
    """Lay samples out as a tree, filled up to a multiple of `multiple` tokens with a sequence nobody reads.

    A trainable token has its row in every sample that it is of: what is predicted there is computed once for each,
    what leads up to it once for all. So whatever differs between the samples (the next token, its advantage, whether it
    is trained on at all) stays their own. Samples that share nothing are laid side by side as ever.
    """
    tree = build_tree(prefix_keys(samples))
    if tree.sharing.num_tokens == tree.sharing.num_separate_tokens:
        return make_packed_batch(samples, device=device, multiple=multiple)
    rows = [path[predicting_rows(s.sampled)] for s, path in zip(samples, tree.paths, strict=True)]
    targets = [sample.token_ids[sample.sampled] for sample in samples]
    num_rows = [len(found) for found in rows]
    filled = _fill_tree(_with_tokens(tree, samples), multiple)
    nothing = np.zeros(0, dtype=np.int64)
    return PackedBatch(
        samples=tuple(samples),
        input_ids=torch.from_numpy(filled.token_ids)[None].to(device),
        position_ids=torch.from_numpy(filled.positions)[None].to(device),
        sequences=describe_tree(filled, device, tree.sharing),
        rows=torch.from_numpy(np.concatenate([nothing, *rows])).to(device),
        targets=torch.from_numpy(np.concatenate([nothing, *targets])).to(device),
        own_rows=torch.arange(sum(num_rows), device=device),
        sample_of_row=torch.from_numpy(np.repeat(np.arange(len(samples)), num_rows)).to(device),
        routed_experts=_lay_tree_routing(filled, samples, device),
        support=_lay_support(samples, np.arange(sum(num_rows)), device),
    )


def _with_tokens(tree: PrefixTree, samples: Sequence[TrainSample]) -> PrefixTree:
    """The tree of the samples' keys with their tokens in their place."""
    token_ids = np.zeros(tree.num_tokens, dtype=np.int64)
    for sample, path in zip(samples, tree.paths, strict=True):
        token_ids[path] = sample.token_ids
    return replace(tree, token_ids=token_ids)


def _lay_tree_routing(
    tree: PrefixTree, samples: Sequence[TrainSample], device: torch.device
) -> torch.Tensor | None:
    """The experts of each token of the tree; samples with a token in common agree on them."""
    widths = {sample.routed_experts.shape[1] for sample in samples if sample.routed_experts is not None}
    if not widths:
        return None
    routing = np.full((tree.num_tokens, widths.pop()), -1, dtype=np.int16)
    for sample, path in zip(samples, tree.paths, strict=True):
        if sample.routed_experts is not None:
            routing[path] = sample.routed_experts
    return torch.from_numpy(routing).to(device)


def _fill_tree(tree: PrefixTree, multiple: int) -> PrefixTree:
    num_filling = -tree.num_tokens % multiple
    if not num_filling:
        return tree
    end = tree.num_tokens + num_filling
    filling = Node(start=tree.num_tokens, end=end, descendants_end=end, depth=0)
    return replace(
        tree,
        token_ids=np.concatenate([tree.token_ids, np.zeros(num_filling, dtype=np.int64)]),
        positions=np.concatenate([tree.positions, np.arange(num_filling)]),
        nodes=(*tree.nodes, filling),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRows:
    """Some of a pack's samples, and whose each of their rows is."""

    samples: tuple[TrainSample, ...]
    sample_of_row: torch.Tensor
    """[N]: the index in `samples`."""


def rows_by_environment(batch: PackedBatch) -> dict[str, tuple[SampleRows, torch.Tensor]]:
    """The pack's samples by `TrainSample.environment`, and which of the pack's rows are theirs, [N]."""
    environments = [sample.environment for sample in batch.samples]
    found = {}
    for environment in dict.fromkeys(environments):
        chosen = np.array([name == environment for name in environments])
        numbers = torch.from_numpy(np.cumsum(chosen) - 1).to(batch.sample_of_row.device)
        is_chosen = torch.from_numpy(chosen).to(batch.sample_of_row.device)
        rows = is_chosen[batch.sample_of_row].nonzero().flatten()
        samples = tuple(sample for sample in batch.samples if sample.environment == environment)
        found[environment] = (
            SampleRows(samples=samples, sample_of_row=numbers[batch.sample_of_row[rows]]),
            rows,
        )
    return found


def token_batch(
    batch: PackedBatch | SampleRows,
    objective: Objective,
    counts: GlobalCounts,
    logprobs: torch.Tensor,
    entropies: torch.Tensor,
) -> TokenBatch:
    """The pack's columns at its trainable tokens.

    Args:
        counts: of the whole update, whose sequences and prompts the pack's samples are of.

    Raises:
        ValueError: a sample lacks a column that the objective needs.
    """
    samples = batch.samples
    behavior = rows_of(batch, "behavior_logprobs")
    proximal, reference, advantages = behavior, None, torch.zeros_like(behavior)
    if objective.needs_advantages or all(sample.proximal_logprobs is not None for sample in samples):
        proximal = rows_of(batch, "proximal_logprobs")
    if objective.needs_advantages:
        advantages = rows_of(batch, "advantages")
    if objective.needs_reference:
        reference = rows_of(batch, "reference_logprobs")
    taught = None
    if all(sample.teacher_logprobs is not None for sample in samples):
        taught = rows_of(batch, "teacher_logprobs")
    corrections = None
    if any(sample.correction_weights is not None for sample in samples):
        corrections = rows_of(batch, "correction_weights")
    holds = None
    if any(sample.kl_weights is not None for sample in samples):
        holds = rows_of(batch, "kl_weights")
    return TokenBatch(
        logprobs=logprobs,
        entropies=entropies,
        mask=torch.ones_like(logprobs, dtype=torch.bool),
        sequence_index=batch.sample_of_row,
        num_sequences=len(samples),
        sequence_lengths=_of_rows(
            batch, [_total(s, counts.tokens_of_sequence, s.sequence_id) for s in samples]
        ),
        prompt_lengths=_of_rows(batch, [_total(s, counts.tokens_of_prompt, s.group_id) for s in samples]),
        turns=rows_of(batch, "turns", np.int64),
        policy_versions=rows_of(batch, "policy_versions", np.int64),
        advantages=advantages,
        behavior_logprobs=behavior,
        proximal_logprobs=proximal,
        reference_logprobs=reference,
        teacher_logprobs=taught,
        correction_weights=corrections,
        kl_weights=holds,
    )


def _total(sample: TrainSample, totals: Mapping[str, int], name: str) -> int:
    """The trainable tokens of what the sample is part of. Totals leave out what has none, and may be of nothing."""
    return totals[name] if totals and sample.num_trainable else sample.num_trainable


def _of_rows(batch: PackedBatch | SampleRows, by_sample: Sequence[int]) -> torch.Tensor:
    """A number of each sample at each of its trainable tokens, int64 [N]."""
    return torch.tensor(by_sample or [0], device=batch.sample_of_row.device)[batch.sample_of_row]


def rows_of(batch: PackedBatch | SampleRows, name: str, dtype: npt.DTypeLike = np.float32) -> torch.Tensor:
    """The samples' column of that name at the trainable tokens, [N].

    Raises:
        ValueError: a sample has none.
    """
    parts = [np.zeros(0, dtype=dtype)]
    for sample in batch.samples:
        column = getattr(sample, name)
        if column is None:
            raise ValueError(f"sample {sample.sample_id} has no {name}, which the objective needs")
        parts.append(column[sample.sampled])
    return torch.from_numpy(np.concatenate(parts).astype(dtype)).to(batch.sample_of_row.device)


def find_bad_samples(batch: PackedBatch | SampleRows, tokens: TokenBatch) -> list[str]:
    """A sentence for each sample with a number on a trainable token that is not finite."""
    columns = {
        "logprob": tokens.logprobs.detach(),
        "behavior logprob": tokens.behavior_logprobs,
        "proximal logprob": tokens.proximal_logprobs,
        "advantage": tokens.advantages,
    }
    if tokens.reference_logprobs is not None:
        columns["reference logprob"] = tokens.reference_logprobs
    if tokens.teacher_logprobs is not None:
        columns["teacher's logprob"] = tokens.teacher_logprobs
    if tokens.correction_weights is not None:
        columns["correction weight"] = tokens.correction_weights
    table = torch.stack(list(columns.values()))
    if bool(torch.isfinite(table).all()):
        return []
    found: dict[str, str] = {}
    names = list(columns)
    for column, row in (~torch.isfinite(table)).nonzero().tolist():
        sample = batch.samples[int(batch.sample_of_row[row])]
        first_row = int((batch.sample_of_row == batch.sample_of_row[row]).nonzero()[0])
        token = int(sample.sampled.nonzero()[0][row - first_row])
        found.setdefault(
            sample.sample_id,
            f"sample {sample.sample_id}: the {names[column]} of token {token} is {table[column, row].item()}",
        )
    return list(found.values())
