"""The arguments that Megatron-LM keeps beside its weights, read without running what their pickle names.

`common.pt` of an iteration's directory is a pickle of whatever the program had: its namespace of arguments, schedules,
parts of the optimizer. Every class or function named in it becomes an inert record here, so nothing is imported, made
or called; of what remains the arguments are taken that say what the weights compute.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyturn.trainer.models.families import describe_computation

COMMON = "common.pt"
MAX_BYTES = 2**28
"""Arguments and schedules are some kilobytes; nobody reads gigabytes into records."""


class _Inert:
    """Stands for anything that the pickle names: takes what is done to it, and does nothing."""

    def __init__(self, *_arguments: Any, **_keywords: Any) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.fields = state

    def __call__(self, *_arguments: Any, **_keywords: Any) -> _Inert:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Namespace(_Inert):
    """argparse's."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A class of its own each time: a pickle may also set attributes of what it names.
        base = _Namespace if (module, name) == ("argparse", "Namespace") else _Inert
        return type("Inert", (base,), {})

    def persistent_load(self, _pid: Any) -> Any:
        return None


def read_args(directory: Path) -> Mapping[str, Any] | None:
    """Megatron-LM's arguments as they were when it wrote the weights; None where there are none.

    What is no value of Python's own (a dtype, an enumeration) is left out.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / COMMON
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            (member,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if member.file_size > MAX_BYTES:
                raise ValueError("its pickle is too large for arguments")
            state = _Reader(io.BytesIO(archive.read(member))).load()
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}") from error
    found = state.get("args") if isinstance(state, dict) else None
    if not isinstance(found, _Namespace):
        return None
    plain = (bool, int, float, str, list, tuple, type(None))
    return {key: value for key, value in found.fields.items() if isinstance(value, plain)}


_SAME: Mapping[str, str] = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "kv_channels": "kv_channels",
    "norm_epsilon": "layernorm_epsilon",
    "qk_layernorm": "qk_layernorm",
    "rotary_base": "rope_base",
    "rotary_percent": "rope_percent",
    "rotary_interleaved": "rotary_interleaved",
    "num_experts": "num_moe_experts",
    "moe_router_topk": "moe_router_topk",
    "moe_router_score_function": "moe_router_score_function",
    "moe_router_pre_softmax": "moe_router_pre_softmax",
    "multi_latent_attention": "multi_latent_attention",
    "kv_lora_rank": "kv_lora_rank",
}
"""Megatron-LM's argument -> the setting of `families.describe_computation`. Sizes that a tensor's shape shows, too, are
here for the sentence; what no shape shows is why this is read."""
_OFF = {"qk_layernorm", "rotary_interleaved", "multi_latent_attention"}
"""Settings that are false where a family does not mention them."""


def find_difference(args: Mapping[str, Any], computation: Mapping[str, Any]) -> str | None:
    """What the arguments and a model's config disagree on, as the middle of a sentence; None: nothing.

    An argument that is missing or null was left to a default, and says nothing.

    Args:
        computation: `families.describe_computation` of the config.
    """
    is_latent = bool(computation.get("multi_latent_attention"))
    is_mixture = bool(computation.get("num_moe_experts"))
    for argument, setting in _SAME.items():
        ours, theirs = computation.get(setting, False if setting in _OFF else None), args.get(argument)
        if theirs is None or (argument.startswith("moe_") and not is_mixture):
            continue
        if is_latent and argument in ("kv_channels", "qk_layernorm", "rotary_percent", "rotary_interleaved"):
            continue
        if ours is None or isinstance(theirs, str) != isinstance(ours, str):
            continue
        differs = theirs != ours if isinstance(theirs, str) else abs(theirs - ours) > 1e-6 * abs(ours)
        if differs:
            return f"was written with --{argument.replace('_', '-')} {theirs}, and the model's config.json says {ours}"
    tied = args.get("untie_embeddings_and_output_weights")
    if isinstance(tied, bool) and tied == computation["tied_embeddings"]:
        word = "its own" if tied else "the embeddings' weights"
        return f"has an output layer of {word}, and the model's config.json says otherwise"
    return None


def check_args(directory: Path, hf: Mapping[str, Any]) -> None:
    """Whether what Megatron-LM wrote is of the model that a config.json describes, as far as its arguments say.

    Raises:
        ValueError: they differ, or the file with them is damaged.
    """
    args = read_args(directory)
    difference = None if args is None else find_difference(args, describe_computation(hf))
    if difference is not None:
        raise ValueError(f"{directory} {difference}: name the model that it is of")
