"""Over two pretended nodes of a real Ray cluster, processes come where the plan seats them and see their GPUs alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.errors import ConfigError, RunFailure
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.nodes import Node
from polyturn.configs.sizing.placement import Seat, plan_placement
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.launch import Engines, ExternalLauncher
from polyturn.rollout.engines.ray_launcher import RayEngine, RayLauncher
from polyturn.rollout.engines.reservation import Reservation, SharedPath, free_nodes
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.factory import open_client
from polyturn.trainer.ranks.rank import Rank
from polyturn.trainer.ranks.trainer import Ranks
from polyturn.trainer.run.cluster import alive_nodes, reserve, start_ray
from tests.support.engines import weight_version
from tests.support.megatron.publishing import publish
from tests.support.megatron.ranks_pool import RankPool

pytestmark = pytest.mark.stack

FIRST, SECOND = "127.0.0.2", "127.0.0.3"
CUDA = ("engines.device=cuda", "trainer.device=cuda", "trainer.parallel.data=1")


NODE = {"num_cpus": 16, "num_gpus": 8, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A `Cluster` of two nodes with 8 GPUs each, which this process has joined as a run does."""
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # A private Ray of another module has turned addresses off for this process.
        patch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        cluster = Cluster()
        try:
            # Never 127.0.0.1, which Ray takes for the machine's other address.
            cluster.add_node(**NODE, node_ip_address=FIRST, include_dashboard=False)
            cluster.add_node(**NODE, node_ip_address=SECOND)
            start_ray(load_config("quickstart", [f"cluster.address={cluster.address}"]))
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> str:
    """Its address."""
    return str(nodes.address)


class SeeingRank(Rank):
    """A rank that says where it is and which GPUs its CUDA would see."""

    def sees(self) -> tuple[str, str]:
        import ray

        self._see_own_gpu()
        return ray.util.get_node_ip_address(), os.environ["CUDA_VISIBLE_DEVICES"]

    def close(self) -> None: ...


def until(is_so: Callable[[], bool]) -> None:
    """Ray's view of its nodes follows a little later."""
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def planned(seats: Sequence[Seat]) -> list[tuple[str, str]]:
    return [(seat.node.address, ",".join(map(str, seat.gpus))) for seat in seats]


def on_nodes(address: str, *overrides: str) -> RunConfig:
    return load_config("quickstart", [f"cluster.address={address}", *CUDA, *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.parallel={tensor: 2, data: 3}", "engines={num_engines: 2, tensor_parallel: 4}"],
        [
            "trainer.parallel={tensor: 4, pipeline: 3}",
            "engines={num_engines: 3, tensor_parallel: 4, placement: shared}",
        ],
        [
            "trainer.parallel={tensor: 2}",
            "engines={num_engines: 4, tensor_parallel: 2, num_on_trainer_gpus: 1}",
        ],
        ["trainer.parallel={data: 16}", "engines={tensor_parallel: 16, placement: shared}"],
    ],
    ids=["disaggregated", "co-located", "mixed", "engine-on-both"],
)
def test_where_processes_come_is_where_the_plan_seats_them(cluster: str, overrides: list[str]) -> None:
    import ray

    reservation = reserve(on_nodes(cluster, *overrides))
    try:
        seats = list(reservation.placement.seats())
        calls = [
            ray.remote(ray.util.get_node_ip_address)
            .options(num_cpus=0, scheduling_strategy=reservation.on(seat))
            .remote()
            for seat in seats
        ]
        gpus = [",".join(reservation.gpus(seat)) for seat in seats]
        assert list(zip(ray.get(calls), gpus, strict=True)) == planned(seats)
    finally:
        reservation.release()


def test_ranks_see_the_gpus_of_their_seats_alone(cluster: str, tmp_path: Path) -> None:
    # Engines leave one GPU on each node, the last.
    config = on_nodes(cluster, "trainer.parallel.data=2", "engines={num_engines: 2, tensor_parallel: 7}")
    reservation = reserve(config)
    try:
        ranks = Ranks(
            SeeingRank,
            config=config,
            model_path=tmp_path,
            parallel=config.trainer.parallel,
            seats=reservation.placement.policy,
            reservation=reservation,
        )
        assert ranks.on_all(SeeingRank.sees) == planned(reservation.placement.policy)
        ranks.close()
    finally:
        reservation.release()


def test_gpus_that_another_job_holds_are_left_to_it_and_what_is_short_is_named(
    cluster: str, tmp_path: Path
) -> None:
    import ray

    @ray.remote(num_gpus=2, num_cpus=0)
    class Other:
        def gpus(self) -> list[int]:
            return [int(gpu) for gpu in ray.get_gpu_ids()]

    other = Other.options(resources={f"node:{FIRST}": 0.01}).remote()
    try:
        taken = ray.get(other.gpus.remote())
        config = on_nodes(cluster, "trainer.parallel.data=6", "engines.tensor_parallel=8")
        reservation = reserve(config)
        found = [gpu for seat in reservation.placement.policy for gpu in reservation.gpus(seat)]
        assert sorted(map(int, found)) == sorted(set(range(8)) - set(taken))
        # Ray has given these to the run, though no process of Ray's holds them.
        late = Other.options(resources={f"node:{FIRST}": 0.01}).remote()
        assert ray.wait([late.gpus.remote()], timeout=2)[0] == []
        ray.kill(late)
        reservation.release()
        config = on_nodes(
            cluster, "trainer.parallel.data=8", "engines.tensor_parallel=8", "cluster.start_timeout_s=2"
        )
        with pytest.raises(RunFailure, match=rf"{FIRST} has 6 of the 8 GPUs free that the run takes there"):
            reserve(config)
    finally:
        ray.kill(other)


