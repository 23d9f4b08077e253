"""What a process is given of its host: a port that is free, and GPUs of its own.

Which GPUs a process has is decided once, by what it is allowed to see; there they are numbered from 0.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Collection, Mapping, Sequence

from polyturn.configs.addresses import bind_address

VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus_of_engine(
    index: int, tensor_parallel: int, environment: Mapping[str, str], *, first_gpu: int = 0
) -> tuple[str, ...]:
    """The GPUs of an engine of a host, as `CUDA_VISIBLE_DEVICES` names them: of those visible here, its own share.

    Those before `first_gpu` are others'.

    Raises:
        ValueError: fewer are visible.
    """
    first = first_gpu + index * tensor_parallel
    behind = first + tensor_parallel
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


# Below the range that Linux takes outgoing connections' ports from (32768 and up): a server takes seconds to
# bind.
FREE_RANGE = range(20000, 32768)


def is_free(host: str, port: int) -> bool:
    """Whether a server could bind `port` of `host`, an address or a name, now.

    Raises:
        ValueError: no port of `host` could be bound on this machine.
    """
    address = bind_address(host)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            # With SO_REUSEADDR two sockets may bind one port while neither listens.
            probe.listen(1)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise ValueError(
            f"{host} is no address of this machine, {socket.gethostname()}: {error.strerror}"
        ) from error
    return True


def free_port(host: str, *, avoid: Collection[int] = ()) -> int:
    """A port of `host` that is free now, not in `avoid`. Raises `ValueError` where there is none."""
    # Processes that were seeded alike, or forked, must not all choose the same port at the same time.
    choose = random.SystemRandom().choice
    for _ in range(1000):
        port = choose(FREE_RANGE)
        if port not in avoid and is_free(host, port):
            return port
    raise ValueError(f"no free port found on {host} between {FREE_RANGE.start} and {FREE_RANGE.stop - 1}")


def free_ports(host: str, count: int) -> int:
    """The first of so many ports of `host` in a row that are all free now. Raises `ValueError` where there are none."""
    for _ in range(1000):
        first = free_port(host)
        if all(is_free(host, port) for port in range(first + 1, first + count)):
            return first
    raise ValueError(f"no {count} free ports in a row found on {host}")


def claim_port(host: str, port: int, *, section: str, avoid: Collection[int] = ()) -> int:
    """`port` if it is free, or a free one for 0. `section` holds the options `host` and `port`, for the error.

    Raises `ValueError` when the port is taken, or `host` is not this machine's.
    """
    try:
        if port == 0:
            return free_port(host, avoid=avoid)
        if is_free(host, port):
            return port
    except ValueError as error:
        raise ValueError(f"{section}.host: {error}") from error
    privileged = " or for root alone" if port < 1024 else ""
    raise ValueError(
        f"{section}.port: port {port} on {host} is taken{privileged}; choose another, or 0 for a free one"
    )
