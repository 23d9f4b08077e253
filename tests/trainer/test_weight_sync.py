"""New weights on a running SGLang server: by broadcast and through disk, stamped, and equal on both sides."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.rollout.engines.control import EngineControl, PauseMode
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from polyturn.trainer.weight_sync.buckets import make_buckets
from polyturn.trainer.weight_sync.disk import DiskPublisher
from tests.support.engines import weight_version

PROMPT = list(range(20, 60))
NUM_TOKENS = 400


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    directory = make_model("qwen3", tied=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model_path("builtin:tiny-searcher") / name, directory)
    return directory


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineControl]:
    spec = EngineSpec(
        config=EnginesConfig(device="cpu"),
        model_path=model,
        sglang={"max_total_tokens": 4096},
        dtype="float32",
        seeded=False,
        log_directory=tmp_path_factory.mktemp("logs"),
    )
    with SGLangServer(spec) as server:
        server.wait_ready()
        with EngineControl(server.url) as control:
            yield control


@pytest.fixture
def other_weights(model: Path) -> dict[str, torch.Tensor]:
    """Other values under the model's names."""
    weights = load_file(model / "model.safetensors")
    torch.manual_seed(7)
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in weights.items()}


def greedy(engine: EngineControl) -> list[int]:
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
    }
    return httpx.post(f"{engine.url}/generate", json=body, timeout=60).json()["output_ids"]


def new_checksums() -> EngineChecksums:
    return EngineChecksums(EngineLayout(tied_embeddings=False))


def broadcaster(
    engine: EngineControl, *, bucket_bytes: int = 1 << 26, flush_cache: bool = True
) -> BroadcastPublisher:
    made = BroadcastPublisher(
        tensor_parallel=1,
        address="127.0.0.1",
        backend="gloo",
        bucket_bytes=bucket_bytes,
        timeout_s=60,
        new_checksums=new_checksums,
        flush_cache=flush_cache,
    )
    made.set_engines([engine.url])
    return made


def publish(publisher: WeightPublisher, weights: Mapping[str, torch.Tensor], *, version: int) -> SyncReport:
    """Both phases."""
    publisher.prepare(weights.items(), version=version)
    return publisher.activate()


@pytest.fixture(params=["broadcast", "broadcast in small buckets", "disk"])
def publisher(
    request: pytest.FixtureRequest, engine: EngineControl, model: Path, tmp_path: Path
) -> Iterator[WeightPublisher]:
    made: WeightPublisher
    if request.param == "disk":
        made = DiskPublisher(model_path=model, directory=tmp_path, new_checksums=new_checksums)
        made.set_engines([engine.url])
    else:
        made = broadcaster(engine, bucket_bytes=1 << 26 if request.param == "broadcast" else 4096)
    yield made
    made.close()


@pytest.mark.stack
@pytest.mark.catalogue("B46")
@pytest.mark.catalogue("B49")
def test_published_weights_are_served_stamped_and_equal(
    publisher: WeightPublisher, engine: EngineControl, model: Path, other_weights: dict[str, torch.Tensor]
) -> None:
    original = load_file(model / "model.safetensors")
    publish(publisher, original, version=1)
    before = greedy(engine)
    report = publish(publisher, other_weights, version=17)
    # The prompt's prefix is in the cache from before: its keys and values must not be used with the new weights.
    after = greedy(engine)
    assert report.num_tensors == len(other_weights)
    assert report.num_bytes == sum(tensor.numel() * 4 for tensor in other_weights.values())
    assert weight_version(engine.url) == "17"
    assert engine.weight_checksums() == dict(report.checksums)
    assert after != before
    back = publish(publisher, original, version=18)
    assert back.checksums != report.checksums
    assert greedy(engine) == before


