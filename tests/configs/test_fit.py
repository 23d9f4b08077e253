"""Plans are judged: what does not fit is told with what would, and what is proposed fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import preset_names, resolve_model_path
from polyturn.configs.sizing.fit import GIB, Capacity, host_bytes, judge, named_capacity, smallest_layout
from polyturn.configs.sizing.hardware import GPU_GIB, host_memory
from polyturn.configs.sizing.memory import check_layout, estimate_memory
from polyturn.configs.sizing.model_shape import ModelShape

ON_GPUS = ("engines.device=cuda", "trainer.device=cuda", "trainer.parallel.data=1")


def shape_of(name: str) -> ModelShape:
    return ModelShape.read(resolve_model_path(f"preset:{name}", needs_weights=False))


def test_what_no_gpu_holds_is_refused_with_what_would_fit() -> None:
    config = load_config("quickstart", [*ON_GPUS, "cluster.gpu=H200", "model.dtype=bfloat16"])
    misfits, _ = judge(config, shape_of("glm-4.5-355b"), named_capacity(config))
    trainer, engine = misfits
    assert re.match(r"a trainer rank takes: \S+ TiB of the 140.0 GiB of H200; trainer.parallel={", trainer)
    assert re.match(r"an engine rank takes: \S+ GiB of .*; engines.tensor_parallel=8 fits", engine)
    unnamed = load_config("quickstart", [*ON_GPUS, "model.dtype=bfloat16"])
    assert (
        "the largest GPU known, MI300X"
        in judge(unnamed, shape_of("glm-4.5-355b"), named_capacity(unnamed))[0][0]
    )


def test_fp8_is_proposed_where_bfloat16_fits_no_node_and_nothing_where_that_does_not_either() -> None:
    for gpu, advice in (
        ("H200", "engines.tensor_parallel=8 with weight_sync.dtype=fp8_block fits"),
        ("H100", "it fits on none of a node's 8 GPUs however it is split"),
    ):
        config = load_config("quickstart", [*ON_GPUS, f"cluster.gpu={gpu}", "model.dtype=bfloat16"])
        assert judge(config, shape_of("deepseek-v3"), named_capacity(config))[0][-1].endswith(advice)


@given(
    name=st.sampled_from(preset_names()),
    gib=st.sampled_from(sorted(set(GPU_GIB.values()))),
    context=st.sampled_from([1, 2]),
)
@settings(max_examples=12, deadline=None)
def test_a_layout_that_is_proposed_fits(name: str, gib: int, context: int) -> None:
    shape = shape_of(name)
    config = load_config(
        "quickstart", [*ON_GPUS, "model.dtype=bfloat16", f"trainer.parallel.context={context}"]
    )
    layout = smallest_layout(config, shape, gib * GIB)
    if layout is None:
        return
    changed = config.model_copy(update={"trainer": config.trainer.model_copy(update={"parallel": layout})})
    check_layout(changed, shape)
    capacity = Capacity(gpu=gib * GIB, gpu_name="this", host=None)
    assert not [sentence for sentence in judge(changed, shape, capacity)[0] if "trainer rank" in sentence]


def test_processes_on_cpus_share_the_memory_of_the_machine() -> None:
    config = load_config("quickstart")
    shape = shape_of("qwen3-0.6b")
    wanted = host_bytes(config, estimate_memory(config, shape))
    ranks = config.trainer.parallel.world_size
    assert wanted > ranks * 12 * shape.num_parameters + 4 * shape.num_parameters
    for host, misfits, tight in ((wanted - 1, 1, 0), (wanted, 0, 1), (2 * wanted, 0, 0)):
        found = judge(config, shape, Capacity(gpu=None, gpu_name="", host=host))
        assert [len(sentences) for sentences in found] == [misfits, tight]
        assert all(
            one.startswith("all processes together take: ") for sentences in found for one in sentences
        )


def test_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    whole = host_memory(limits=())
    for text, expected in (("1048576\n", 1 << 20), ("max\n", whole), (str(whole * 2), whole)):
        limit = tmp_path / "memory.max"
        limit.write_text(text)
        assert host_memory(limits=(tmp_path / "none", limit)) == expected


def test_ranks_of_a_critic_are_judged() -> None:
    ppo = ["trainer.algorithm.advantage.kind=ppo_gae", "trainer.critic.placement=own", "cluster.gpu=L4"]
    config = load_config("quickstart", [*ON_GPUS, *ppo, "model.dtype=bfloat16"])
    misfits, _ = judge(config, shape_of("qwen3-4b"), named_capacity(config))
    assert any(sentence.startswith("a critic rank takes: ") for sentence in misfits)


@pytest.mark.parametrize("gpu", GPU_GIB)
def test_the_table_of_gpus_goes_from_small_to_large(gpu: str) -> None:
    assert list(GPU_GIB.values()) == sorted(GPU_GIB.values())
    assert load_config("quickstart", [f"cluster.gpu={gpu}"]).cluster.gpu == gpu
