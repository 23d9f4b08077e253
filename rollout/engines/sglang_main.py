"""`python -m polyturn.rollout.engines.sglang_main ARGS` is SGLang's launch_server, also on a CPU without AMX.

What the published SGLang wheel needs there without its kernel wheel are two modules that are missing on a machine
without CUDA:

* torchvision: the wheels are linked against CUDA torch and fail to import beside CPU torch. SGLang imports its
  transforms at start-up for vision models.
* sgl_kernel: the published wheel is the CUDA build. On a CPU without AMX SGLang sends every layer to its own torch
  code and takes only two small helpers from sgl_kernel.

Each stand-in is put in place only where the real module is absent, before sglang is imported, in every process of a
server. Beside them, a server's processes are forked on a CPU, which halves the processor time of its start.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

MASK_32 = 0xFFFFFFFF


def is_for_cpu(arguments: Sequence[str]) -> bool:
    """Whether a server's command line asks for the CPU."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    return "--device=cpu" in arguments or ("--device", "cpu") in pairs


def install(*, seeded: bool, records_routing: bool = False, serves_adapters: bool = False) -> None:
    """Put the stand-ins in place.

    Args:
        seeded: also let deterministic inference through on torch_native.
        records_routing: also let the record of routed experts lie in ordinary memory.
        serves_adapters: also let LoRA's adapters wait in ordinary memory.
    """
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    # SGLang compiles its seeded sampler with torch.compile; on a CPU that needs a C++ compiler and a minute.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if not _is_present("torchvision"):
        _install_torchvision()
    if not _is_present("sgl_kernel"):
        _install_sgl_kernel()
    if seeded:
        _admit_seeded_sampling()
    if records_routing:
        _keep_routing_in_ordinary_memory()
    if serves_adapters:
        _let_nothing_be_pinned()
    if "--numa-node" not in sys.argv:  # which SGLang binds by the command line of what it spawns
        _fork_in_place_of_spawning()


def _is_present(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


class _Inert(types.ModuleType):
    """A module in which every lower-case name is a module and every other name a class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            # Members of torchvision's InterpolationMode that transformers reads at import.
            members = {"NEAREST": 0, "LANCZOS": 1, "BILINEAR": 2, "BICUBIC": 3}
            value: Any = type(name, (), {"__module__": self.__name__, **members})
        else:
            value = sys.modules.get(f"{self.__name__}.{name}") or _Inert(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _install_torchvision() -> None:
    # transformers remembers its answer: have it look before the stand-in exists.
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    parts = [
        "",
        ".transforms",
        ".transforms.functional",
        ".transforms.v2",
        ".transforms.v2.functional",
        ".io",
    ]
    for name in (f"torchvision{part}" for part in parts):
        module = sys.modules[name] = _Inert(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


class _Kernels(types.ModuleType):
    """sgl_kernel: what is not a stand-in can be imported, and says so when it is called."""

    library: torch.library.Library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on a CPU")

        missing.__name__ = name
        return missing


def _install_sgl_kernel() -> None:
    module = _Kernels("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    module.__path__ = []
    setattr(module, "assign_req_to_token_pool_cpu", assign_req_to_token_pool)  # noqa: B010
    # The registration lasts as long as the library object.
    module.library = torch.library.Library("sgl_kernel", "FRAGMENT")
    module.library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    module.library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    sys.modules["sgl_kernel"] = module


def assign_req_to_token_pool(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,  # noqa: ARG001 - part of the kernel's signature
) -> None:
    """Write the new cache slots of each request (flat, in order) into its table row at [start, end)."""
    at = 0
    for row, low, high in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[row, low:high] = out_cache_loc[at : at + high - low].to(req_to_token.dtype)
        at += high - low


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bit, seed 0) of (seed: 64 bit, position: 32 bit, column: 32 bit).

    Same bits as the Triton kernel `sglang.kernels.ops.sampling.murmur_hash`. seed, positions: [B];
    col_indices: [V]; returns uint32 [B, V].
    """
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.long()
    hashed = torch.zeros_like(seed)
    for block in (seed & MASK_32, (seed >> 32) & MASK_32, positions.long() & MASK_32):
        hashed = _mix(hashed, block)
    hashed = _mix(hashed[:, None], (col_indices.long() & MASK_32)[None, :]) ^ 16
    hashed = _multiply(hashed ^ (hashed >> 16), 0x85EBCA6B)
    hashed = _multiply(hashed ^ (hashed >> 13), 0xC2B2AE35)
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def _multiply(a: torch.Tensor, constant: int) -> torch.Tensor:
    """The low 32 bits of a product of 32-bit numbers; int64 wraps modulo 2**64, which keeps them."""
    return (a * constant) & MASK_32


def _rotate_left(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & MASK_32


def _mix(hashed: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _multiply(_rotate_left(_multiply(block, 0xCC9E2D51), 15), 0x1B873593)
    return (_multiply(_rotate_left(hashed ^ block, 13), 5) + 0xE6546B64) & MASK_32


def _admit_seeded_sampling() -> None:
    """Make a request's `sampling_seed` count.

    It does so under --enable-deterministic-inference, which refuses torch_native and replaces matrix products
    by Triton kernels. We only want the seeds: torch's own CPU products may differ in the last bits with the
    batch.
    """
    import sglang.srt.arg_groups.choices as choices
    import sglang.srt.batch_invariant_ops as operations

    if "torch_native" not in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")
    operations.enable_batch_invariant_mode = lambda *_, **__: None


def _keep_routing_in_ordinary_memory() -> None:
    """The record of routed experts is gathered in host memory that SGLang registers with CUDA for fast copies."""
    import sglang.srt.mem_cache.pool_host.common as host_memory

    host_memory._cuda_host_register = lambda *_, **__: None


def _fork_in_place_of_spawning() -> None:
    """SGLang spawns its scheduler and detokenizer, since CUDA does not outlive a fork, and each then imports all of it
    anew. Without CUDA they are forked from the server, which has no threads when it starts them."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_, **__: None  # type: ignore[method-assign]


def _let_nothing_be_pinned() -> None:
    """Adapters and what tells a batch which of them to use are made in pinned memory, which needs CUDA."""
    for name in ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like", "arange"):
        setattr(torch, name, _without_pinning(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]


def _without_pinning(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*arguments: Any, **options: Any) -> torch.Tensor:
        options.pop("pin_memory", None)
        return make(*arguments, **options)

    return made


def main() -> None:
    """Serve until told to stop."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    arguments = prepare_server_args(sys.argv[1:])
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


# A process that SGLang spawns imports this module first, as `__mp_main__` and with the same command line.
if __name__ in ("__main__", "__mp_main__") and is_for_cpu(sys.argv):
    install(
        seeded="--enable-deterministic-inference" in sys.argv,
        records_routing="--enable-return-routed-experts" in sys.argv,
        serves_adapters="--enable-lora" in sys.argv,
    )

if __name__ == "__main__":
    main()