@pytest.mark.stack
def test_a_second_publisher_can_take_over_from_one_that_died(
    engine: EngineControl, other_weights: dict[str, torch.Tensor]
) -> None:
    for version in (30, 31):
        publisher = broadcaster(engine)
        publish(publisher, other_weights, version=version)
        # Not closed: its process might have been killed.
        assert weight_version(engine.url) == str(version)


@pytest.mark.stack
def test_an_engine_that_refuses_is_an_error_and_not_a_hang(engine: EngineControl) -> None:
    with pytest.raises(EngineError, match="destroyed does not exist"):
        engine.destroy_weights_update_group("never-joined")
    with pytest.raises(EngineError, match="begin_weight_update"):
        engine.end_weight_update()


def test_buckets_keep_order_size_and_dtype() -> None:
    tensors = [("a", torch.zeros(4)), ("b", torch.zeros(4)), ("big", torch.zeros(64)), ("c", torch.zeros(2))]
    tensors.append(("half", torch.zeros(2, dtype=torch.bfloat16)))
    buckets = list(make_buckets(tensors, bucket_bytes=32))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["a", "b"], ["big"], ["c"], ["half"]]


@pytest.mark.stack
@pytest.mark.catalogue("B47")
@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_an_answer_under_way_goes_on_by_the_new_weights_and_tells_which_drew_what(
    mode: PauseMode, engine: EngineControl, model: Path, other_weights: dict[str, torch.Tensor]
) -> None:
    """Given back and computed anew, the KV is that of the new weights; kept, it is not, and nothing is refused."""
    original = load_file(model / "model.safetensors")
    publisher = broadcaster(engine, flush_cache=mode == "retract")
    publish(publisher, original, version=40)
    engine.flush_cache()
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(answer, engine, num_tokens=NUM_TOKENS)
        wait_until_running(engine)
        engine.pause(mode)
        try:
            report = publish(publisher, other_weights, version=41)
            assert engine.weight_checksums() == dict(report.checksums)
        finally:
            engine.go_on()
        token_ids, logprobs, versions = asked.result(timeout=120)
    publisher.close()
    assert [version for version, _ in versions] == ["40", "41"]
    (_, cut), (_, end) = versions
    assert 0 < cut < end == len(token_ids) == NUM_TOKENS
    scored = logprobs_of(engine, token_ids)
    # The token behind the cut was drawn from what the old weights had computed, or from the new: either is right.
    difference = max(abs(a - b) for a, b in zip(logprobs[cut + 1 :], scored[cut + 1 :], strict=True))
    assert (difference < 1e-3) == (mode == "retract")


def answer(engine: EngineControl, *, num_tokens: int) -> tuple[list[int], list[float], list[tuple[str, int]]]:
    """Tokens, logprobs, and the versions with the ends of their spans."""
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 1, "max_new_tokens": num_tokens, "ignore_eos": True},
        "return_logprob": True,
    }
    found = httpx.post(f"{engine.url}/generate", json=body, timeout=120).json()
    meta = found["meta_info"]
    spans = [(span["version"], span["end"]) for span in meta["weight_versions"]]
    return found["output_ids"], [entry[0] for entry in meta["output_token_logprobs"]], spans


def logprobs_of(engine: EngineControl, token_ids: list[int]) -> list[float]:
    """What the engine's weights say of tokens behind the prompt, in one pass."""
    engine.flush_cache()
    body = {
        "input_ids": [*PROMPT, *token_ids],
        "sampling_params": {"temperature": 1, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": len(PROMPT) - 1,
    }
    found = httpx.post(f"{engine.url}/generate", json=body, timeout=120).json()
    return [entry[0] for entry in found["meta_info"]["input_token_logprobs"][1:]]


def wait_until_running(engine: EngineControl) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if httpx.get(f"{engine.url}/v1/loads", timeout=10).json()["loads"][0]["num_running_reqs"]:
            time.sleep(0.05)  # some tokens more
            return
        time.sleep(0.01)
    raise TimeoutError("the request never ran")
