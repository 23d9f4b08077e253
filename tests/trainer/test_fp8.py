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
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import preset_directory, read_json
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.trainer.models import hf_directory
from polyturn.trainer.models.families import describe_computation
from polyturn.trainer.models.fp8 import cast_tensors, dequantize_blocks, quantize_blocks
from polyturn.trainer.models.hf_directory import FP8Cast, HFWeights, write_unquantised
from polyturn.trainer.models.quantization import (
    BlockFP8,
    EngineRanks,
    check_engine_blocks,
    check_scales,
    find_quantised,
    quantization_config,
)
from polyturn.trainer.models.weight_files import INDEX_NAME, expected_tensors, read_weight_files
from polyturn.trainer.run.model_checks import check_fp8_engines, check_loadable
from polyturn.trainer.run.served_checks import check_precision
from polyturn.trainer.weight_sync.buckets import make_buckets
from tests.support.engines import engine_checksums
from tests.support.held_bytes import HeldBytes


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
        FP8Cast(tmp_path / "fp8").write(tmp_path / "again")


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


def test_what_is_read_is_what_transformers_reads_however_it_lies_in_files(
    make_wide_model: Path, tmp_path: Path
) -> None:
    fp8 = tmp_path / "fp8"
    FP8Cast(make_wide_model).write(fp8)
    tensors = load_file(fp8 / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    # Matrices and their scales in different files, as the published shards have some.
    weight_map = {}
    for file, part in (("model-1.safetensors", tensors), ("model-2.safetensors", scales)):
        save_file(part, fp8 / file)
        weight_map.update(dict.fromkeys(part, file))
    (fp8 / "model.safetensors").unlink()
    (fp8 / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    check_loadable(fp8, "model.path")
    theirs = Fp8Dequantize(None)
    with closing(HFWeights(fp8)) as weights:
        assert weights.keys() == tensors.keys()
        for name in weights:
            if f"{name}_scale_inv" in scales:
                tensor, scale = tensors[name], scales[f"{name}_scale_inv"]
                # It divides by the number of blocks, and so can have none that is smaller than the others.
                rows, columns = (128 * size for size in scale.shape)
                padded = torch.zeros(rows, columns, dtype=torch.uint8)
                padded[: tensor.size(0), : tensor.size(1)] = tensor.view(torch.uint8)
                whole = theirs._dequantize_one(padded.view(tensor.dtype), scale)
                expected = whole[: tensor.size(0), : tensor.size(1)]
                assert torch.equal(weights[name], expected) and expected.dtype == torch.float32
            else:
                assert torch.equal(weights[name], tensors[name])
    # Engines take it as it is: what is sent has the same names.
    cast = FP8Cast(fp8)
    assert cast.is_stored
    with closing(HFWeights(fp8)) as weights:
        sent = dict(cast(weights.items()))
    assert {name: tensor.dtype for name, tensor in sent.items()} == {
        name: tensor.dtype for name, tensor in (tensors | scales).items()
    }
    for name in scales:
        matrix = name.removesuffix("_scale_inv")
        assert torch.equal(sent[matrix].float(), tensors[matrix].float()), matrix
    # And the trainer sees the same model.
    config, plain = read_json(fp8 / "config.json"), read_json(make_wide_model / "config.json")
    assert describe_computation(config) == describe_computation(plain)
    with pytest.raises(
        ConfigError, match=r"judge\.path: .*fp8 is quantised, which SGLang serves on GPUs alone"
    ):
        check_precision(fp8, "cpu", "judge.path")
    check_precision(fp8, "cuda", "judge.path")
    check_precision(make_wide_model, "cpu", "judge.path")
    # Engines without FP8 start from a copy in a dtype of theirs.
    write_unquantised(fp8, tmp_path / "plain", dtype="bfloat16")
    assert "quantization_config" not in read_json(tmp_path / "plain" / "config.json")
    copied = load_file(tmp_path / "plain" / "model.safetensors")
    with closing(HFWeights(fp8)) as weights:
        rounded = dict(FP8Cast(make_wide_model).rounded(weights.items()))
        for name, tensor in copied.items():
            assert torch.equal(tensor, weights[name].to(torch.bfloat16)), name
            # What is FP8 already is not rounded again.
            assert torch.equal(rounded[name], weights[name]), name


def test_reading_takes_little_more_than_the_matrix_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_directory, "LOOKED_AT", 2**16)
    size = 1024
    tensors = {}
    for number in range(3):
        tensors[f"{number}.weight"] = torch.zeros(size, size, dtype=torch.float8_e4m3fn)
        tensors[f"{number}.weight_scale_inv"] = torch.ones(size // 128, size // 128)
    save_file(tensors, tmp_path / "model.safetensors")
    with closing(HFWeights(tmp_path)) as weights, HeldBytes() as held:
        for name in weights:
            weights[name]
    # The matrix in float32, a row of its blocks, and as much again for looking whether all is finite.
    matrix = 4 * size * size
    assert matrix < held.highest < 1.3 * matrix


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"a.weight_scale_inv": None}, r"there is no a\.weight_scale_inv: only FP8"),
        (
            {"a.weight_scale_inv": None, "a.weight_scale": torch.ones(())},
            r"a\.weight_scale is one scale for all of it: only FP8",
        ),
        (
            {"a.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)},
            "has the dtype I32, and scales are one of",
        ),
        (
            {"a.weight_scale_inv": torch.ones(2, 1)},
            r"shape \[2, 1\], and blocks of 128 x 128 .* need \[2, 2\]",
        ),
        ({"a.weight": torch.zeros(3, dtype=torch.float8_e4m3fn)}, r"of a\.weight \[3\] need"),
    ],
)
def test_scales_that_do_not_fit_are_named_before_a_weight_is_read(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], told: str
) -> None:
    tensors = {
        "a.weight": torch.zeros(200, 130, dtype=torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 2),
    }
    check_tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    save_file(check_tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{told}"):
        check_scales(read_weight_files(tmp_path), {}, source=tmp_path)
    with closing(HFWeights(tmp_path)) as weights, pytest.raises(ValueError, match=told):
        weights["a.weight"]


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, "one scale for a whole matrix"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors', and only FP8"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two numbers"),
        ("gptq", "'gptq', and only FP8"),
    ],
)
def test_other_quantisations_are_refused_by_name(quantization: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BlockFP8.of({"quantization_config": quantization}, source="dir")


def test_scales_that_are_powers_of_two_are_rounded_up() -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 128)
    weight[128:] = 448.0
    fp8 = BlockFP8.of(
        {
            "quantization_config": {
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "scale_fmt": "ue8m0",
            }
        },
        source="dir",
    )
    assert fp8 is not None and fp8.powers_of_two
    quantised, scales = quantize_blocks(weight, fp8)
    plain = weight[:128].abs().max() / 448
    assert float(scales[0, 0]) == 2.0 ** math.ceil(math.log2(float(plain))) and float(scales[1, 0]) == 1.0
    assert torch.equal(dequantize_blocks(quantised, scales)[128:], weight[128:])


