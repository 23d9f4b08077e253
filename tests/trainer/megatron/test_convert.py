"""`polyturn convert` on real ranks and as a command: bit for bit, and refusals before anything starts."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.checkpoints.sources import find_source
from polyturn.trainer.checkpoints.torch_dist_index import read_index
from polyturn.trainer.megatron.convert import TorchrunPlace, make_plan
from polyturn.trainer.models.fp8 import dequantize_blocks
from tests.support.megatron.ranks_pool import RankContext, RankFailure, RankPool
from tests.support.megatron.tiny_families import make_tiny

pytestmark = pytest.mark.stack


def run_convert(context: RankContext, source: Path, target: Path, settings: dict) -> list[str]:
    """What was told of the progress."""
    from polyturn.trainer.megatron.convert import convert

    place = TorchrunPlace(
        rank=context.rank,
        world_size=context.world_size,
        address=context.master_address,
        port=context.master_port,
    )
    told: list[str] = []
    convert(make_plan(source, target, place=place, **settings), told.append)
    return told


def leave_checkpoint(context: RankContext, path: Path, directory: Path) -> None:
    from polyturn.configs.schema.trainer import ParallelConfig
    from tests.support.megatron.policies import make_policy, save_checkpoint

    policy = make_policy(path, parallel=ParallelConfig(tensor=2), place=context.place)
    try:
        save_checkpoint(policy, directory)
    finally:
        policy.close()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny("glm4_moe", tmp_path_factory.mktemp("glm4_moe"))
    (path / "logits.pt").unlink()
    (path / "tokenizer_config.json").write_text('{"model_max_length": 512}\n', encoding="utf-8")
    return path


def assert_same_model(ours: Path, theirs: Path, dtype: torch.dtype = torch.float32) -> None:
    a, b = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        expected = tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
        assert a[name].dtype == expected.dtype and torch.equal(a[name], expected), name
    assert (ours / "tokenizer_config.json").read_bytes() == (theirs / "tokenizer_config.json").read_bytes()


def test_hugging_face_to_torch_dist_and_back_is_bit_for_bit(
    rank_pool: RankPool, mixture: Path, tmp_path: Path
) -> None:
    middle, wide, back = tmp_path / "middle", tmp_path / "wide", tmp_path / "back"
    told = rank_pool.run(4, run_convert, mixture, middle, {"tensor": 2, "pipeline": 2, "expert": 2})[0]
    assert any("writing" in text for text in told)
    rank_pool.run(1, run_convert, middle, back, {})
    assert_same_model(back, mixture)
    assert json.loads((back / "config.json").read_text()) == json.loads((mixture / "config.json").read_text())
    # The other way round: written by one rank, read by two, in another dtype.
    rank_pool.run(1, run_convert, mixture, wide, {"dtype": "bfloat16"})
    rank_pool.run(2, run_convert, wide, tmp_path / "half", {"pipeline": 2, "dtype": "bfloat16"})
    assert_same_model(tmp_path / "half", mixture, torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_becomes_a_hugging_face_directory(
    rank_pool: RankPool, mixture: Path, tmp_path: Path
) -> None:
    step = tmp_path / "run" / "checkpoints" / "step_000001"
    rank_pool.run(2, leave_checkpoint, mixture, step)
    with pytest.raises(ValueError, match="--model"):
        make_plan(step, tmp_path / "out")
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {mixture}}}\n", encoding="utf-8")
    (step / "state.json").touch()
    rank_pool.run(1, run_convert, tmp_path / "run", tmp_path / "out", {})
    assert_same_model(tmp_path / "out", mixture)


def add_further_layer(source: Path, target: Path) -> Path:
    """A model with a layer that predicts further tokens, and files of every kind that a directory may hold."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.3.")]:
        tensors[name.replace("layers.3.", "layers.4.")] = tensors[name] + 1
    tensors["model.layers.4.eh_proj.weight"] = torch.randn(32, 64)
    save_file(tensors, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    (target / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (target / "onnx").mkdir()
    (target / "onnx" / "model.onnx").write_bytes(b"x")
    return target


def test_what_the_trainer_has_no_place_for_is_carried_over(
    rank_pool: RankPool, mixture: Path, tmp_path: Path
) -> None:
    source = add_further_layer(mixture, tmp_path / "source")
    (told,) = rank_pool.run(1, run_convert, source, tmp_path / "middle", {})
    assert [text for text in told if "not carried over" in text] == [
        f"{source / 'onnx'} is not carried over: the model does not need it"
    ]
    rank_pool.run(1, run_convert, tmp_path / "middle", tmp_path / "back", {})
    rank_pool.run(1, run_convert, source, tmp_path / "half", {"to": "hf", "dtype": "bfloat16"})
    assert_same_model(tmp_path / "back", source)
    assert_same_model(tmp_path / "half", source, torch.bfloat16)
    for name in ("config.json", "generation_config.json", "additional_chat_templates/rag.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    # Where the layer is not at hand, the config does not speak of it either.
    (tmp_path / "middle" / "hf" / "carried.safetensors").unlink()
    rank_pool.run(1, run_convert, tmp_path / "middle", tmp_path / "less", {})
    assert json.loads((tmp_path / "less" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert_same_model(tmp_path / "less", mixture)


def test_fp8_is_read_as_what_it_stands_for(rank_pool: RankPool, mixture: Path, tmp_path: Path) -> None:
    source, fp8 = add_further_layer(mixture, tmp_path / "source"), tmp_path / "fp8"
    rank_pool.run(1, run_convert, source, fp8, {"to": "fp8"})
    quantised = load_file(fp8 / "model.safetensors")
    expected = {
        name: dequantize_blocks(tensor, quantised[f"{name}_scale_inv"])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor
        for name, tensor in quantised.items()
        if not name.endswith("_scale_inv")
    }
    assert len(expected) < len(quantised)
    rank_pool.run(1, run_convert, fp8, tmp_path / "back", {"to": "hf"})
    rank_pool.run(1, run_convert, fp8, tmp_path / "dist", {"dtype": "bfloat16"})
    rank_pool.run(1, run_convert, tmp_path / "dist", tmp_path / "half", {})
    for directory, dtype in (("back", torch.float32), ("half", torch.bfloat16)):
        found = load_file(tmp_path / directory / "model.safetensors")
        assert found.keys() == expected.keys() == load_file(source / "model.safetensors").keys()
        for name, tensor in expected.items():
            wanted = tensor if name.endswith("e_score_correction_bias") else tensor.to(dtype)
            assert torch.equal(found[name], wanted), name
        assert "quantization_config" not in json.loads((tmp_path / directory / "config.json").read_text())
    with pytest.raises(ValueError, match="is quantised already"):
        make_plan(fp8, tmp_path / "x", to="fp8")
    config = json.loads((fp8 / "config.json").read_text())
    for changes, told in (
        ({"quant_method": "gptq", "bits": 4}, "is quantised with 'gptq', and only FP8"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "with a scale for each block"),
    ):
        (fp8 / "config.json").write_text(json.dumps({**config, "quantization_config": changes}))
        with pytest.raises(ValueError, match=told):
            make_plan(fp8, tmp_path / "x")


def test_directories_that_cannot_be_converted_are_refused_before_anything_starts(
    mixture: Path, tmp_path: Path
) -> None:
    def changed(change: Any) -> Path:
        directory = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(mixture, directory)
        tensors = load_file(mixture / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    key, embedding = "model.layers.2.self_attn.k_proj.weight", "model.embed_tokens.weight"
    for change, told in (
        (lambda tensors: tensors.update({embedding: tensors[embedding][:290].clone()}), r"shape \[290, 32\]"),
        (lambda tensors: tensors.update({embedding: torch.zeros(302, 32)}), r"shape \[302, 32\]"),
        (
            lambda tensors: tensors.update({key: torch.zeros(36, 32)}),
            r"k_proj\.weight has the shape \[36, 32\]",
        ),
        (lambda tensors: tensors.update({"model.layers.7.x": torch.zeros(1)}), r"holds model\.layers\.7\.x"),
    ):
        for to in ("torch_dist", "fp8"):
            with pytest.raises(ValueError, match=rf"model\.safetensors.*{told}"):
                make_plan(changed(change), tmp_path / "out", to=to)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge_and_unload"):
        make_plan(adapter, tmp_path / "out")


def test_the_command_under_torchrun_and_what_it_refuses(mixture: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--standalone", "-m", "polyturn", "convert", str(mixture), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [*command, "--tensor", "2"], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == f"torch_dist: {tmp_path / 'out'}"
    assert find_source(tmp_path / "out") is not None
    for arguments, told in {
        (mixture, tmp_path / "out"): "is there already",
        (tmp_path / "nowhere", tmp_path / "x"): "is no directory",
    }.items():
        with pytest.raises(ValueError, match=told):
            make_plan(*arguments)
    for settings, told in (
        ({"tensor": 2}, "must divide the 1 process"),
        ({"dtype": "int4"}, "int4"),
        ({"to": "hf"}, "is hf already"),
    ):
        with pytest.raises(ValueError, match=told):
            make_plan(mixture, tmp_path / "x", **settings)
    unknown = shutil.copytree(mixture, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    with pytest.raises(ValueError, match="mamba"):
        make_plan(unknown, tmp_path / "x")
    (unknown / "config.json").write_text(json.dumps(config))
    (unknown / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        make_plan(unknown, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def write_as_megatron(context: RankContext, model: Path, directory: Path, freq: Any) -> None:
    """What Megatron-LM's `save_checkpoint` leaves of a model after 10 iterations: weights by Megatron-core's own names,
    the optimizer's beside them, generators, and the namespace of its arguments.

    Args:
        freq: `--moe-layer-freq`, which decides whether layers are stacked in one tensor.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.transformer.enums import AttnBackend

    from polyturn.trainer.megatron.checkpoint_state import sharding_metadata
    from polyturn.trainer.megatron.torch_dist import InProcessSave
    from tests.support.megatron.tiny_families import load_model

    with context.joined(ParallelConfig()):
        chunks, config, architecture = load_model(model)
        config.moe_layer_freq = freq
        weights = chunks[0].sharded_state_dict(metadata=sharding_metadata())
        moments = [
            replace(value, key=f"optimizer.state.exp_avg.{value.key}", data=value.data.clone())
            for value in nested_values(weights)
            if isinstance(value, ShardedTensor) and "norm" in value.key
        ]
        args = argparse.Namespace(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            norm_epsilon=config.layernorm_epsilon,
            rotary_base=10000,
            rotary_percent=1.0,
            untie_embeddings_and_output_weights=not architecture.tied_embeddings,
            num_experts=config.num_moe_experts,
            moe_router_topk=config.moe_router_topk,
            params_dtype=torch.bfloat16,
            attention_backend=AttnBackend.auto,
            save=str(directory),
        )
        state = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 10,
            "model": weights,
            "optimizer": {"param_groups": [{"lr": 1e-6, "step": 10}], "moments": moments},
            "opt_param_scheduler": {"max_lr": 1e-6, "num_steps": 160},
            "rng_state": ShardedObject(
                "rng_state", [{"random_rng_state": (3, (1, 2), None)}], (1,), (0,), replica_id=context.rank
            ),
            "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
        }
        (directory / "iter_0000010").mkdir(parents=True)
        (directory / "latest_checkpointed_iteration.txt").write_text("10\n")
        dist_checkpointing.save(state, str(directory / "iter_0000010"), InProcessSave("torch_dist", 1))


@pytest.mark.parametrize(
    ("family", "freq"),
    [("qwen3", 1), ("qwen3", [1] * 4), ("qwen3_moe", 1)],
    ids=["stacked", "one-by-one", "stacked-experts"],
)
def test_what_megatron_writes_is_read(
    rank_pool: RankPool, tmp_path: Path, family: str, freq: int | list[int]
) -> None:
    """Layers stacked or one by one, whichever way our own model names them."""
    model, written = make_tiny(family, tmp_path / "model", rope_theta=10000.0), tmp_path / "megatron"
    (model / "logits.pt").unlink()
    (model / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    rank_pool.run(1, write_as_megatron, model, written, freq)
    source = find_source(written)
    assert source is not None and source.path == written / "iter_0000010"
    names = [name for name in read_index(source.path) if name.startswith("decoder.layers.")]
    assert any(name.split(".")[2].isdigit() for name in names) == (freq != 1)
    rank_pool.run(1, run_convert, written, tmp_path / "back", {"model": model})
    assert_same_model(tmp_path / "back", model)
    with pytest.raises(ValueError, match="does not say which model it is of"):
        make_plan(written, tmp_path / "x")
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match=r"was written with --norm-epsilon 1e-06, .* config.json says 1e-05"):
        make_plan(written, tmp_path / "x", model=other)


class _Runs:
    """A pickle of it would create a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def test_a_torch_dist_checkpoint_runs_nothing(rank_pool: RankPool, mixture: Path, tmp_path: Path) -> None:
    sound = tmp_path / "sound"
    rank_pool.run(1, run_convert, mixture, sound, {})
    (sound / "checksums.json").unlink()
    ran = tmp_path / "ran"
    name = "decoder.final_layernorm.weight"
    attack = pickle.dumps(_Runs(ran))

    def plant(index: Any, directory: Path) -> None:
        """The attack in place of a tensor's bytes."""
        (place,) = (place for key, place in index.storage_data.items() if key.fqn == name)
        place.relative_path, place.offset, place.length = "attack", 0, len(attack)
        (directory / "attack").write_bytes(attack)

    def declare(index: Any, directory: Path) -> None:
        plant(index, directory)
        index.state_dict_metadata[name] = BytesStorageMetadata()

    def add(index: Any, _directory: Path) -> None:
        index.state_dict_metadata["decoder.layers.9.weight"] = index.state_dict_metadata[name]
        (place,) = (place for key, place in index.storage_data.items() if key.fqn == name)
        index.storage_data[MetadataIndex("decoder.layers.9.weight", (0,))] = place

    def shorten(index: Any, _directory: Path) -> None:
        embedding = index.state_dict_metadata["embedding.word_embeddings.weight"]
        embedding.size = torch.Size([290, 32])
        embedding.chunks[0].sizes = torch.Size([290, 32])

    for number, (change, told) in enumerate(
        (
            (plant, f"attack: {name} cannot be read"),
            (declare, "is stored as a pickled object, which is not loaded"),
            (add, "holds decoder.layers.9.weight, for which the model's config.json has no place"),
            (shorten, r"has the shape \[290, 32\], and the model's config calls for \[301, 32\]"),
        )
    ):
        directory = shutil.copytree(sound, tmp_path / f"attack-{number}")
        index = pickle.loads((directory / ".metadata").read_bytes())
        change(index, directory)
        (directory / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(RankFailure, match=told):
            rank_pool.run(1, run_convert, directory, tmp_path / "out", {})
        assert not ran.exists() and not (tmp_path / "out").exists()
