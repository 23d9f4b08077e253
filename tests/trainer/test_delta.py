"""Changes of weights: found, carried, applied to a copy, and refused where they do not belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from polyturn.trainer.weight_sync import WeightSyncError
from polyturn.trainer.weight_sync.delta import DeltaError, apply_patch, bytes_of, make_patch
from polyturn.trainer.weight_sync.delta_publisher import DeltaPublisher
from polyturn.trainer.weight_sync.mirror import VERSION, Mirror

Weights = dict[str, torch.Tensor]


def random_weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(37, 11, generator=generator),
        "b.weight": torch.randn(64, 64, generator=generator).bfloat16(),
        "b.scale": torch.randn(1, generator=generator),
    }


def moved(weights: Weights, *, share: float) -> Weights:
    """Other values in about that share of the places."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.where(torch.rand(tensor.shape, generator=generator) < share, tensor * 1.01, tensor)
        for name, tensor in weights.items()
    }


@given(
    size=st.integers(1, 200),
    block_bytes=st.sampled_from([1, 4, 16, 64, 1024]),
    places=st.sets(st.integers(0, 199)),
)
def test_a_patch_makes_exactly_the_new_bytes(size: int, block_bytes: int, places: set[int]) -> None:
    before = torch.arange(size, dtype=torch.uint8)
    after = before.clone()
    for place in places:
        if place < size:
            after[place] ^= 1 + place % 7
    patch = make_patch("w", after, bytes_of(before), block_bytes=block_bytes)
    target = bytes_of(before).copy()
    apply_patch(patch, target)
    assert target.tobytes() == bytes_of(after).tobytes()


def test_few_changes_cost_few_bytes_and_all_of_them_no_more_than_the_whole() -> None:
    before = torch.randn(512, 512).bfloat16()
    few = make_patch("w", moved({"w": before}, share=0.01)["w"], bytes_of(before), block_bytes=256)
    assert few.blocks is not None and few.num_bytes < bytes_of(before).nbytes / 10
    noise = torch.randint(0, 256, (512 * 512 * 2,), dtype=torch.uint8).view(torch.bfloat16).view(512, 512)
    other = make_patch("w", noise, bytes_of(before), block_bytes=256)
    assert other.blocks is None and other.num_bytes == bytes_of(before).nbytes
    assert make_patch("w", before, bytes_of(before), block_bytes=256).num_bytes < 16


@pytest.mark.parametrize("spoil", ["base", "payload", "checksum"])
def test_what_does_not_belong_together_is_refused(spoil: str) -> None:
    before = torch.randn(64, 64)
    patch = make_patch("w", moved({"w": before}, share=0.1)["w"], bytes_of(before), block_bytes=64)
    target = bytes_of(before).copy()
    if spoil == "base":
        target[0] ^= 1
    elif spoil == "payload":
        patch = replace(patch, payload=patch.payload[:-3])
    else:
        patch = replace(patch, checksum=bytes(32))
    with pytest.raises(DeltaError, match="w: "):
        apply_patch(patch, target)


def publisher(
    directory: Path, *, full_every: int = 50, others: dict[str, Mirror] | None = None
) -> DeltaPublisher:
    return DeltaPublisher(
        mirror=Mirror(directory / "mirror", {"config.json": b"{}"}),
        is_here=lambda host: host == "127.0.0.1",
        open_mirror=lambda host: (others or {})[host],
        block_bytes=64,
        bucket_bytes=4096,
        full_every=full_every,
        new_checksums=None,
    )


def sent_bytes(made: DeltaPublisher, weights: Weights, version: int) -> int:
    made.prepare(weights.items(), version=version)
    assert made._prepared is not None
    return made._prepared[3]


def held(directory: Path) -> Weights:
    found: Weights = {}
    for part in sorted(directory.glob("*.safetensors")):
        found |= load_file(part)
    return found


def test_a_copy_follows_by_changes_and_gets_all_where_it_has_to(tmp_path: Path) -> None:
    """Whole at first, after so many versions, and once a host has come that has nothing."""
    weights = random_weights()
    whole = sum(bytes_of(tensor).nbytes for tensor in weights.values())
    other = Mirror(tmp_path / "other", {})
    made = publisher(tmp_path, full_every=3, others={"10.0.0.2": other})
    sizes = []
    for version in range(1, 6):
        if version == 3:
            made.set_engines(["http://10.0.0.2:1"])
        weights = moved(weights, share=0.02)
        sizes.append(sent_bytes(made, weights, version))
        for mirror in (tmp_path / "mirror", *([tmp_path / "other"] if version >= 3 else [])):
            assert (mirror / VERSION).read_text() == f"{version}\n"
            found = held(mirror)
            assert found.keys() == weights.keys()
            assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert [size == whole for size in sizes] == [True, False, True, False, False]
    assert max(size for size in sizes if size != whole) < whole / 2
    assert (tmp_path / "mirror" / "config.json").read_bytes() == b"{}"


def test_a_copy_that_somebody_touched_is_found_out_and_comes_whole_the_next_time(tmp_path: Path) -> None:
    weights = random_weights()
    other = Mirror(tmp_path / "other", {})
    made = publisher(tmp_path, others={"10.0.0.2": other})
    made.set_engines(["http://10.0.0.2:1"])
    whole = sent_bytes(made, weights, 1)
    other.read("a.weight")[5] ^= 1
    with pytest.raises(WeightSyncError, match=r"a host's copy.*a\.weight"):
        made.prepare(moved(weights, share=0.1).items(), version=2)
    assert not (tmp_path / "other" / VERSION).exists(), "what is half changed is no version"
    assert sent_bytes(made, moved(weights, share=0.1), 2) == whole
    assert torch.equal(held(tmp_path / "other")["a.weight"], moved(weights, share=0.1)["a.weight"])
