"""Headers of safetensors directories: what is not whole is one sentence that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from polyturn.trainer.models.weight_files import INDEX_NAME, SINGLE_NAME, read_header, read_weight_files


def make_sharded(directory: Path) -> Path:
    directory.mkdir()
    save_file({"a": torch.zeros(2, 3)}, directory / "one.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, directory / "two.safetensors")
    placed = {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
    return directory


def test_headers_say_name_dtype_shape_and_file(tmp_path: Path) -> None:
    directory = make_sharded(tmp_path / "sound")
    found = read_weight_files(directory)
    assert {name: (tensor.path.name, tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "a": ("one.safetensors", "F32", (2, 3)),
        "b": ("two.safetensors", "BF16", (4,)),
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def index_of(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def header_of(directory: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    end = max(entry["data_offsets"][1] for entry in header.values())
    (directory / "two.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: cut(path / "two.safetensors"), r"two\.safetensors has \d+ bytes, and its header describes"),
    (
        lambda path: (path / "two.safetensors").write_bytes(b""),
        r"two\.safetensors is no whole safetensors file",
    ),
    (
        lambda path: (path / "two.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        r"two\.safetensors is a pointer of Git LFS",
    ),
    (lambda path: (path / "two.safetensors").write_bytes(b"\xff" * 64), "is no whole safetensors file"),
    (
        lambda path: (path / "two.safetensors").write_bytes((8).to_bytes(8, "little") + b"nonsense"),
        r"two\.safetensors has a damaged header",
    ),
    (
        lambda path: (path / "two.safetensors").unlink(),
        r"lacks two\.safetensors, which model\.safetensors\.index",
    ),
    (lambda path: cut(path / INDEX_NAME), r"index\.json is damaged"),
    (lambda path: (path / INDEX_NAME).write_text("[]"), "has no weight_map"),
    (lambda path: (path / INDEX_NAME).unlink(), r"has one\.safetensors, but neither model\.safetensors nor"),
    (
        lambda path: index_of(path, {"a": "../sound/one.safetensors"}),
        r"names '\.\./sound/one\.safetensors' for a, which is not in the directory itself",
    ),
    (lambda path: index_of(path, {"a": "/etc/passwd"}), "which is no safetensors file"),
    (lambda path: index_of(path, {"a": 3}), "names 3 for a"),
    (
        lambda path: index_of(path, {"a": "two.safetensors", "b": "two.safetensors"}),
        r"says that a is in two\.safetensors, and it is not",
    ),
    (lambda path: index_of(path, {"a": f"{'x' * 300}.safetensors"}), "which is too long for a file"),
    (
        lambda path: header_of(path, {"b": {**ENTRY, "dtype": ["F32"]}}),
        r"two\.safetensors has a damaged header \(the dtype \['F32'\] is not known",
    ),
    (
        lambda path: header_of(path, {"b": ENTRY, "c": ENTRY}),
        r"two\.safetensors has a damaged header \(a tensor's bytes begin at 0, those before it end at 16",
    ),
    (
        lambda path: header_of(path, {"b": {**ENTRY, "data_offsets": [16, 32]}}),
        r"two\.safetensors has a damaged header \(a tensor's bytes begin at 16, those before it end at 0",
    ),
    (
        lambda path: shutil.copy(path / "one.safetensors", path / "two.safetensors"),
        r"a is both in .*one\.safetensors and in .*two\.safetensors",
    ),
]


@pytest.mark.parametrize(("damage", "told"), DAMAGES)
def test_what_is_not_whole_is_named(tmp_path: Path, damage: Callable[[Path], object], told: str) -> None:
    directory = make_sharded(tmp_path / "sound")
    damage(directory)
    with pytest.raises(ValueError, match=told):
        read_weight_files(directory)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_model.bin", r"as pickles, which are not opened here: .*save_pretrained"),
        ("adapter_config.json", r"holds a PEFT adapter, not a model: .*merge_and_unload"),
        ("model.gguf", r"has its weights as model\.gguf"),
        ("README.md", "holds no weights"),
    ],
)
def test_directories_without_safetensors_get_a_way_out(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=told):
        read_weight_files(tmp_path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_of_a_header_is_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / SINGLE_NAME
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, path)
    raw = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        found = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(tensor.path == path for tensor in found.values())