def test_hosts_that_do_not_join_and_paths_that_a_node_does_not_see(cluster: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{SECOND} slots=2\n{FIRST} slots=8\n")
    config = on_nodes(cluster, f"cluster.hosts={hosts}", "engines.tensor_parallel=8")
    reservation = reserve(config)
    assert planned(reservation.placement.policy) == [(SECOND, "0")]
    assert reservation.placement.engines["engines"][0].told == FIRST
    reservation.release()
    path = tmp_path / "model"
    shared = [
        SharedPath(what="cluster.hosts", path=hosts, probe=hosts),
        SharedPath(what="model.path", path=path, probe=path / "config.json"),
    ]
    with pytest.raises(
        RunFailure, match=rf"model\.path: {path} is not seen on node {SECOND}; it must lie on"
    ):
        reserve(config, shared_paths=shared)
    hosts.write_text(f"{FIRST} slots=8\n127.0.0.9\n127.0.0.10\n")
    config = on_nodes(cluster, f"cluster.hosts={hosts}", "cluster.start_timeout_s=0.5")
    with pytest.raises(
        RunFailure, match=r"hosts:2: 127\.0\.0\.9 and 1 more has not joined .* it has 127\.0\.0\.2"
    ):
        reserve(config)


def test_an_engine_whose_node_has_gone_comes_on_one_that_lives(
    nodes: Any, cluster: str, tiny_model: Path, tmp_path: Path
) -> None:
    import ray

    third = "127.0.0.4"
    added = nodes.add_node(**NODE, node_ip_address=third)
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{SECOND} slots=4\n{third} slots=8\n")
    config = on_nodes(cluster, f"cluster.hosts={hosts}", "engines.tensor_parallel=8")
    spec = EngineSpec.from_config(config, model_path=tiny_model, log_directory=tmp_path)
    reservation = reserve(config)

    def where(engine: RayEngine) -> str:
        return str(ray.get(engine._actors[0].rendezvous.remote())).rpartition(":")[0]

    try:
        launcher = RayLauncher(spec, reservation)
        assert where(launcher(0)) == where(launcher(0)) == third
        nodes.remove_node(added)
        until(lambda: third not in {node.address for node in free_nodes()})
        # The second node has not enough free, for the run has some of it.
        moved = launcher(0)
        assert where(moved) == FIRST
        with pytest.raises(ConfigError, match="there is no place for one engine more"):
            launcher(0)
        moved.stop()
        until(lambda: Node(address=FIRST, num_cpus=16, num_gpus=8) in free_nodes())
    finally:
        reservation.release()


async def test_an_engine_on_two_nodes_gives_the_tokens_of_one_and_takes_the_weights_of_two_ranks(
    cluster: str, engines: Engines, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    import ray

    config = load_config(
        "quickstart",
        [
            f"cluster.address={cluster}",
            "engines={tensor_parallel: 2, ranks_per_node: 1, start_timeout_s: 240}",
            "rollout.sampling.seeded=false",
        ],
    )
    alive = alive_nodes(ray.nodes())
    assert alive == [Node(address=address, num_cpus=16, num_gpus=8) for address in (FIRST, SECOND)]
    placement = plan_placement(config, alive)
    (placed,) = placement.engines["engines"]
    assert planned(placed.seats) == [(FIRST, ""), (SECOND, "")]
    reservation = Reservation(placement)
    spec = EngineSpec.from_config(config, model_path=tiny_model, log_directory=tmp_path)
    prompts = [list(range(20, 20 + size)) for size in (3, 17, 40)]
    greedy = SamplingParams(max_tokens=24, temperature=0)

    async def tokens(url: str) -> list[tuple[int, ...]]:
        async with open_client(timeout_s=60) as client:
            policy = SGLangPolicy(client=client, url=url, stop_token_ids=(2,))
            answers = [await policy.generate(prompt_ids=prompt, sampling=greedy) for prompt in prompts]
        return [tuple(answer.token_ids) for answer in answers]

    try:
        with Engines(spec, RayLauncher(spec, reservation)) as running:
            [url] = running.engine_urls
            assert url.startswith(f"http://{FIRST}:")
            of_one = await tokens(engines.engine_urls[0])
            assert await tokens(url) == of_one
            # Of others' engines nothing is started, and nothing is ended.
            with Engines(spec, ExternalLauncher(spec, [url + "/"])) as external:
                assert external.engine_urls == [url]
            assert weight_version(url) == "0"
            ranks = RankPool()
            try:
                for version, (path, layout) in enumerate(
                    ((other_model, ParallelConfig(tensor=2)), (tiny_model, ParallelConfig(pipeline=2))), 1
                ):
                    report, _ = ranks.run(2, publish, path, layout, url, 2, version)
                    with EngineControl(url) as control:
                        assert control.weight_checksums() == dict(report.checksums)
                        assert control.weight_version() == str(version)
                    assert (await tokens(url) == of_one) == (path == tiny_model)
            finally:
                ranks.close()
            assert running.ended() == []
            # The second node answers nobody: that it has died is seen where its process is, and at no request.
            second = running._engines[0]._actors[1]
            ray.kill(second)
            (how,) = running.ended()
            assert how == "the process that holds SGLang server 0 (node rank 1) has died"
        assert sorted(path.name for path in tmp_path.glob("*.log")) == ["engine_0.log", "engine_0_node_1.log"]
    finally:
        reservation.release()
