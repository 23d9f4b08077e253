"""`polyturn convert`: weights from one kind of directory into another, on one process or on all of torchrun's.

Hugging Face -> torch_dist -> Hugging Face is bit for bit what it began with, and a run's checkpoint becomes either. FP8
is made of a Hugging Face directory, matrix by matrix, without a model in memory.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.rollout.engines.placement import free_port
from polyturn.rollout.whole_file import check_writable
from polyturn.trainer.checkpoints.manifest import check_header, describe_model, find_faults, read_manifest
from polyturn.trainer.checkpoints.megatron_args import check_args
from polyturn.trainer.checkpoints.sources import HF_FOLDER, WeightSource, find_source
from polyturn.trainer.megatron.checkpoint_reader import load_weights
from polyturn.trainer.megatron.model import build_chunks, read_architecture, transformer_config
from polyturn.trainer.megatron.process_groups import ModelLayout, Place, join_ranks, leave_ranks
from polyturn.trainer.megatron.torch_dist import load_torch_dist, save_torch_dist
from polyturn.trainer.megatron.weights import load_hf_weights, named_hf_tensors
from polyturn.trainer.models.hf_directory import (
    FP8Cast,
    HFWeights,
    config_dtype,
    files_left_out,
    read_config,
    write_hf_directory,
)
from polyturn.trainer.models.quantization import check_scales, without_quantization
from polyturn.trainer.models.weight_files import check_tensors, read_weight_files

Kind = Literal["hf", "torch_dist", "fp8"]
Report = Callable[[str], None]
DTYPES = ("float32", "bfloat16")
STORE_TIMEOUT = timedelta(minutes=10)
REPORT_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchrunPlace(Place):
    """The place of this process among those that convert together."""

    agent_listens: bool = False
    """The port is that of a store which torchrun's agent hosts, not free for the ranks."""

    @classmethod
    def from_environment(cls) -> TorchrunPlace:
        """As torchrun's environment says, or one process without it."""
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return cls()
        return cls(
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            port=int(os.environ.get("MASTER_PORT", "0")),
            agent_listens=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def with_own_port(self) -> Place:
        """With a port for the ranks' own store. Where the agent has its own, rank 0 tells the others through that."""
        if not self.agent_listens:
            return self
        store = dist.TCPStore(
            self.address, self.port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT
        )
        if self.rank == 0:
            store.set("polyturn/port", str(free_port(self.address)))
        return replace(self, port=int(store.get("polyturn/port")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A conversion that nothing speaks against, as far as can be known before a weight is read."""

    source: WeightSource
    hf_directory: Path
    """Whose config.json describes the model."""
    target: Path
    kind: Kind
    dtype: str
    parallel: ParallelConfig
    place: TorchrunPlace


def make_plan(
    source: Path,
    target: Path,
    *,
    to: Kind | None = None,
    model: Path | None = None,
    dtype: str | None = None,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    place: TorchrunPlace | None = None,
) -> Plan:
    """Check everything that can be checked without reading weights.

    Args:
        to: None: torch_dist of a Hugging Face directory, and a Hugging Face directory of all else.
        model: a Hugging Face directory with the model's config and tokenizer, where the source does not name one.
        dtype: of the weights that are written; None: what config.json names.

    Raises:
        ValueError: the conversion cannot be done; one sentence says why.
    """
    place = place or TorchrunPlace()
    found = find_source(source)
    if found is None:
        raise ValueError(f"{source} is empty")
    kind: Kind = to or ("torch_dist" if found.kind == "hf" else "hf")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already: name another, or delete it")
    check_writable(target)
    hf_directory = _hf_directory(found, model)
    hf_config = _model_config(hf_directory)
    is_quantised = found.kind == "hf" and bool(read_config(hf_directory).get("quantization_config"))
    if is_quantised and kind == "fp8":
        raise ValueError(f"{source} is quantised already")
    if found.kind == kind and dtype is None and not is_quantised:
        raise ValueError(f"{source} is {kind} already: give --to, or --dtype for another dtype")
    dtype = dtype or config_dtype(hf_config)
    if dtype not in DTYPES:
        raise ValueError(f"the model's dtype is {dtype}: choose one of {', '.join(DTYPES)} with --dtype")
    if place.world_size % (tensor * pipeline):
        raise ValueError(
            f"--tensor {tensor} x --pipeline {pipeline} must divide the {place.world_size} process(es): start as many "
            "with torchrun"
        )
    plan = Plan(
        source=found,
        hf_directory=hf_directory,
        target=target,
        kind=kind,
        dtype=dtype,
        parallel=ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            expert=expert,
            data=place.world_size // (tensor * pipeline),
        ),
        place=place,
    )
    _check_source(plan)
    _check_model(plan)
    _check_space(plan)
    return plan


def _model_config(directory: Path) -> dict[str, Any]:
    """The config.json of a model whose weights are read as what they stand for, FP8 or not."""
    return without_quantization(read_config(directory), source=directory)


def _hf_directory(source: WeightSource, model: Path | None) -> Path:
    if model is not None:
        return model
    if source.kind == "hf":
        return source.path
    if (source.path / HF_FOLDER / "config.json").is_file():
        return source.path / HF_FOLDER
    # A checkpoint of a run stands in RUN/checkpoints/STEP.
    config = source.path.parent.parent / "config.yaml"
    if source.kind == "checkpoint" and config.is_file():
        return resolve_model_path(_model_of_run(config))
    raise ValueError(
        f"{source.path} does not say which model it is of: name its Hugging Face directory with --model"
    )


def _model_of_run(path: Path) -> str:
    """The `model.path` that a run's config.yaml names."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = tree["model"]["path"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} does not name the run's model ({reason}): name its Hugging Face directory with --model"
        ) from error
    return str(model)


def _check_source(plan: Plan) -> None:
    if plan.source.kind == "checkpoint":
        for fault in find_faults(plan.source.path, read=False):
            raise ValueError(fault)
        header, _ = read_manifest(plan.source.path)
        check_header(header, describe_model(_model_config(plan.hf_directory)), source=plan.source.path)
        if header.get("adapters") is not None:
            raise ValueError(
                f"{plan.source.path} holds LoRA adapters without the model that they belong to: convert the run's "
                "policy/, where they are merged, or go on with the run"
            )
    if plan.source.kind == "torch_dist":
        check_args(plan.source.path, _model_config(plan.hf_directory))
    if plan.source.kind == "hf":
        shape = ModelShape.of(_model_config(plan.hf_directory), source=str(plan.hf_directory / "config.json"))
        stored = read_weight_files(plan.source.path)
        check_tensors(stored, shape, source=plan.source.path)
        check_scales(stored, read_config(plan.source.path), source=plan.source.path)


def _check_model(plan: Plan) -> None:
    """That Megatron-core can have this model in this layout. FP8 of a Hugging Face directory needs no model."""
    if plan.kind == "fp8" and plan.source.kind == "hf":
        return
    parallel, hf_config = plan.parallel, _model_config(plan.hf_directory)
    layout = ModelLayout(tensor=parallel.tensor, pipeline=parallel.pipeline, expert=parallel.expert)
    read_architecture(hf_config, tensor_parallel=parallel.tensor)
    transformer_config(hf_config, dtype=plan.dtype, device="cpu", extra={}, layout=layout)


def _check_space(plan: Plan) -> None:
    files = plan.source.path.glob("*")
    size = sum(path.stat().st_size for path in files if path.suffix in (".safetensors", ".distcp"))
    # A checkpoint holds two moments beside each weight, all in float32.
    needed = size // 3 if plan.source.kind == "checkpoint" else size
    parent = plan.target.absolute()
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is no directory to write in")
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{parent} has {free / 1e9:.1f} GB free, and about {needed / 1e9:.1f} GB are needed")


def convert(plan: Plan, report: Report) -> None:
    """Do it. Every rank calls it; `report` is called with the progress.

    Raises:
        ValueError: the weights are damaged or not those of the model.
    """
    if plan.kind == "fp8":
        _convert_to_fp8(plan, report)
    else:
        _convert_model(plan, plan.target, report)


def _convert_to_fp8(plan: Plan, report: Report) -> None:
    whole = plan.source.path
    if plan.source.kind == "hf":
        _quantise(plan, whole, report)
        return
    whole = plan.target.with_name(f"{plan.target.name}.unquantised")
    try:
        _convert_model(plan, whole, report)
        _quantise(plan, whole, report)
    finally:
        if plan.place.rank == 0:
            shutil.rmtree(whole, ignore_errors=True)


def _quantise(plan: Plan, whole: Path, report: Report) -> None:
    if plan.place.rank == 0:
        report("quantising in blocks of 128 x 128")
        FP8Cast(whole).write(plan.target)


def _convert_model(plan: Plan, target: Path, report: Report) -> None:
    """Through a model in memory, as each rank of the layout holds it."""
    hf_config = _model_config(plan.hf_directory)
    join_ranks(plan.parallel, plan.place.with_own_port(), device="cpu", seed=0)
    try:
        architecture = read_architecture(hf_config, tensor_parallel=plan.parallel.tensor)
        config = transformer_config(hf_config, dtype=plan.dtype, device="cpu", extra={})
        for name in files_left_out(plan.source.path) if plan.source.kind == "hf" else ():
            report(f"{plan.source.path / name} is not carried over: the model does not need it")
        report(f"building the model in {plan.dtype} for {plan.parallel.describe()}")
        chunks = build_chunks(config, architecture, device="cpu")
        if plan.source.kind == "hf":
            with closing(_CountedWeights(plan.source.path, report)) as weights:
                load_hf_weights(chunks, architecture, weights)
        elif plan.source.kind == "torch_dist":
            report(f"reading {plan.source.path}")
            load_torch_dist(chunks, plan.source.path, vocab_size=architecture.vocab_size)
        else:
            report(f"reading {plan.source.path}")
            load_weights(chunks, plan.source.path)
        report(f"writing {target}")
        if plan.kind == "torch_dist":
            save_torch_dist(chunks, target, hf_directory=plan.hf_directory, dtype=plan.dtype)
            return
        tensors = _counted(named_hf_tensors(chunks, architecture), report)
        if plan.place.rank == 0:
            write_hf_directory(target, source=plan.hf_directory, tensors=tensors, dtype=plan.dtype)
        else:
            for _ in tensors:
                continue
        dist.barrier()
    finally:
        leave_ranks()


class _CountedWeights(HFWeights):
    """Weights that report how many of them have been read."""

    def __init__(self, directory: Path, report: Report) -> None:
        super().__init__(directory)
        self._report = report
        self._num_read = 0
        self._reported_at = time.monotonic()

    def __getitem__(self, name: str) -> torch.Tensor:
        self._num_read += 1
        if time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._report(f"read {self._num_read} of {len(self)} tensors")
        return super().__getitem__(name)


def _counted(
    tensors: Iterator[tuple[str, torch.Tensor]], report: Report
) -> Iterator[tuple[str, torch.Tensor]]:
    reported_at, num_bytes = time.monotonic(), 0
    for number, (name, tensor) in enumerate(tensors, start=1):
        yield name, tensor
        num_bytes += tensor.numel() * tensor.element_size()
        if time.monotonic() - reported_at > REPORT_EVERY_S:
            reported_at = time.monotonic()
            report(f"wrote {number} tensors, {num_bytes / 1e9:.1f} GB")
