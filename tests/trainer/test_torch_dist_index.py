"""The index of a torch_dist checkpoint, read without running what it names."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from polyturn.trainer.checkpoints.torch_dist_index import METADATA, read_index


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    state = {
        "weight": torch.arange(12.0).view(3, 4),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "note": "text",
    }
    dcp.save(state, checkpoint_id=str(path), no_dist=True)
    return path


class Runs:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_an_index_says_where_tensors_are_stored(saved: Path) -> None:
    index = read_index(saved)
    assert index["note"] is None, "a pickled object"
    weight = index["weight"]
    assert weight is not None and weight.shape == (3, 4)
    (chunk,) = weight.chunks
    assert (chunk.offset, chunk.shape) == ((0, 0), (3, 4))
    stored = chunk.path.read_bytes()[chunk.start : chunk.start + chunk.num_bytes]
    assert torch.equal(torch.load(io.BytesIO(stored), weights_only=True), torch.arange(12.0).view(3, 4))


def write_index(directory: Path, index: object) -> Path:
    (directory / METADATA).write_bytes(pickle.dumps(index))
    return directory


def loaded(saved: Path) -> Metadata:
    index: Metadata = pickle.loads((saved / METADATA).read_bytes())
    return index


def test_a_function_that_an_index_names_is_not_run(saved: Path, tmp_path: Path) -> None:
    index = loaded(saved)
    index.planner_data = Runs(tmp_path / "ran")
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        read_index(write_index(tmp_path, index))
    assert not (tmp_path / "ran").exists()


def test_an_index_cannot_change_the_classes_that_it_names(tmp_path: Path) -> None:
    """A pickle may set attributes of whatever it has named: state of two parts goes to `setattr`."""
    attack = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x05\x00\x00\x00addedK\x01s\x86tb."
    )
    attack = attack.replace(b"(N}", b"N}").replace(b"\x86tb.", b"\x86b.")
    (tmp_path / METADATA).write_bytes(attack)
    with pytest.raises(ValueError, match="is damaged"):
        read_index(tmp_path)
    assert not hasattr(Metadata, "added")


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "", ".", "..", "a/b"])
def test_an_index_names_files_of_its_own_directory_only(saved: Path, tmp_path: Path, name: str) -> None:
    index = loaded(saved)
    for place in index.storage_data.values():
        place.relative_path = name
    with pytest.raises(ValueError, match="which is not in the checkpoint's directory"):
        read_index(write_index(tmp_path, index))


def test_a_part_that_lies_outside_its_tensor_is_refused(saved: Path, tmp_path: Path) -> None:
    index = loaded(saved)
    index.state_dict_metadata["weight"].size = torch.Size([2, 4])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"weight lies outside its shape \[2, 4\]"):
        read_index(write_index(tmp_path, index))


def test_a_weight_declared_as_an_object_is_known_as_one(saved: Path, tmp_path: Path) -> None:
    index = loaded(saved)
    index.state_dict_metadata["weight"] = BytesStorageMetadata()
    assert read_index(write_index(tmp_path, index))["weight"] is None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_one_sentence(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray((saved / METADATA).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("damaged")
    (directory / METADATA).write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        index = read_index(directory)
    except ValueError as error:
        assert METADATA in str(error)
    else:
        assert isinstance(index, dict)
