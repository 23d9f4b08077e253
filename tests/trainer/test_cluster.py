"""Runs that a Ray cluster has no room for are refused before anything waits for it."""

from __future__ import annotations

import os

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.rollout.engines.placement import assigned_gpus
from polyturn.trainer.ranks.rank import Rank
from polyturn.trainer.run.cluster import Node, check_cluster, start_ray


def node(number: int, *, cpus: int = 64, gpus: int = 8) -> Node:
    return Node(address=f"10.0.0.{number}", num_cpus=cpus, num_gpus=gpus)


def on_gpus(*overrides: str):
    return load_config("quickstart", ["engines.device=cuda", "trainer.device=cuda", *overrides])


def test_an_engine_fits_on_one_node_or_not_at_all() -> None:
    config = on_gpus("engines.num_engines=3", "engines.tensor_parallel=8")
    with pytest.raises(ConfigError, match=r"3 engine\(s\) with engines\.tensor_parallel=8"):
        check_cluster(config, [node(1, gpus=12), node(2, gpus=12)])
    check_cluster(config, [node(1), node(2), node(3), node(4)])


def test_engines_and_ranks_together() -> None:
    config = on_gpus("engines.num_engines=2", "engines.tensor_parallel=4")
    with pytest.raises(ConfigError, match="asks for 10 GPUs, but the cluster has"):
        check_cluster(config, [node(1)])
    check_cluster(config, [node(1), node(2)])
    with pytest.raises(ConfigError, match="asks for 2 CPUs, one a rank"):
        check_cluster(config, [node(1, cpus=0), node(2, cpus=0)])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_loopback_is_not_reached_from_another_node(host: str) -> None:
    config = on_gpus(f"engines.host='{host}'")
    check_cluster(config, [node(1)])
    with pytest.raises(ConfigError, match=r"engines\.host is .* leave it out"):
        check_cluster(config, [node(1), node(2)])


def test_nodes_as_ray_describes_them() -> None:
    entry = {"NodeManagerAddress": "10.0.0.7", "Alive": True, "Resources": {"CPU": 8.0, "memory": 1e9}}
    assert Node.of(entry) == Node(address="10.0.0.7", num_cpus=8, num_gpus=0)


@pytest.mark.stack
@pytest.mark.parametrize("hides", [True, False])
def test_actors_of_a_real_cluster_see_gpus_of_their_own(hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    if not hides:
        monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")

    config = on_gpus()

    class Host:
        def gpus(self) -> tuple[str, ...]:
            return assigned_gpus(ray.get_gpu_ids(), 2)

        def own(self) -> str:
            Rank(config=config, model_path="", rank=0)._see_own_gpu()
            return os.environ["CUDA_VISIBLE_DEVICES"]

    start_ray(load_config("quickstart"), num_gpus=4)
    try:
        hosts = [ray.remote(Host).options(num_cpus=0, num_gpus=2).remote() for _ in range(2)]
        assert sorted(ray.get([host.gpus.remote() for host in hosts])) == [("4", "5"), ("6", "7")]
        for host in hosts:
            ray.kill(host)
        ranks = [ray.remote(Host).options(num_cpus=0, num_gpus=1).remote() for _ in range(4)]
        assert sorted(ray.get([rank.own.remote() for rank in ranks])) == ["4", "5", "6", "7"]
    finally:
        ray.shutdown()
