"""What a config.json says of names and shapes, against what transformers writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from polyturn.configs.models import preset_directory, preset_names
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.trainer.models.families import FAMILIES
from polyturn.trainer.models.weight_files import (
    StoredTensor,
    check_tensors,
    expected_tensors,
    linear_layers,
    read_weight_files,
)
from tests.support.megatron.tiny_families import TINY, make_tiny


@pytest.mark.parametrize("name", TINY)
def test_names_and_shapes_are_those_that_transformers_writes(name: str, tmp_path: Path) -> None:
    directory = make_tiny(name, tmp_path)
    shape = ModelShape.read(directory)
    stored = read_weight_files(directory)
    assert dict(expected_tensors(shape)) == {name: tensor.shape for name, tensor in stored.items()}
    check_tensors(stored, shape, source=directory)


@pytest.mark.parametrize("name", preset_names())
def test_every_name_has_a_row_and_every_number_is_counted(name: str) -> None:
    shape = ModelShape.read(preset_directory(name))
    patterns = [
        re.compile(re.escape(hf_name).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+"))
        for row in FAMILIES[shape.model_type].rows.values()
        for hf_name in row.hf_names
    ]
    num_parameters = 0
    for tensor, size in expected_tensors(shape):
        product = 1
        for one in size:
            product *= one
        num_parameters += product * (not tensor.endswith("e_score_correction_bias"))
        if re.search(r"\.(0|3)\.|^model\.[en]|lm_head", tensor):
            assert any(pattern.fullmatch(tensor) for pattern in patterns), tensor
    assert num_parameters == shape.num_parameters


def stored_of(shape: ModelShape) -> dict[str, StoredTensor]:
    path = Path("model.safetensors")
    return {name: StoredTensor(path=path, dtype="F32", shape=size) for name, size in expected_tensors(shape)}


@pytest.mark.parametrize("name", ["qwen3-4b", "glm-4-9b", "glm-4.5-air", "deepseek-v3"])
def test_every_tensor_of_another_shape_is_named_with_both(name: str) -> None:
    """One row more or fewer, or another width, in each kind of tensor."""
    hf = json.loads((preset_directory(name) / "config.json").read_text())
    hf |= {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}
    hf |= {key: 2 for key in ("num_experts", "n_routed_experts") if key in hf}
    shape = ModelShape.of(hf, source="config.json")
    sound = stored_of(shape)
    check_tensors(sound, shape, source=Path("dir"))
    for tensor, stored in sound.items():
        for axis in range(len(stored.shape)):
            for step in (-1, 1):
                wrong = list(stored.shape)
                wrong[axis] += step
                changed = StoredTensor(path=stored.path, dtype="F32", shape=tuple(wrong))
                told = re.escape(
                    f"{tensor} has the shape {wrong}, and config.json calls for {list(stored.shape)}"
                )
                with pytest.raises(ValueError, match=told):
                    check_tensors({**sound, tensor: changed}, shape, source=Path("dir"))
        with pytest.raises(ValueError, match=re.escape(f"dir has no {tensor}, which")):
            check_tensors(
                {key: value for key, value in sound.items() if key != tensor}, shape, source=Path("dir")
            )


@pytest.mark.parametrize(
    ("tensor", "further", "told"),
    [
        ("model.layers.36.mlp.up_proj.weight", 0, "a layer beyond those of its config"),
        ("model.layers.36.mlp.up_proj.weight", 1, None),
        ("model.layers.37.mlp.up_proj.weight", 1, r"num_hidden_layers=36, num_nextn_predict_layers=1"),
        ("model.layers.1.mlp.gate.weight", 1, "for which its config.json has no place"),
        ("model.layers.1.self_attn.q_proj.bias", 0, "for which its config.json has no place"),
        ("mtp.0.weight", 1, "for which its config.json has no place"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 0, None),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", 0, None),
        ("model.layers.0.mlp.up_proj.weight_scale", 0, "for which its config.json has no place"),
    ],
)
def test_every_tensor_has_a_place_or_is_named(tensor: str, further: int, told: str | None) -> None:
    hf = json.loads((preset_directory("qwen3-4b") / "config.json").read_text())
    shape = ModelShape.of({**hf, "num_nextn_predict_layers": further}, source="config.json")
    more = {tensor: StoredTensor(path=Path("more.safetensors"), dtype="F32", shape=(2,))}
    if told is None:
        check_tensors({**more, **stored_of(shape)}, shape, source=Path("dir"))
        return
    with pytest.raises(ValueError, match=rf"more\.safetensors holds {re.escape(tensor)}, .*{told}"):
        check_tensors({**more, **stored_of(shape)}, shape, source=Path("dir"))


@pytest.mark.parametrize("step", [-11, 0, 64])
def test_an_output_layer_beside_tied_embeddings_is_of_their_shape(step: int) -> None:
    shape = ModelShape.read(preset_directory("qwen3-4b"))
    rows, width = shape.vocab_size + step, shape.hidden_size
    more = {"lm_head.weight": StoredTensor(path=Path("more"), dtype="F32", shape=(rows, width))}
    if step == 0:
        check_tensors(stored_of(shape) | more, shape, source=Path("dir"))
        return
    with pytest.raises(
        ValueError, match=rf"more: lm_head\.weight has the shape \[{rows}, {width}\], and .* ties"
    ):
        check_tensors(stored_of(shape) | more, shape, source=Path("dir"))


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F8_E5M2", "I8"])
def test_a_tensor_that_holds_no_weights_is_named(dtype: str) -> None:
    shape = ModelShape.read(preset_directory("qwen3-4b"))
    stored = stored_of(shape)
    name = "model.layers.0.mlp.up_proj.weight"
    stored[name] = replace(stored[name], dtype=dtype)
    with pytest.raises(ValueError, match=f"{name} has the dtype {dtype}, which holds no weights to train"):
        check_tensors(stored, shape, source=Path("dir"))


def test_a_name_that_another_program_gave_is_told_with_the_one_that_is_missing() -> None:
    """As where experts were written fused, or behind a prefix."""
    shape = ModelShape.read(preset_directory("qwen3-4b"))
    renamed = {name.replace("gate_proj", "gate_up_proj"): one for name, one in stored_of(shape).items()}
    told = (
        r"dir has no model\.layers\.0\.mlp\.gate_proj\.weight, which its config\.json calls for; "
        r"it holds model\.layers\.0\.mlp\.gate_up_proj\.weight, which has no place"
    )
    with pytest.raises(ValueError, match=told):
        check_tensors(renamed, shape, source=Path("dir"))


def test_linear_layers_are_those_that_the_model_has() -> None:
    assert linear_layers(ModelShape.read(preset_directory("glm-4.5-air"))) == (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    assert "q_proj" not in linear_layers(ModelShape.read(preset_directory("deepseek-v3")))
