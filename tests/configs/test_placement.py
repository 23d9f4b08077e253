"""Who sits where, over 1, 2 and 8 pretended nodes: node and GPUs, which address is bound, what others are told."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.arithmetic import num_gpus
from polyturn.configs.sizing.memory import check_layout
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.nodes import Node, read_hosts
from polyturn.configs.sizing.placement import Placement, Seat, place_further, plan_placement, planned_nodes
from polyturn.configs.sizing.placement_table import meeting_lines, placement_lines

CUDA = ("engines.device=cuda", "trainer.device=cuda")


def node(number: int, *, cpus: int = 64, gpus: int = 8) -> Node:
    return Node(address=f"10.0.0.{number}", num_cpus=cpus, num_gpus=gpus)


def nodes(count: int, *, cpus: int = 64, gpus: int = 8) -> list[Node]:
    return [node(number, cpus=cpus, gpus=gpus) for number in range(1, count + 1)]


def on_gpus(*overrides: str) -> RunConfig:
    return load_config("quickstart", ["trainer.parallel.data=1", *CUDA, *overrides])


def where(seats: tuple[Seat, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Last parts of the addresses, and GPUs."""
    return [(seat.node.address.removeprefix("10.0.0."), seat.gpus) for seat in seats]


def blocks(seats: tuple[Seat, ...]) -> dict[str, list[int]]:
    """The GPUs of all seats, by node."""
    found: dict[str, list[int]] = {}
    for address, gpus in where(seats):
        found.setdefault(address, []).extend(gpus)
    return found


def engines_of(placement: Placement, group: str = "engines") -> list[list[tuple[str, tuple[int, ...]]]]:
    return [where(engine.seats) for engine in placement.engines[group]]


ALL = list(range(8))


def test_reference_glm4_9b_on_8_gpus_4_and_4() -> None:
    """slime's GLM4-9B page: --actor-num-gpus-per-node 4 --rollout-num-gpus 4 --rollout-num-gpus-per-engine 2."""
    config = on_gpus(
        "trainer.parallel={tensor: 2, context: 2}", "engines.num_engines=2", "engines.tensor_parallel=2"
    )
    placement = plan_placement(config, nodes(1))
    assert where(placement.policy) == [("1", (gpu,)) for gpu in range(4)]
    assert engines_of(placement) == [[("1", (4, 5))], [("1", (6, 7))]]
    assert placement.on(node(1)) == (4, 8)


def test_reference_glm4_9b_co_located() -> None:
    config = on_gpus(
        "trainer.parallel={tensor: 2, context: 2, data: 2}",
        "engines={num_engines: 4, tensor_parallel: 2, placement: shared}",
    )
    placement = plan_placement(config, nodes(1))
    assert [engine.on_trainer_gpus for engine in placement.engines["engines"]] == [True] * 4
    assert engines_of(placement) == [[("1", (2 * index, 2 * index + 1))] for index in range(4)]
    assert num_gpus(config) == 8 and placement.on(node(1)) == (8, 8)


def test_reference_qwen3_4b_co_located_on_8_and_2_and_6() -> None:
    together = on_gpus("trainer.parallel={tensor: 2, data: 4}", "engines={num_engines: 8, placement: shared}")
    assert engines_of(plan_placement(together, nodes(1))) == [[("1", (gpu,))] for gpu in range(8)]
    apart = on_gpus("trainer.parallel={tensor: 2}", "engines.num_engines=6")
    assert engines_of(plan_placement(apart, nodes(1))) == [[("1", (gpu,))] for gpu in range(2, 8)]
    lent = on_gpus("trainer.parallel={tensor: 2}", "engines={num_engines: 8, num_on_trainer_gpus: 2}")
    placement = plan_placement(lent, nodes(1))
    assert engines_of(placement) == [[("1", (gpu,))] for gpu in (2, 3, 4, 5, 6, 7, 0, 1)]
    assert [engine.on_trainer_gpus for engine in placement.engines["engines"]] == [False] * 6 + [True] * 2
    assert num_gpus(lent) == 8


