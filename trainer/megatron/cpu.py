"""Run the published Megatron-core on a CPU.

Megatron-core asks `torch.cuda` for its device, its streams and its generator, and names "cuda" in a few literals. On a
CPU rank those calls are answered with CPU equivalents, and the literals of the modules that training uses are rewritten
while they are imported. The number of rewrites in each module is fixed, so that another release of Megatron-core fails
at once instead of half working.

A process is a CPU rank or a CUDA rank for good: importing this package makes it a CPU rank where torch finds no GPU,
and touches nothing where it finds one. Hide the GPUs from a process that is to run on the CPU beside them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, ModuleType
from typing import Any

import torch

REWRITES = (
    (re.compile(r"""device\s*=\s*(["'])cuda\1"""), 'device="cpu"'),
    (re.compile(r"""torch\.autocast\((["'])cuda\1"""), 'torch.autocast("cpu"'),
    (re.compile(r"""(["'])torch\.cuda\.(Float|Half|BFloat16)Tensor\1"""), r'"torch.\2Tensor"'),
    # Inductor would call a C++ compiler while training runs.
    (re.compile(r"jit_fuser = torch\.compile"), "jit_fuser = noop_decorator"),
    (re.compile(r"pin_memory\s*=\s*True"), "pin_memory=False"),
    (re.compile(r"\.cuda\([^()]*(?:\([^()]*\))?[^()]*\)"), ".cpu()"),
)

NUM_REWRITES = {
    "megatron.core.jit": 1,
    "megatron.core.utils": 11,
    "megatron.core.rerun_state_machine": 2,
    "megatron.core.tensor_parallel.data": 2,
    "megatron.core.transformer.utils": 2,
    "megatron.core.transformer.moe.moe_utils": 1,
    "megatron.core.distributed.param_and_grad_buffer": 1,
    "megatron.core.models.common.embeddings.rope_utils": 2,
    "megatron.core.models.common.language_module.language_module": 1,
    "megatron.core.optimizer.clip_grads": 6,
    "megatron.core.optimizer.distrib_optimizer": 6,
    "megatron.core.optimizer.grad_scaler": 5,
    "megatron.core.optimizer.optimizer": 9,
    "megatron.core.pipeline_parallel.schedules": 4,
    "megatron.core.pipeline_parallel.utils": 1,
}
"""Literals rewritten in each module of megatron-core 0.16.1."""


def rewrite_source(name: str, source: str) -> str:
    """The source of Megatron-core's module `name` with its CUDA literals turned into CPU ones.

    Raises:
        ValueError: the module does not hold as many of them as the release that was adapted.
    """
    num_rewrites = 0
    for pattern, replacement in REWRITES:
        source, num_found = pattern.subn(replacement, source)
        num_rewrites += num_found
    expected = NUM_REWRITES[name]
    if num_rewrites != expected:
        raise ValueError(
            f"{name} names CUDA {num_rewrites} times where megatron-core 0.16.1 does {expected} times: this release "
            "of megatron-core has not been adapted to CPU; install megatron-core==0.16.1"
        )
    return source


class _RewritingLoader(importlib.machinery.SourceFileLoader):
    def path_stats(self, path: str) -> Any:
        # No cached bytecode: the rewritten code must not lie where the original's is looked for.
        raise OSError(f"no bytecode cache for {path}")

    def source_to_code(  # type: ignore[override]
        self, data: Any, path: Any, *, _optimize: int = -1
    ) -> CodeType:
        source = rewrite_source(self.name, bytes(data).decode("utf-8"))
        return super().source_to_code(source.encode("utf-8"), path, _optimize=_optimize)


class _RewritingFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in NUM_REWRITES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _RewritingLoader(spec.loader.name, spec.loader.path)
        return spec


class _Event:
    """An event of a device on which everything has happened when the call returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: _Event) -> float:
        return 0.0


class _Stream:
    """The one stream of such a device."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _stream: _Stream) -> None: ...

    def wait_event(self, _event: _Event) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream_context(_stream: _Stream | None = None) -> Iterator[None]:
    yield


