"""How the layers of a model are divided among pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSizes:
    """Layers of the first and of the last stage; None: as many as each of the others."""

    first: int | None = None
    last: int | None = None


def divide_layers(
    num_layers: int, pipeline: int, virtual_pipeline: int | None = None, *, given: StageSizes | None = None
) -> StageSizes:
    """Stages as even as they can be, the short ones at the ends, which hold the embeddings and the output layer, too.

    Args:
        given: what the user decided, which is kept as it is.

    Raises:
        ValueError: there are fewer layers than stages, or virtual stages cannot all have as many.
    """
    given = given or StageSizes()
    num_stages = pipeline * (virtual_pipeline or 1)
    if num_layers < num_stages:
        raise ValueError(
            f"{num_layers} layers cannot be divided among {num_stages} pipeline stages: use fewer"
        )
    if given != StageSizes() or num_layers % num_stages == 0:
        return given
    if virtual_pipeline is not None:
        raise ValueError(
            f"{num_layers} layers do not divide among {pipeline} pipeline ranks with {virtual_pipeline} virtual stages "
            "each; leave parallel.virtual_pipeline out, or set megatron.num_layers_in_first_pipeline_stage and "
            "megatron.num_layers_in_last_pipeline_stage"
        )
    middle = -(-num_layers // pipeline)
    while num_layers - middle * (pipeline - 2) < 2:
        middle -= 1
    at_ends = num_layers - middle * (pipeline - 2)
    return StageSizes(first=-(-at_ends // 2), last=at_ends // 2)


def stage_layers(
    num_layers: int,
    pipeline: int,
    virtual_pipeline: int | None = None,
    *,
    given: StageSizes | None = None,
) -> list[list[int]]:
    """The numbers of the layers that each pipeline rank holds, from 0, as Megatron-core divides them.

    With virtual stages every rank holds a chunk of layers in each round through the ranks.

    Raises:
        ValueError: as `divide_layers` does, or the sizes do not add up.
    """
    counts = _stage_counts(
        num_layers, pipeline, divide_layers(num_layers, pipeline, virtual_pipeline, given=given)
    )
    rounds = virtual_pipeline or 1
    if sum(counts) != num_layers or min(counts) < 1 or any(count % rounds for count in counts):
        raise ValueError(
            f"{num_layers} layers cannot be divided into stages of {', '.join(map(str, counts))} layers"
            + (f" with {rounds} virtual stages each" if rounds > 1 else "")
        )
    chunks = [count // rounds for count in counts]
    return [
        [
            round_ * sum(chunks) + sum(chunks[:rank]) + layer
            for round_ in range(rounds)
            for layer in range(chunks[rank])
        ]
        for rank in range(pipeline)
    ]


def _stage_counts(num_layers: int, pipeline: int, sizes: StageSizes) -> list[int]:
    if pipeline == 1:
        return [num_layers]
    num_given = sum(size is not None for size in (sizes.first, sizes.last))
    rest = num_layers - (sizes.first or 0) - (sizes.last or 0)
    counts = [rest // (pipeline - num_given) if pipeline > num_given else 0] * pipeline
    if sizes.first is not None:
        counts[0] = sizes.first
    if sizes.last is not None:
        counts[-1] = sizes.last
    return counts
