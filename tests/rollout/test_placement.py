"""Which GPUs an engine sees, where it listens, and under which address others find it."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.configs.addresses import advertised_address, bind_address, http_url
from polyturn.configs.schema.engines import EnginesConfig, RouterConfig
from polyturn.rollout.engines.launch import LocalLauncher
from polyturn.rollout.engines.placement import assigned_gpus, claim_port, gpus_of_engine, is_free
from polyturn.rollout.engines.server import EngineSpec, Router, SGLangServer


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6 loopback")


@given(
    num_engines=st.integers(1, 6),
    tensor_parallel=st.integers(1, 4),
    visible=st.lists(st.integers(0, 99), min_size=24, max_size=24, unique=True),
)
def test_engines_of_a_host_share_out_what_is_visible(
    num_engines: int, tensor_parallel: int, visible: list[int]
) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in visible)}
    shares = [gpus_of_engine(index, tensor_parallel, environment) for index in range(num_engines)]
    assert all(len(share) == tensor_parallel for share in shares)
    taken = [gpu for share in shares for gpu in share]
    assert taken == [str(gpu) for gpu in visible[: num_engines * tensor_parallel]]


def test_gpus_by_number_where_nothing_hides_any_and_by_name_where_something_does() -> None:
    assert gpus_of_engine(1, 2, {}) == ("2", "3")
    assert gpus_of_engine(1, 1, {"CUDA_VISIBLE_DEVICES": "GPU-aa, MIG-bb"}) == ("MIG-bb",)
    with pytest.raises(ValueError, match=r"engine 1 needs the GPUs 2 to 3 .* shows 3"):
        gpus_of_engine(1, 2, {"CUDA_VISIBLE_DEVICES": "4,5,6"})
    with pytest.raises(ValueError, match="shows 0"):
        gpus_of_engine(0, 1, {"CUDA_VISIBLE_DEVICES": ""})


def test_what_ray_assigned_is_the_engines_own_in_the_hosts_order() -> None:
    assert assigned_gpus([10, 9], 2) == ("9", "10")
    assert assigned_gpus(["GPU-b", "GPU-a"], 2) == ("GPU-a", "GPU-b")
    for wrong in ([], [1], [1, 2, 3]):
        with pytest.raises(ValueError, match="to an actor that asked for 2"):
            assigned_gpus(wrong, 2)


def server(tmp_path: Path, **changes) -> SGLangServer:
    config = EnginesConfig(device="cuda", tensor_parallel=2, host=changes.pop("host", None))
    return SGLangServer(make_spec(config, tmp_path), **changes)


def make_spec(config: EnginesConfig, tmp_path: Path) -> EngineSpec:
    return EngineSpec(
        config=config, model_path=tmp_path, dtype="bfloat16", seeded=False, log_directory=tmp_path
    )


def command_of(made: SGLangServer) -> dict[str, str]:
    words = made.process.command
    return {flag: words[words.index(flag) + 1] for flag in ("--base-gpu-id", "--host", "--port")}


def test_an_engine_sees_its_own_gpus_and_counts_them_from_0(tmp_path: Path) -> None:
    second = server(tmp_path, gpus=("1", "3"), index=1)
    assert command_of(second)["--base-gpu-id"] == "0"
    assert second.process.environment["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_engines_without_ray_split_what_the_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    config = EnginesConfig(device="cuda", tensor_parallel=2, num_engines=2)
    launcher = LocalLauncher(make_spec(config, tmp_path))
    engines = [launcher(index) for index in range(2)]
    shown = [engine.process.environment["CUDA_VISIBLE_DEVICES"] for engine in engines]
    assert shown == ["4,5", "6,7"]
    assert {command_of(engine)["--base-gpu-id"] for engine in engines} == {"0"}


def test_bound_and_advertised_addresses_are_two_things(tmp_path: Path) -> None:
    own = "127.0.0.1"
    for host, bound, advertised in (
        (None, own, own),
        ("0.0.0.0", "0.0.0.0", own),
        ("localhost", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2", "127.0.0.2"),
    ):
        made = server(tmp_path, host=host, gpus=("0", "1"), own_address=own)
        assert command_of(made)["--host"] == bound
        assert made.url == f"http://{advertised}:{made.port}"


@given(st.ip_addresses(), st.ip_addresses())
def test_nothing_unspecified_is_ever_advertised(bound, own) -> None:
    told = advertised_address(str(bound), own=str(own))
    assert told == (str(own) if bound.is_unspecified else str(bound))
    assert told not in ("0.0.0.0", "::") or own.is_unspecified
    url = httpx.URL(http_url(told, 8000))
    assert (url.host, url.port) == (told, 8000)


def test_names_are_resolved_and_brackets_are_taken_off() -> None:
    assert bind_address("[::1]") == "::1"
    assert bind_address("localhost") == "127.0.0.1"
    for wrong in ("", "no such host", "nowhere.invalid", "1.2.3.4.5", "a" * 70, "☃.invalid"):
        with pytest.raises(ValueError, match="is no address, and no name that this machine can resolve"):
            bind_address(wrong)


def test_an_address_of_another_machine_is_not_called_taken() -> None:
    # TEST-NET-1 of RFC 5737 belongs to nobody.
    with pytest.raises(ValueError, match=r"engines\.host: 192\.0\.2\.1 is no address of this machine"):
        claim_port("192.0.2.1", 0, section="engines")
    with pytest.raises(ValueError, match=r"engines\.host: 192\.0\.2\.1 is no address of this machine"):
        claim_port("192.0.2.1", 30000, section="engines")


@needs_ipv6
def test_ports_of_ipv6_hosts() -> None:
    port = claim_port("[::1]", 0, section="engines")
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        assert not is_free("::1", port)
    assert is_free("[::1]", port)


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0", pytest.param("::1", marks=needs_ipv6)])
def test_the_router_listens_where_it_is_told_and_is_found_there(host: str, tmp_path: Path) -> None:
    router = Router(
        config=RouterConfig(policy="round_robin", host=host),
        worker_urls=[],
        request_timeout_s=5,
        log_path=tmp_path / "router.log",
    )
    router.start()
    try:
        router.process.wait_until(f"{router.url}/liveness", timeout_s=180)
    finally:
        router.stop()
    assert "0.0.0.0" not in router.url
