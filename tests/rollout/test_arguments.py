"""The command line of a server, and bad configs that start nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec, SGLangServer, command_line, server_arguments
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
