"""The command line of a server, and bad configs that start nothing."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import pytest

from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import (
    EngineSpec,
    NodePart,
    Router,
    SGLangServer,
    command_line,
    server_arguments,
)
from polyturn.rollout.engines.sglang_main import is_for_cpu


def arguments(device="cpu", **changes):
    index = changes.pop("index", 0)
    return server_arguments(
        make_spec(EnginesConfig(device=device), seed=7, **changes), port=30000, index=index
    )


def make_spec(config, **changes):
    options = {"model_path": Path("/models/m"), "log_directory": Path("/logs"), "dtype": "float32"}
    return EngineSpec(config=config, **options | {"seeded": False} | changes)


def value_of(words, flag):
    return words[words.index(flag) + 1]


def test_flags_from_snake_case():
    words = command_line(
        {"max_total_tokens": 5, "sleep_on_idle": True, "x": False, "y": None, "many": [1, "b"], "a": {"k": 1}}
    )
    assert words == ["--max-total-tokens", "5", "--sleep-on-idle", "--many", "1", "b", "--a", '{"k": 1}']


def test_cpu_flags_only_on_a_cpu():
    on_cpu, on_gpu = arguments("cpu"), arguments("cuda", index=2)
    assert value_of(on_cpu, "--attention-backend") == "torch_native"
    assert "--sleep-on-idle" in on_cpu
    assert "--attention-backend" not in on_gpu
    assert "--max-total-tokens" not in on_gpu
    assert value_of(on_gpu, "--base-gpu-id") == "0"
    assert is_for_cpu(on_cpu)
    assert not is_for_cpu(on_gpu)
    assert is_for_cpu(["--device=cpu"])


def test_free_arguments_override_the_cpu_defaults_and_nothing_that_is_ours():
    words = arguments(sglang={"max_total_tokens": 99, "schedule_policy": "fcfs"})
    assert words.count("--max-total-tokens") == 1
    assert value_of(words, "--max-total-tokens") == "99"
    assert value_of(words, "--schedule-policy") == "fcfs"
    with pytest.raises(ValueError, match=r"'sglang\.port' is not yours to set: set engines\.port"):
        arguments(sglang={"port": 1})


def test_loopback_unless_told_otherwise_and_a_stream_of_its_own_per_engine():
    words = arguments(index=3)
    assert value_of(words, "--host") == "127.0.0.1"
    assert value_of(words, "--random-seed") == "10"
    assert value_of(words, "--weight-version") == "0"


def test_seeded_sampling_is_deterministic_inference():
    assert "--enable-deterministic-inference" in arguments(seeded=True)
    assert "--enable-deterministic-inference" not in arguments(seeded=False)


def test_a_taken_port_starts_nothing(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is taken"):
            spec = make_spec(EnginesConfig(device="cpu", port=port), log_directory=tmp_path)
            Engines(spec, LocalLauncher(spec))
    assert not list(tmp_path.iterdir())


def test_engines_of_one_host_have_ports_of_their_own():
    spec = make_spec(EnginesConfig(device="cpu", num_engines=3))
    launcher = LocalLauncher(spec)
    assert len({launcher(index).port for index in range(3)}) == 3
    server = SGLangServer(spec)
    assert not server.process.alive()
    server.stop()


def test_engines_that_only_read_prompts_are_paired_with_those_that_generate(tmp_path):
    """The router itself reads the command line as it is meant."""
    from sglang_router.router_args import RouterArgs

    config = EnginesConfig(
        num_engines=3,
        num_prefill=1,
        router={"policy": "cache_aware", "options": {"decode_policy": "round_robin"}},
    )
    spec = make_spec(config, num_prefill=1, log_directory=tmp_path)
    servers = [SGLangServer(spec, index=index, gpus=(str(index),)) for index in range(3)]
    modes = [value_of(server.process.command, "--disaggregation-mode") for server in servers]
    assert modes == ["prefill", "decode", "decode"]
    assert int(value_of(servers[0].process.command, "--disaggregation-bootstrap-port")) != servers[0].port
    assert "--disaggregation-bootstrap-port" not in servers[1].process.command
    router = Router(
        config=config.router,
        worker_urls=["http://10.0.0.2:1", "http://10.0.0.3:1"],
        prefill={"http://10.0.0.1:1": 7000},
        request_timeout_s=5,
        log_path=tmp_path / "router.log",
    )
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    read = RouterArgs.from_cli_args(parser.parse_args(list(router.process.command[3:])))
    assert read.pd_disaggregation and read.prefill_urls == [("http://10.0.0.1:1", 7000)]
    assert read.decode_urls == ["http://10.0.0.2:1", "http://10.0.0.3:1"]
    assert (read.policy, read.decode_policy, read.health_check_interval_secs) == (
        "cache_aware",
        "round_robin",
        2,
    )


def test_an_engine_on_several_nodes_and_attention_in_parts():
    config = EnginesConfig(tensor_parallel=32)
    sglang = {
        "attn_dp_size": 32,
        "ep_size": 32,
        "moe_dense_tp_size": 1,
        "enable_dp_lm_head": True,
        "disable_radix_cache": True,
        "moe_a2a_backend": "deepep",
        "deepep_mode": "auto",
        "mem_fraction_static": 0.7,
    }
    part = NodePart(node_rank=3, num_nodes=4, rendezvous="10.0.0.5:20000")
    words = server_arguments(make_spec(config, sglang=sglang), port=1, part=part, rendezvous=part.rendezvous)
    assert {
        flag: value_of(words, flag) for flag in ("--nnodes", "--node-rank", "--dist-init-addr", "--tp-size")
    } == {
        "--nnodes": "4",
        "--node-rank": "3",
        "--dist-init-addr": "10.0.0.5:20000",
        "--tp-size": "32",
    }
    assert (value_of(words, "--attn-dp-size"), value_of(words, "--ep-size")) == ("32", "32")
    assert (value_of(words, "--moe-a2a-backend"), value_of(words, "--deepep-mode")) == ("deepep", "auto")
    assert "--enable-dp-lm-head" in words
    # On one node the ranks meet in a file, and the parts of the attention at a port of loopback.
    whole = SGLangServer(
        make_spec(EnginesConfig(tensor_parallel=2), sglang={"attn_dp_size": 2}), gpus=("0", "1")
    )
    assert value_of(whole.process.command, "--dist-init-addr").startswith("127.0.0.1:")
    assert whole.process.environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"].startswith("file://")
    # All nodes of an engine that reads prompts know one port for those that decode.
    read = SGLangServer(make_spec(config, num_prefill=1), gpus=("0",), part=part)
    assert value_of(read.process.command, "--disaggregation-bootstrap-port") == "20007"
    spread = SGLangServer(make_spec(config), gpus=("0",), part=part)
    assert "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE" not in spread.process.environment
