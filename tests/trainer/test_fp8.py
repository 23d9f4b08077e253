"""The FP8 cast against a plain computation, number by number, and the directory that an engine would load."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config

from polyturn.trainer.models.fp8 import cast_tensors, dequantize_blocks, find_quantised, quantize_blocks
from polyturn.trainer.models.hf_directory import FP8Cast, HFWeights
from polyturn.trainer.weight_sync.broadcast import make_buckets
from tests.support.engines import engine_checksums


def all_e4m3() -> list[float]:
    """Every finite number of float8 e4m3: sign, 4 bits of exponent with bias 7, 3 bits of mantissa; no infinity."""
    numbers = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) == (15, 7):
                continue
            value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            numbers += [value, -value]
    return numbers


def nearest_e4m3(value: float, numbers: list[float]) -> set[float]:
    """The number that rounding gives; two where it lies in the middle, to within what float32 division costs."""
    distance = min(abs(value - number) for number in numbers)
    return {number for number in numbers if abs(value - number) <= distance * (1 + 1e-5) + 1e-12}


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (5, 300)])
def test_each_number_is_the_nearest_that_e4m3_has(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1).mul(8).exp()
    quantised, scales = quantize_blocks(weight)
    assert quantised.shape == shape and quantised.dtype == torch.float8_e4m3fn
    assert scales.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    numbers = all_e4m3()
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale = float(block.abs().max()) / 448.0
            assert float(scales[i, j]) == pytest.approx(scale, rel=1e-6)
            ours = quantised[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
            for row, column in [(0, 0), (-1, -1), (block.size(0) // 2, block.size(1) // 3)]:
                expected = nearest_e4m3(float(block[row, column]) / scale, numbers)
                assert float(ours[row, column]) in expected
            # The block's largest number is e4m3's largest.
            assert float(ours.abs().max()) == 448.0
    back = dequantize_blocks(quantised, scales)
    # Half a step of 3 bits of mantissa, or half the smallest subnormal step.
    bound = torch.maximum(weight.abs() * 2.0**-4, scales.max() * 2.0**-10)
    assert bool(((back - weight).abs() <= bound * 1.0001).all())


def test_zeros_and_huge_and_tiny_blocks() -> None:
    weight = torch.zeros(256, 384)
    weight[:128, 128:256] = 3e38
    weight[:128, 256:] = -1e-44
    weight[128:, :128] = torch.tensor(1.0, dtype=torch.bfloat16).float()
    quantised, scales = quantize_blocks(weight)
    back = dequantize_blocks(quantised, scales)
    assert torch.isfinite(back).all() and torch.isfinite(scales).all() and bool((scales > 0).all())
    assert float(scales[0, 0]) == 1.0 and not back[:128, :128].any() and not back[128:, 128:].any()
    assert torch.allclose(back[:128, 128:256], weight[:128, 128:256], rtol=1e-6)
    assert float(back[:128, 256:].abs().max()) <= 1e-38
    assert torch.equal(back[128:, :128], weight[128:, :128])
    for bad in (float("inf"), float("nan")):
        weight[7, 300] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize_blocks(weight)


def test_a_padded_edge_does_not_change_a_block() -> None:
    torch.manual_seed(1)
    weight = torch.randn(256, 256)
    whole, whole_scales = quantize_blocks(weight)
    part, part_scales = quantize_blocks(weight[:, :200])
    assert torch.equal(part.float()[:, :128], whole.float()[:, :128])
    assert torch.equal(part_scales[:, 0], whole_scales[:, 0])


def test_only_matrices_of_the_layers_are_cast_and_joined_ones_together() -> None:
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (512, 256),
        "lm_head.weight": (512, 256),
        f"{layer}input_layernorm.weight": (256,),
        f"{layer}self_attn.q_proj.weight": (256, 256),
        f"{layer}self_attn.k_proj.weight": (64, 256),
        f"{layer}self_attn.v_proj.weight": (64, 256),
        f"{layer}self_attn.q_proj.bias": (256,),
        f"{layer}self_attn.o_proj.weight": (200, 256),
        f"{layer}mlp.gate.weight": (8, 256),
        f"{layer}mlp.experts.3.gate_proj.weight": (384, 256),
        f"{layer}mlp.experts.3.up_proj.weight": (384, 256),
        f"{layer}mlp.experts.3.down_proj.weight": (256, 384),
        "model.layers.1.self_attn.q_proj.weight": (256, 256),
        "model.layers.1.self_attn.k_proj.weight": (128, 256),
        "model.layers.1.self_attn.v_proj.weight": (128, 256),
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": (576, 256),
    }
    cast = find_quantised(shapes)
    assert cast == {
        f"{layer}self_attn.o_proj.weight",
        f"{layer}mlp.experts.3.gate_proj.weight",
        f"{layer}mlp.experts.3.up_proj.weight",
        f"{layer}mlp.experts.3.down_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
    }
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    names = [name for name, _ in cast_tensors(tensors.items(), cast)]
    assert len(names) == len(shapes) + len(cast)
    for name in cast:
        assert names[names.index(name) + 1] == f"{name}_scale_inv"


def test_an_fp8_directory_says_what_an_engine_must_know(make_wide_model: Path, tmp_path: Path) -> None:
    cast = FP8Cast(make_wide_model)
    cast.write(tmp_path / "fp8")
    before, after = (
        load_file(make_wide_model / "model.safetensors"),
        load_file(tmp_path / "fp8" / "model.safetensors"),
    )
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    assert config["activation_scheme"] == "dynamic" and "lm_head" in config["modules_to_not_convert"]
    theirs = FineGrainedFP8Config.from_dict(dict(config))
    assert tuple(theirs.weight_block_size) == (128, 128) and theirs.activation_scheme == "dynamic"
    name = "model.layers.0.mlp.down_proj.weight"
    assert after[name].dtype == torch.float8_e4m3fn
    back = dequantize_blocks(after[name], after[f"{name}_scale_inv"])
    torch.testing.assert_close(back, before[name], rtol=2.0**-4, atol=1e-3)
    for skipped in config["modules_to_not_convert"]:
        assert f"{skipped}.weight_scale_inv" not in after
        if f"{skipped}.weight" in before:
            assert torch.equal(after[f"{skipped}.weight"], before[f"{skipped}.weight"])
    # What is sent at a weight sync is what the engines were started from.
    sent = dict(cast(before.items()))
    assert sent.keys() == after.keys()
    assert all(torch.equal(sent[key].float(), after[key].float()) for key in after)
    buckets = list(make_buckets(sent.items(), bucket_bytes=2**20))
    assert {len({tensor.dtype for _, tensor in bucket}) for bucket in buckets} == {1}
    assert sorted(name for bucket in buckets for name, _ in bucket) == sorted(sent)
    assert engine_checksums(sent, tied_embeddings=False)
    with pytest.raises(ValueError, match="quantised already"):
        FP8Cast(tmp_path / "fp8")


@pytest.fixture
def make_wide_model(tmp_path: Path) -> Path:
    """A model of one layer whose matrices are wide enough for blocks, but for the keys and values."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=301,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "wide"
    )
    return tmp_path / "wide"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_blocks_of_any_size_and_scales_of_any_float_are_read(
    tmp_path: Path, scale_dtype: torch.dtype, block: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(130, 70).to(torch.float8_e4m3fn)
    scales = torch.tensor(2.0) ** torch.randint(-3, 3, (-(-130 // block[0]), -(-70 // block[1])))
    tensors = {"w.weight": matrix, "w.weight_scale_inv": scales.to(scale_dtype), "n": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with closing(HFWeights(tmp_path)) as weights:
        assert sorted(weights) == ["n", "w.weight"]
        found = weights["w.weight"]
    for row, column in ((0, 0), (129, 69), (64, 33), (127, 31)):
        scale = scales[row // block[0], column // block[1]]
        assert found[row, column] == matrix[row, column].float() * scale
    save_file({**tensors, "w.weight_scale_inv": torch.ones(1, 1)}, tmp_path / "model.safetensors")
    with closing(HFWeights(tmp_path)) as weights, pytest.raises(ValueError, match=r"w\.weight_scale_inv has"):
        weights["w.weight"]