GLM = (
    "trainer.parallel={tensor: 8, pipeline: 4, context: 2, expert: 16}",
    "engines={num_engines: 2, tensor_parallel: 32, placement: shared}",
)


def test_reference_glm_4_5_355b_on_64_gpus() -> None:
    """slime's page of it: tp8 pp4 cp2 ep16 on 8 nodes of 8, --colocate --rollout-num-gpus-per-engine 32."""
    config = load_config("glm_4_5_355b")
    assert config.trainer.parallel.world_size == 64 == num_gpus(config)
    assert config.trainer.parallel.data == 1
    rollout, trainer = config.rollout, config.trainer
    # --rollout-batch-size 128 --n-samples-per-prompt 8 --num-steps-per-rollout 4, over-sampled to 256 prompts.
    assert rollout.prompts_per_step * rollout.samples_per_prompt == trainer.global_batch_size * 4
    assert rollout.oversample * rollout.prompts_per_step == 256
    assert config.sglang == {
        "mem_fraction_static": 0.7,
        "attn_dp_size": 4,
        "ep_size": 32,
        "enable_dp_lm_head": True,
        "moe_dense_tp_size": 1,
    }
    check_layout(config, ModelShape.read(resolve_model_path(config.model.path, needs_weights=False)))
    placement = plan_placement(config, nodes(8))
    assert blocks(placement.policy) == {str(number): ALL for number in range(1, 9)}
    assert engines_of(placement) == [
        [(str(number), tuple(ALL)) for number in range(1, 5)],
        [(str(number), tuple(ALL)) for number in range(5, 9)],
    ]
    first, second = placement.engines["engines"]
    assert (first.meets_at, first.told, second.meets_at, second.told) == (
        "10.0.0.1",
        "10.0.0.1",
        "10.0.0.5",
        "10.0.0.5",
    )
    assert second.binds == ("10.0.0.5", "10.0.0.6", "10.0.0.7", "10.0.0.8")
    # A tensor axis on each node; the experts of a stage on two.
    parallel = config.trainer.parallel
    places = [[parallel.place(rank) for rank in range(8 * number, 8 * number + 8)] for number in range(8)]
    assert [sorted({place.tensor for place in of_node}) for of_node in places] == [ALL] * 8
    assert [{place.pipeline for place in of_node} for of_node in places] == [{n // 2} for n in range(8)]
    assert [{place.expert for place in of_node} for of_node in places] == [set(ALL), set(range(8, 16))] * 4


def test_the_fp8_variant_of_its_engines() -> None:
    """--sglang-dp-size 32 --sglang-ep-size 32 with DeepEP, and what the ranks cannot share."""
    fp8 = ["weight_sync.dtype=fp8_block", "sglang.attn_dp_size=32", "sglang.moe_a2a_backend=deepep"]
    more = [
        "sglang.deepep_mode=auto",
        "sglang.disable_radix_cache=true",
        "sglang.cuda_graph_bs_decode=[1, 2, 4, 8]",
    ]
    config = load_config("glm_4_5_355b", [*fp8, *more])
    shape = ModelShape.read(resolve_model_path(config.model.path, needs_weights=False))
    check_layout(config, shape)
    for key, value in (("attn_dp_size", 3), ("ep_size", 64), ("attention_data_parallel_size", 5)):
        with pytest.raises(ConfigError, match=r"which must divide engines\.tensor_parallel=32"):
            check_layout(load_config("quickstart", [*CUDA, *GLM[1:], f"sglang.{key}={value}"]), shape)
    with pytest.raises(ConfigError, match=r"'sglang\.dp_size' is not yours to set: copies of the model are"):
        load_config("glm_4_5_355b", ["sglang.dp_size=4"])


def test_a_plan_of_64_gpus_is_told_in_a_line_for_each_node_and_kind() -> None:
    config = on_gpus(*GLM)
    placement = plan_placement(config, planned_nodes(config))
    lines = placement_lines(config, placement)
    assert len(lines) == 16
    assert [(line.device, line.name) for line in lines[-2:]] == [
        ("GPUs 0-7", "trainer ranks 56-63"),
        ("GPUs 0-7", "engine 1"),
    ]
    assert lines[-2].note == "tensor 0-7, data 0, context 1, pipeline 3, expert 8-15"
    assert lines[-1].note.startswith("node rank 3 of 4, listens on node7:a free port")
    assert meeting_lines(placement) == [
        "trainer ranks meet at node0, at a port that rank 0 finds free there",
        "the 4 nodes of engine 0 meet at node0, and requests go there",
        "the 4 nodes of engine 1 meet at node4, and requests go there",
    ]


def test_two_nodes_with_a_critic_and_a_judge_of_their_own() -> None:
    config = on_gpus(
        "trainer.parallel={tensor: 2, data: 2}",
        "trainer.algorithm.advantage={kind: ppo_gae}",
        "trainer.critic={placement: own, parallel: {data: 2}}",
        "engines={num_engines: 2, tensor_parallel: 2}",
        "judges=[{name: grader, path: 'builtin:tiny-searcher', "
        "engines: {tensor_parallel: 4, host: '0.0.0.0', port: 7000}}]",
    )
    placement = plan_placement(config, nodes(2))
    assert where(placement.policy) == [("1", (gpu,)) for gpu in range(4)]
    assert where(placement.critic) == [("1", (4,)), ("1", (5,))]
    # The judge is seated before, because it is larger; small engines fill what it leaves.
    assert engines_of(placement, "grader") == [[("2", (0, 1, 2, 3))]]
    assert engines_of(placement) == [[("1", (6, 7))], [("2", (4, 5))]]
    (grader,) = placement.engines["grader"]
    assert (grader.binds, grader.told, grader.port) == (("0.0.0.0",), "10.0.0.2", 7000)


def test_engines_of_evaluations_have_places_of_their_own() -> None:
    config = on_gpus(
        "trainer.parallel.data=4",
        "engines={num_engines: 2}",
        "evaluation.engines={tensor_parallel: 2}",
    )
    assert num_gpus(config) == 8
    placement = plan_placement(config, nodes(1))
    assert where(placement.policy) == [("1", (gpu,)) for gpu in range(4)]
    assert engines_of(placement, "evaluation") == [[("1", (4, 5))]]
    assert engines_of(placement) == [[("1", (6,))], [("1", (7,))]]


def test_engines_of_others_take_no_place() -> None:
    urls = ["http://10.9.9.9:30000", "http://10.9.9.8:30000/"]
    config = on_gpus(f"engines.urls={urls}", "trainer.parallel.data=8")
    assert config.engines.num_engines == 2 and num_gpus(config) == 8
    placement = plan_placement(config, nodes(1))
    assert placement.engines == {} and placement.urls == {"engines": tuple(urls)}
    assert [line.note for line in placement_lines(config, placement) if line.node == "elsewhere"] == urls


@pytest.mark.parametrize("placed", ["own", "shared"])
def test_cpus_go_through_the_same_plan_with_no_gpus(placed: str) -> None:
    config = load_config(
        "quickstart",
        [
            "trainer.parallel={tensor: 2, data: 2}",
            f"engines={{num_engines: 3, tensor_parallel: 2, ranks_per_node: 1, placement: {placed}}}",
        ],
    )
    placement = plan_placement(config, nodes(2, cpus=3, gpus=0))
    assert where(placement.policy) == [("1", ()), ("1", ()), ("2", ()), ("2", ())]
    assert engines_of(placement) == [[("1", ()), ("2", ())]] * 3
    assert [line.device for line in placement_lines(config, placement)] == ["cpu"] * 8
    three = plan_placement(config, nodes(3, cpus=2, gpus=0))
    seats = engines_of(three)
    assert all(first != second for (first, _), (second, _) in seats)
    if placed == "shared":
        # Where no rank is, nothing sits that takes turns with one.
        assert {address for engine in seats for address, _ in engine} == {"1", "2"}


def test_an_engine_that_needs_a_whole_node_goes_first_where_ranks_would_break_it_up() -> None:
    config = on_gpus("trainer.parallel.data=4", "engines.tensor_parallel=8")
    placement = plan_placement(config, [node(1), node(2, gpus=4)])
    assert engines_of(placement) == [[("1", tuple(ALL))]]
    assert {address for address, _ in where(placement.policy)} == {"2"}


def test_what_has_no_room_is_told_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"asks for 10 GPUs, but the cluster has 10\.0\.0\.1 \(64 CPUs, 8"):
        plan_placement(on_gpus("trainer.parallel.data=9"), nodes(1))
    config = on_gpus("engines.num_engines=3", "engines.tensor_parallel=8")
    with pytest.raises(
        ConfigError, match=r"3 engine\(s\) with engines\.tensor_parallel=8 need 8 GPUs each on one"
    ):
        plan_placement(config, [node(1, gpus=12), node(2, gpus=14)])
    plan_placement(config, nodes(4))
    with pytest.raises(ConfigError, match="asks for 2 CPUs, one a rank"):
        plan_placement(load_config("quickstart", ["trainer.parallel.data=2"]), nodes(2, cpus=0))
    with pytest.raises(ConfigError, match=r"asks for 16 GPUs, each with a CPU, 16 on one node \(tensor\)"):
        plan_placement(on_gpus("trainer.parallel.tensor=16"), nodes(4))
    with pytest.raises(ConfigError, match=r"2 engine\(s\) with engines\.tensor_parallel=8 are to take turns"):
        plan_placement(
            on_gpus(
                "trainer.parallel.data=8", "engines={num_engines: 2, tensor_parallel: 8, placement: shared}"
            ),
            nodes(1),
        )
    with pytest.raises(ConfigError, match=r"engines\.device is cpu, trainer\.device cuda"):
        plan_placement(on_gpus("engines={placement: shared, device: cpu}"), nodes(1))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_loopback_is_not_reached_from_another_node(host: str) -> None:
    config = on_gpus(f"engines.host='{host}'")
    plan_placement(config, nodes(1))
    with pytest.raises(ConfigError, match=r"engines\.host is .* leave it out"):
        plan_placement(config, nodes(2))


def test_a_host_is_the_address_of_the_engines_node_or_of_all_of_its_own() -> None:
    config = on_gpus("engines.num_engines=9", "engines.host=10.0.0.1")
    with pytest.raises(
        ConfigError, match=r"engines\.host is 10\.0\.0\.1, which is no address of 10\.0\.0\.2"
    ):
        plan_placement(config, nodes(2))
    anywhere = plan_placement(on_gpus("engines.num_engines=8", "engines.host='::'"), nodes(2))
    assert [engine.told for engine in anywhere.engines["engines"]] == ["10.0.0.1"] * 7 + ["10.0.0.2"]


def test_rollout_workers_on_other_nodes_find_the_router() -> None:
    workers = ["engines.router.policy=cache_aware", "rollout.num_workers=2"]
    plan_placement(on_gpus(*workers), nodes(1))
    plan_placement(on_gpus(*workers, "engines.router.host=10.0.0.1"), nodes(2))
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with pytest.raises(
            ConfigError, match=r"do not find the router; set it to the address of the driver's"
        ):
            plan_placement(on_gpus(*workers, f"engines.router.host={host}"), nodes(2))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[RunConfig, list[Node]]:
    tensor = draw(st.sampled_from([1, 2, 4]))
    parallel = {"tensor": tensor, "data": draw(st.integers(1, 4)), "pipeline": draw(st.integers(1, 2))}
    count, lent = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    engines = {
        "num_engines": count,
        "tensor_parallel": draw(st.sampled_from([1, 2, 4, 8, 16])),
        "placement": draw(st.sampled_from(["own", "shared"])),
    }
    if engines["placement"] == "own":
        engines["num_on_trainer_gpus"] = min(lent, count)
    config = on_gpus(
        *(f"trainer.parallel.{axis}={size}" for axis, size in parallel.items()),
        *(f"engines.{key}={value}" for key, value in engines.items()),
    )
    sizes = draw(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=8))
    return config, [node(number, gpus=gpus) for number, gpus in enumerate(sizes, start=1)]


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_any_plan(layout: tuple[RunConfig, list[Node]]) -> None:
    config, there = layout
    try:
        placement = plan_placement(config, there)
    except ConfigError as error:
        assert str(error).strip()
        return
    parallel, engines = config.trainer.parallel, placement.engines["engines"]
    assert len(placement.policy) == parallel.world_size and len(engines) == config.engines.num_engines
    # No GPU twice, but by turns; each is one that its node has.
    own = [(seat.node.address, gpu) for seat in placement.policy for gpu in seat.gpus]
    lent = Counter[tuple[str, int]]()
    for engine in engines:
        gpus = [(seat.node.address, gpu) for seat in engine.seats for gpu in seat.gpus]
        assert len(gpus) == config.engines.tensor_parallel
        if engine.on_trainer_gpus:
            assert set(gpus) <= set(own)
            lent.update(gpus)
        else:
            own.extend(gpus)
    assert len(own) == len(set(own)) and set(lent.values()) <= {1}
    assert all(gpu < seat.node.num_gpus for seat in placement.seats() for gpu in seat.gpus)
    # Ranks fill one node after the other, and a tensor axis is on one.
    order = [there.index(seat.node) for seat in placement.policy]
    assert order == sorted(order)
    for first in range(0, parallel.world_size, parallel.tensor):
        seats = placement.policy[first : first + parallel.tensor]
        assert len({seat.node for seat in seats}) == 1
        assert all(b.gpus[0] == a.gpus[0] + 1 for a, b in pairwise(seats))
    for engine in engines:
        # Each engine's ranks are next to each other, as many on every node, no node twice; all are told its first one.
        assert len({seat.node for seat in engine.seats}) == len(engine.seats)
        assert len({len(seat.gpus) for seat in engine.seats}) == 1
        for seat in engine.seats:
            assert seat.gpus == tuple(range(seat.gpus[0], seat.gpus[0] + len(seat.gpus)))
        assert engine.binds == tuple(seat.node.address for seat in engine.seats)
        assert engine.told == engine.binds[0]
        assert (engine.meets_at is None) == (len(engine.seats) == 1)
    taken = sum(placement.on(each)[1] for each in there)
    assert taken == num_gpus(config)