def test_what_an_engine_keeps_in_one_piece_is_cast_together() -> None:
    layer = "model.layers.0."
    shapes = {
        f"{layer}mlp.experts.0.gate_proj.weight": (200, 256),
        f"{layer}mlp.experts.0.up_proj.weight": (200, 256),
        f"{layer}mlp.experts.0.down_proj.weight": (256, 200),
        f"{layer}mlp.shared_experts.down_proj.weight": (256, 200),
        # 576 rows are no whole blocks, but nothing follows them.
        f"{layer}self_attn.q_a_proj.weight": (1536, 256),
        f"{layer}self_attn.kv_a_proj_with_mqa.weight": (576, 256),
        "model.layers.1.self_attn.q_a_proj.weight": (1500, 256),
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight": (576, 256),
        "model.layers.1.mlp.gate_up_proj.weight": (384, 256),
        "model.layers.2.mlp.gate_up_proj.weight": (512, 256),
    }
    quantised = find_quantised(shapes)
    assert quantised == {
        f"{layer}mlp.shared_experts.down_proj.weight",
        f"{layer}self_attn.q_a_proj.weight",
        f"{layer}self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.2.mlp.gate_up_proj.weight",
    }
    skipped = quantization_config(shapes, quantised)["modules_to_not_convert"]
    assert {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"} < set(skipped)
    assert not any(name.startswith("model.layers.2") for name in skipped)


@pytest.mark.parametrize(
    ("preset", "ranks", "expert_ranks", "told"),
    [
        ("deepseek-v3", 8, 1, None),
        ("kimi-k2", 16, 1, None),
        ("qwen3-30b-a3b", 4, 1, "has 768 .*, which 4 ranks"),
        ("qwen3-30b-a3b", 4, 4, None),
        ("glm-4.5-355b", 8, 1, "has 1536 .*, which 8 ranks"),
        ("qwen3-4b", 8, 1, "which 8 ranks"),
        ("qwen3-4b", 2, 1, None),
    ],
)
def test_engines_divide_fp8_in_whole_blocks(
    preset: str, ranks: int, expert_ranks: int, told: str | None
) -> None:
    shape = ModelShape.read(preset_directory(preset))
    shapes = {
        name: size
        for name, size in expected_tensors(shape)
        if ".experts." not in name or ".experts.0." in name
    }

    def check() -> None:
        check_engine_blocks(
            shapes,
            find_quantised(shapes),
            ranks=EngineRanks(
                attention=ranks, experts=ranks // expert_ranks, shared_experts=ranks, dense=ranks
            ),
            num_kv_heads=shape.num_kv_heads,
        )

    if told is None:
        check()
    else:
        with pytest.raises(ValueError, match=told):
            check()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("sglang.attn_dp_size=32", "sglang.moe_a2a_backend=deepep"), None),
        (("sglang.attn_dp_size=4", "sglang.moe_a2a_backend=deepep"), None),
        # Ranks have shares of the shared expert, or of an expert.
        (("sglang.attn_dp_size=32",), "shared_experts.* has 1536 .*, which 32 ranks"),
        (
            ("sglang.attn_dp_size=32", "sglang.moe_a2a_backend=deepep", "sglang.ep_size=2"),
            r"experts\.0.* has 1536 .*, which 16 ranks",
        ),
    ],
)
def test_the_reference_fp8_variant_of_355b_divides_as_sglang_does(
    options: tuple[str, ...], told: str | None
) -> None:
    config = load_config(
        "glm_4_5_355b", ["weight_sync.dtype=fp8_block", "checks.weights_equal=false", *options]
    )
    shape = ModelShape.read(preset_directory("glm-4.5-355b"))
    if told is None:
        check_fp8_engines(config, shape)
    else:
        with pytest.raises(ConfigError, match=told):
            check_fp8_engines(config, shape)
