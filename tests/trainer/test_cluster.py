"""Runs that a Ray cluster has no room for are refused before anything waits for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError, RunFailure
from polyturn.configs.loading.loader import load_config
from polyturn.configs.sizing.nodes import Host, Node
from polyturn.rollout.engines.placement import free_port
from polyturn.trainer.run.cluster import alive_nodes, kept_to, start_ray
from polyturn.trainer.run.machine_checks import check_hosts
from polyturn.trainer.run.preflight import check_compared_parts


def test_nodes_stand_in_the_order_of_their_addresses_and_have_one_each() -> None:
    def entry(address: str, *, alive: bool = True) -> dict[str, object]:
        return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": 2.0}}

    listed = [entry(f"10.0.0.{number}") for number in (10, 2, 1)] + [entry("10.0.0.2", alive=False)]
    assert [node.address for node in alive_nodes(listed)] == ["10.0.0.1", "10.0.0.2", "10.0.0.10"]
    with pytest.raises(ConfigError, match=r"two nodes of the cluster have the address 10\.0\.0\.2"):
        alive_nodes([entry("10.0.0.2"), entry("10.0.0.2")])


def test_a_node_is_used_as_far_as_the_host_file_says_and_refused_where_it_says_more() -> None:
    there = Node(address="10.0.0.2", num_cpus=8, num_gpus=8)
    host = Host(name="10.0.0.2", num_gpus=4, where="hosts:3")
    assert kept_to(host, there).num_gpus == 4
    with pytest.raises(ConfigError, match=r"hosts:3: 10\.0\.0\.2 is said to have 16 GPU\(s\), .* it has 8"):
        kept_to(replace(host, num_gpus=16), there)


def test_an_address_at_which_no_ray_answers_is_refused_at_once() -> None:
    config = load_config("quickstart", [f"cluster.address=127.0.0.2:{free_port('127.0.0.2')}"])
    with pytest.raises(RunFailure, match=r"no Ray answers at 127\.0\.0\.2:\d+: "):
        start_ray(config)
    # Ray would go on trying at this machine's other address.
    config = load_config("quickstart", [f"cluster.address=localhost:{free_port('127.0.0.1')}"])
    with pytest.raises(RunFailure, match=r"Ray takes localhost for this machine's own address"):
        start_ray(config)


def test_weights_in_parts_are_not_compared() -> None:
    check_compared_parts(load_config("quickstart", ["sglang.attn_dp_size=1"]))
    for key in ("attn_dp_size", "ep_size", "expert_parallel_size"):
        with pytest.raises(ConfigError, match=r"set checks\.weights_equal: false"):
            check_compared_parts(load_config("quickstart", [f"sglang.{key}=2"]))


def test_hosts_without_a_cluster_serve_a_plan_alone(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\n")
    with pytest.raises(ConfigError, match=r"only --dry-run can plan for them"):
        check_hosts(load_config("quickstart", [f"cluster.hosts={hosts}"]))
    apart = ["engines.tensor_parallel=2", "engines.ranks_per_node=1"]
    with pytest.raises(ConfigError, match=r"need 1 ranks each on each of 2 nodes"):
        check_hosts(load_config("quickstart", apart))