def check_device(device: str) -> None:
    """Compare the device that is asked for with what this process was made for.

    Raises:
        ValueError: it is the other one.
    """
    on_cpu = any(isinstance(finder, _RewritingFinder) for finder in sys.meta_path)
    if device == "cuda" and on_cpu:
        raise ValueError("trainer.device is cuda, and torch finds no GPU in this process")
    if device == "cpu" and not on_cpu:
        raise ValueError(
            "trainer.device is cpu, and Megatron-core runs on the GPU that torch finds in this process: hide it "
            "(CUDA_VISIBLE_DEVICES=) before it starts"
        )


def install_cpu_compatibility() -> None:
    """Make Megatron-core run on the CPU in this process, before anything imports `megatron.core`.

    Raises:
        ValueError: `megatron.core` was imported too early.
    """
    if "megatron.core" in sys.modules:
        raise ValueError("megatron.core was imported before polyturn could make it run on a CPU")
    # It warns that Transformer Engine and Apex are missing, which is what a CPU rank is about.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # It calls collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    _answer_cuda_calls()
    sys.meta_path.insert(0, _RewritingFinder())
    _adapt_imported_modules()


def _answer(value: Any) -> Callable[..., Any]:
    """A function that answers `value` whatever it is asked."""

    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return answer


def _get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.random.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.random.set_rng_state(state)


def _maybe_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Upstream makes split sizes plain numbers only when they come from CUDA."""
    del record_stream
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _fill_up(part: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])


def _take_uneven(gather: Callable[..., Any], scatter: Callable[..., Any]) -> tuple[Any, Any]:
    """Upstream's gather and reduce-scatter for parts of different lengths, which gloo refuses: as equal ones."""

    def gather_parts(
        input_: torch.Tensor, group: Any, output_split_sizes: Sequence[int] | None = None, *args: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, None, *args)
        longest = max(output_split_sizes)
        parts = gather(_fill_up(input_, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def scatter_parts(
        input_: torch.Tensor, group: Any, input_split_sizes: Sequence[int] | None = None, *args: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, None, *args)
        longest = max(input_split_sizes)
        parts = [_fill_up(part, longest) for part in input_.split(list(input_split_sizes))]
        summed = scatter(torch.cat(parts), group)
        return summed[: input_split_sizes[group.rank()]]

    return gather_parts, scatter_parts


def _answer_cuda_calls() -> None:
    # Optimizers import dynamo, whose tables name each of these functions and want them distinct: fill them first.
    importlib.import_module("torch._dynamo")
    cuda: Any = torch.cuda
    cuda.current_device = _answer(torch.device("cpu"))
    cuda.set_device = cuda.synchronize = cuda.empty_cache = _answer(None)
    cuda.is_current_stream_capturing = _answer(False)
    cuda.Stream, cuda.Event, cuda.stream = _Stream, _Event, _stream_context
    cuda.current_stream = cuda.default_stream = _answer(_Stream())
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = _get_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = _set_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _answer(0)


@contextlib.contextmanager
def _left_out(package: str) -> Iterator[None]:
    """An optional package is missing meanwhile, unless it has been imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _adapt_imported_modules() -> None:
    """Functions that a rewrite of literals does not reach."""
    # Its engine for inference, which nothing here uses, would import wandb: a seventh of a rank's start.
    with _left_out("wandb"):
        import megatron.core.tensor_parallel.mappings as mappings
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    random._get_cuda_rng_state, random._set_cuda_rng_state = _get_rng_state, _set_rng_state
    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = _take_uneven(
        mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim
    )
    if not hasattr(moe_utils, "te_general_gemm"):
        # Upstream tests this name against None, and binds it only where Transformer Engine is installed.
        moe_utils.te_general_gemm = None
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _maybe_as_numpy
