"""The marker of a finished checkpoint: what model it is of, and the size and checksum of every file of it.

It is written last, so a directory without it was not finished; it holds a checksum of itself, too. Nothing here needs
torch, so that the driver of a run can look for faults before any rank has started.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from polyturn.configs.schema.trainer import LoraConfig
from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.models.families import describe_computation

FORMAT = 2
MARKER = "trainer.json"
CHUNK_BYTES = 16 * 1024**2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or used; those before are as they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file of a checkpoint."""

    name: str
    """Its path in the checkpoint's directory."""
    num_bytes: int
    crc32: int


def checksum(path: Path) -> int:
    """The CRC-32 of a file's bytes. It finds damage, not malice."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def describe_file(path: Path, *, name: str | None = None) -> WrittenFile:
    """Size and checksum of a file as it lies there."""
    return WrittenFile(name=name or path.name, num_bytes=path.stat().st_size, crc32=checksum(path))


def describe_folders(directory: Path) -> list[WrittenFile]:
    """The files of the folders in a checkpoint, but for those that are checkpoints of their own."""
    return [
        describe_file(path, name=str(path.relative_to(directory)))
        for folder in sorted(directory.iterdir())
        if folder.is_dir() and not (folder / MARKER).is_file()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a checksum of itself, so that the file is there whole or not at all, whenever power fails."""
    body = orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
    with whole_file(path) as file:
        file.write(
            orjson.dumps(
                {**value, "crc32": zlib.crc32(body)}, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS
            )
        )


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        ValueError: it is not there, no JSON object, or was changed since.
    """
    try:
        value = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: it was not finished") from None
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict) or "crc32" not in value:
        raise ValueError(f"{path} is damaged, or of another release: it has no checksum")
    found = value.pop("crc32")
    if zlib.crc32(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)) != found:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    return value


def write_manifest(
    directory: Path, header: Mapping[str, Any], files: Iterable[WrittenFile], *, marker: str = MARKER
) -> None:
    """Declare a checkpoint finished."""
    listed = [asdict(file) for file in files]
    write_sealed(directory / marker, {"format": FORMAT, "header": dict(header), "files": listed})


def read_manifest(directory: Path, *, marker: str = MARKER) -> tuple[dict[str, Any], list[WrittenFile]]:
    """The header and the files of a finished checkpoint.

    Raises:
        ValueError: the directory holds none, or one of another format.
    """
    path = directory / marker
    if not path.is_file():
        raise ValueError(f"{directory} holds no finished trainer checkpoint: it has no {marker}")
    value = read_sealed(path)
    if value.get("format") != FORMAT:
        raise ValueError(
            f"{path}: the checkpoint has format {value.get('format')}, this release reads format {FORMAT}"
        )
    header, listed = value.get("header"), value.get("files")
    if not isinstance(header, dict) or not isinstance(listed, list):
        raise ValueError(f"{path} is damaged: it has no header, or no files")
    return header, [_written(file, path) for file in listed]


def _written(file: Any, path: Path) -> WrittenFile:
    name = file.get("name") if isinstance(file, dict) else None
    if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{path} names the file {name!r}, which is not in its directory")
    try:
        return WrittenFile(**file)
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def find_faults(
    directory: Path, *, share: int = 0, num_shares: int = 1, read: bool = True, marker: str = MARKER
) -> list[str]:
    """What is wrong with a checkpoint, one sentence each; empty when nothing is.

    Args:
        share: of the files, look only at every `num_shares`th, from this one on: ranks look at different ones.
        read: compare the checksums, too, for which every byte is read; otherwise marker, presence and sizes.
    """
    try:
        _, files = read_manifest(directory, marker=marker)
    except ValueError as error:
        return [str(error)]
    faults = []
    for file in files[share::num_shares]:
        path = directory / file.name
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif path.stat().st_size != file.num_bytes:
            faults.append(
                f"{path} has {path.stat().st_size} bytes, not the {file.num_bytes} that were written"
            )
        elif read and checksum(path) != file.crc32:
            faults.append(f"{path} is damaged: its checksum does not fit")
    return faults


IDENTITY = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts",
    "vocab_size",
    "tie_word_embeddings",
)
"""The keys of a Hugging Face config in which two models differ whose checkpoints must not be mixed up."""


def describe_model(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a header that tells models apart."""
    return {
        "model": {key: hf_config[key] for key in IDENTITY if key in hf_config},
        "computation": describe_computation(hf_config),
    }


def describe_adapters(lora: LoraConfig | None, layers: Sequence[str]) -> dict[str, Any] | None:
    """The part of a header that tells adapters apart; `layers` are the kinds of layers that can have some."""
    if lora is None:
        return None
    targets = sorted(layer for layer in layers if lora.adapts(layer))
    return {"rank": lora.rank, "alpha": lora.alpha, "target_modules": targets}


def check_header(header: Mapping[str, Any], ours: Mapping[str, Any], *, source: Path) -> None:
    """Compare a checkpoint's header with what is to take it up, as far as the header says.

    Args:
        ours: what `describe_model` says, and `adapters` where there may be some.

    Raises:
        ValueError: they differ; names the first thing that does.
    """
    for part in ("computation", "model"):
        theirs, here = header.get(part), ours[part]
        if theirs is None:
            continue
        for key in sorted(theirs.keys() | here.keys()):
            if theirs.get(key) != here.get(key):
                raise ValueError(
                    f"{source} holds the checkpoint of another model: its {key} is {theirs.get(key)}, here it is "
                    f"{here.get(key)}"
                )
    if "adapters" in ours and "adapters" in header:
        _check_adapters(header["adapters"], ours["adapters"], source)


def _check_adapters(theirs: Mapping[str, Any] | None, ours: Mapping[str, Any] | None, source: Path) -> None:
    if theirs is None or ours is None:
        if theirs is not ours:
            was, asks = ("without", "some") if theirs is None else ("with", "none")
            raise ValueError(
                f"{source} was written {was} LoRA adapters, and trainer.lora asks for {asks}: "
                "train as it was trained, or begin from the run's weights (policy/, in which adapters are merged)"
            )
        return
    for key in theirs:
        if theirs[key] != ours.get(key):
            raise ValueError(
                f"{source} holds LoRA adapters with {key}={theirs[key]}, and trainer.lora has {key}={ours.get(key)}: "
                "give it the same value, or begin from the run's merged weights (policy/) with new adapters"
            )
