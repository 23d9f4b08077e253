"""Which GPUs a process has: decided once, by what it is allowed to see. There they are numbered from 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_of_engine(index: int, tensor_parallel: int, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of an engine of a host, as `CUDA_VISIBLE_DEVICES` names them: of those visible here, its own share.

    Raises:
        ValueError: fewer are visible.
    """
    first, behind = index * tensor_parallel, (index + 1) * tensor_parallel
    if VISIBLE not in environment:
        return tuple(str(number) for number in range(first, behind))
    visible = [gpu.strip() for gpu in environment[VISIBLE].split(",") if gpu.strip()]
    if behind > len(visible):
        raise ValueError(
            f"engine {index} needs the GPUs {first} to {behind - 1} of those visible, but "
            f"{VISIBLE}={environment[VISIBLE]} shows {len(visible)}; lower engines.num_engines or "
            "engines.tensor_parallel"
        )
    return tuple(visible[first:behind])


def assigned_gpus(assigned: Sequence[int | str], count: int) -> tuple[str, ...]:
    """The GPUs that Ray assigned to an actor (`ray.get_gpu_ids`), in their order on the host.

    Raises:
        ValueError: they are not as many as it asked for.
    """
    gpus = sorted((str(gpu) for gpu in assigned), key=lambda gpu: (not gpu.isdigit(), len(gpu), gpu))
    if len(gpus) != count:
        raise ValueError(
            f"Ray assigned the GPUs [{', '.join(gpus)}] to an actor that asked for {count}; was its node started with "
            f"another {VISIBLE} than the actor's?"
        )
    return tuple(gpus)


def gpu_environment(gpus: Sequence[str]) -> dict[str, str]:
    """The environment in which a process sees these GPUs alone."""
    return {VISIBLE: ",".join(gpus)}