def test_one_engine_more_comes_where_there_is_room_for_it_now() -> None:
    servers = on_gpus("engines={num_engines: 2, tensor_parallel: 4, port: 7000}").engines
    placement = place_further(servers, 2, [node(1, gpus=3), node(2, gpus=5)], section="engines")
    (engine,) = placement.engines["engines"]
    assert (where(engine.seats), engine.told, engine.port) == ([("2", (0, 1, 2, 3))], "10.0.0.2", 7002)
    assert placement.on(node(2, gpus=5)) == (0, 4)
    with pytest.raises(ConfigError, match=r"no place for one engine more: engines\.tensor_parallel=4 needs"):
        place_further(servers, 2, [node(1, gpus=3)], section="engines")
    on_cpu = load_config("quickstart").engines
    assert (
        place_further(on_cpu, 1, [node(1, gpus=0)], section="engines").engines["engines"][0].told
        == "10.0.0.1"
    )


def test_pretended_nodes_are_as_many_as_it_takes() -> None:
    assert [node.address for node in planned_nodes(on_gpus())] == ["127.0.0.1"]
    # 12 GPUs, but no two engines of six on a node of eight.
    six = on_gpus("engines.num_engines=2", "engines.tensor_parallel=6", "trainer.parallel.data=2")
    assert len(planned_nodes(six)) == 2
    assert len(planned_nodes(on_gpus("engines.num_engines=3", "engines.tensor_parallel=6"))) == 3
    assert len(planned_nodes(on_gpus(*GLM, "cluster.gpus_per_node=16"))) == 4


