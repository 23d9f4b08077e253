"""Hashes that must have the same bits as SGLang's own, and the engine's names and shards of tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from tests.support.engines import engine_checksums

TRITON = """
import sys, torch, triton, importlib.util
from pathlib import Path
from polyturn.rollout.engines.checksums import cuda_tensor_hash
from polyturn.rollout.engines.sglang_main import murmur_hash32
root = Path(importlib.util.find_spec("sglang").submodule_search_locations[0]) / "kernels" / "ops"

def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

hashing = load(root / "memory" / "gpu_tensor_hash.py")
def upstream(tensor, seed=0x243F6A88):
    data = tensor.reshape(-1).view(torch.uint8)
    data = torch.cat([data, data.new_zeros(-len(data) % 4)]).view(torch.uint32)
    tiles = torch.empty(triton.cdiv(len(data), 8192), dtype=torch.uint64)
    hashing.hash_tiles32_kernel_blocked[(len(tiles),)](
        data, tiles, len(data), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=hashing.FMIX32_C1, FM_C2=hashing.FMIX32_C2, POS_A=hashing.POS_C1, POS_B=hashing.POS_C2,
        TILE=8192, BLOCK=256, USE_CG=False)
    total = torch.zeros(1, dtype=torch.uint64)
    hashing.add_tree_reduce_u64_kernel[(1,)](tiles, total, len(tiles), CHUNK=1024)
    return hashing._final_splitmix64(int(total.item()))

torch.manual_seed(0)
for tensor in (torch.randn(3, 5), torch.randn(8192), torch.randn(37, 11).bfloat16(), torch.randn(3 * 8192 + 17)):
    assert cuda_tensor_hash(tensor) == upstream(tensor), tensor.shape

sampling = load(root / "sampling" / "murmur_hash.py")
seeds = torch.tensor([0, 1, 123, 2**31 + 5, 2**47 + 12345], dtype=torch.uint64)
positions, columns = torch.tensor([0, 7, 4095, 3, 9]), torch.arange(300)
out = torch.empty(5, 300, dtype=torch.uint32)
sampling.murmur_hash32_kernel[(5, 2)](seeds, positions, columns, out, 5, 300, BLOCK_SIZE=256)
assert torch.equal(out, murmur_hash32(seeds, positions, columns))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="compares with SGLang's Triton kernels"
)
def test_our_ports_of_the_kernels_give_the_same_bits():
    """Seeded sampling and weight checksums, against SGLang's own kernels in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", TRITON], check=True, env=environment)


@pytest.mark.parametrize("tied", [False, True])
def test_checksum_names_and_shards_of_a_tensor_parallel_engine(tied):
    """Each rank's names and bytes, from the whole tensors: against shards that are cut here by hand."""
    import torch

    layer = "model.layers.0."
    torch.manual_seed(0)
    whole = {
        "model.embed_tokens.weight": torch.randn(100, 8),
        layer + "self_attn.v_proj.weight": torch.randn(4, 8),
        layer + "self_attn.q_proj.weight": torch.randn(8, 8),
        layer + "self_attn.k_proj.weight": torch.randn(4, 8),
        layer + "self_attn.o_proj.weight": torch.randn(8, 8),
        layer + "input_layernorm.weight": torch.randn(8),
        "lm_head.weight": torch.randn(100, 8),
    }
    checksums = EngineChecksums(EngineLayout(tied_embeddings=tied), tensor_parallel=2)
    for name, tensor in whole.items():
        checksums.add(name, tensor)
    found = checksums.finish()
    padded = torch.cat([whole["model.embed_tokens.weight"], torch.zeros(28, 8)])
    attention = layer + "self_attn."
    for rank, prefix in enumerate(("", "rank1.")):
        rows = slice(64 * rank, 64 * rank + 64)
        q, kv = slice(4 * rank, 4 * rank + 4), slice(2 * rank, 2 * rank + 2)
        fused = torch.cat(
            [whole[f"{attention}{n}_proj.weight"][rows] for n, rows in zip("qkv", (q, kv, kv), strict=True)]
        )
        shard = engine_checksums(
            {
                "model.embed_tokens.weight": padded[rows],
                layer + "fused.weight": fused,
                attention + "o_proj.weight": whole[attention + "o_proj.weight"][:, q],
            },
            tied_embeddings=True,
        )
        assert found[prefix + "model.embed_tokens.weight"] == shard["model.embed_tokens.weight"]
        assert found[f"{prefix}{attention}qkv_proj.weight"] == shard[layer + "fused.weight"]
        assert found[f"{prefix}{attention}o_proj.weight"] == shard[attention + "o_proj.weight"]
        assert (prefix + "lm_head.weight" in found) == (not tied)
    assert found[layer + "input_layernorm.weight"] == found[f"rank1.{layer}input_layernorm.weight"]


def test_a_missing_part_of_a_fused_tensor_is_named():
    import torch

    with pytest.raises(
        ValueError, match=r"gate_up_proj\.weight needs model\.layers\.0\.mlp\.up_proj\.weight"
    ):
        engine_checksums([("model.layers.0.mlp.gate_proj.weight", torch.ones(2, 2))], tied_embeddings=True)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_experts_of_a_layer_are_counted_by_whatever_name_a_config_gives_them(name):
    """transformers 5 writes Qwen3-MoE's as `num_local_experts`, and its publishers wrote `num_experts`."""
    layout = EngineLayout.of_config({name: 2})
    assert layout.hf_names("model.layers.0.mlp.experts.w2_weight") == (
        "model.layers.0.mlp.experts.0.down_proj.weight",
        "model.layers.0.mlp.experts.1.down_proj.weight",
    )