def test_a_plan_for_the_nodes_of_a_host_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "# the new rack\nworker-b slots=4 max_slots=4\n\n10.0.0.9:2  # mpich's form\n[fd00::0:2]:8\nfd00::3\n"
    )
    assert [(host.name, host.num_gpus) for host in read_hosts(hosts, default_gpus=8)] == [
        ("worker-b", 4),
        ("10.0.0.9", 2),
        ("fd00::2", 8),
        ("fd00::3", 8),
    ]
    config = on_gpus(f"cluster.hosts={hosts}", "trainer.parallel.data=4", "engines.tensor_parallel=8")
    placement = plan_placement(config, planned_nodes(config))
    assert {seat.node.address for seat in placement.policy} == {"worker-b"}
    assert placement.engines["engines"][0].told == "fd00::2"
    config = on_gpus(f"cluster.hosts={hosts}", "trainer.parallel.data=64")
    with pytest.raises(ConfigError, match=r"the cluster has worker-b \(4 GPUs\), 10\.0\.0\.9 \(2 GPUs\)"):
        plan_placement(config, planned_nodes(config))


def test_every_bad_line_of_a_host_file_is_told_with_its_number(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "a slots=8\na slots=8\nb slots=many\nc gpus=8\n1.2.3.4.5\n[::1\nfe80::x\nd:8 slots=8\n"
        "ha llo\n[::1]:\n::2\n::0:2:8\n::0:2\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_hosts(hosts, default_gpus=8)
    told = {line.split(":")[1]: line for line in str(caught.value).splitlines()}
    assert list(told) == ["2", "3", "4", "5", "6", "7", "8", "9", "10", "13"]
    assert told["2"] == f"{hosts}:2: a stands already in line 1"
    assert "a line is like `c slots=8`" in told["4"] and "twice" in told["8"]
    assert told["13"].endswith("::2 stands already in line 11")
    hosts.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="names no host"):
        read_hosts(hosts, default_gpus=8)
    with pytest.raises(ConfigError, match=r"cluster\.hosts: .*nowhere"):
        read_hosts(tmp_path / "nowhere", default_gpus=8)
    hosts.write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_hosts(hosts, default_gpus=8)


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ("{urls: ['10.0.0.1:30000']}", "is not like http://host:port"),
        ("{urls: ['http://a:1', 'http://a:1']}", "names 'http://a:1' twice"),
        ("{urls: ['http://a:1'], placement: shared}", "engines that others placed"),
        ("{num_engines: 2, num_on_trainer_gpus: 3}", "num_on_trainer_gpus is 3, and there are 2"),
        ("{num_engines: 2, num_on_trainer_gpus: 1, placement: shared}", "leave num_on_trainer_gpus out"),
        ("{tensor_parallel: 4, ranks_per_node: 3}", "must divide tensor_parallel=4"),
    ],
)
def test_places_that_contradict_each_other(section: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config("quickstart", [f"engines={section}"])


def test_nodes_as_ray_describes_them() -> None:
    entry = {"NodeManagerAddress": "10.0.0.7", "Alive": True, "Resources": {"CPU": 8.0, "memory": 1e9}}
    assert Node.of(entry) == Node(address="10.0.0.7", num_cpus=8, num_gpus=0)


def test_prefill_and_decode_want_a_router_and_rest_together() -> None:
    pairs = ["engines={num_engines: 3, num_prefill: 1, router: {policy: cache_aware}}"]
    assert on_gpus(*pairs).engines.num_prefill == 1
    for changes, sentence in (
        (["engines.num_prefill=3"], "none is left to generate"),
        (["engines.router.policy=sticky"], "num_prefill needs sglang-router"),
        (["engines.device=cpu"], "on a CPU there is no way"),
        (["rollout.max_staleness=1"], "max_staleness: 0"),
        (["rollout.sampling.top_k=20"], "the router drops what"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            on_gpus(*pairs, *changes)
