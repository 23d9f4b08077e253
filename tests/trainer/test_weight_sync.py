"""New weights on a running SGLang server: by broadcast and through disk, stamped, and equal on both sides."""

from __future__ import annotations

import asyncio
import pickle
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file

from polyturn.agents.policy import Generation, SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.configs.schema.trainer import LoraConfig
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.rollout.engines.control import EngineControl, PauseMode
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher, WeightSyncError
from polyturn.trainer.weight_sync.adapters import AdapterPublisher
from polyturn.trainer.weight_sync.barrier import frozen
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from polyturn.trainer.weight_sync.buckets import Flattener, make_buckets
from polyturn.trainer.weight_sync.delta_publisher import DeltaPublisher
from polyturn.trainer.weight_sync.disk import DiskPublisher
from polyturn.trainer.weight_sync.engine_calls import EngineCalls
from polyturn.trainer.weight_sync.mirror import Mirror, files_beside_weights
from polyturn.trainer.weight_sync.patience import Patience
from polyturn.trainer.weight_sync.tally import Tally, TallyBeside
from polyturn.trainer.weight_sync.tensors import ByValue, TensorPublisher, share_of_engine
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
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
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
        yield server


@pytest.fixture(scope="module")
def engine(server: SGLangServer) -> Iterator[EngineControl]:
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
    engine: EngineControl,
    *,
    bucket_bytes: int = 1 << 26,
    flush_cache: bool = True,
    hung_after_s: float = 60.0,
) -> BroadcastPublisher:
    made = BroadcastPublisher(
        tensor_parallel=1,
        address="127.0.0.1",
        backend="gloo",
        bucket_bytes=bucket_bytes,
        timeout_s=60,
        hung_after_s=hung_after_s,
        new_checksums=new_checksums,
        flush_cache=flush_cache,
    )
    made.set_engines([engine.url])
    return made


def publish(publisher: WeightPublisher, weights: Mapping[str, torch.Tensor], *, version: int) -> SyncReport:
    """Both phases."""
    publisher.prepare(weights.items(), version=version)
    return publisher.activate()


def by_changes(directory: Path, model: Path) -> DeltaPublisher:
    return DeltaPublisher(
        mirror=Mirror(directory / "mirror", files_beside_weights(model)),
        is_here=lambda _: True,
        open_mirror=lambda host: Mirror(directory / host, {}),
        block_bytes=256,
        bucket_bytes=4096,
        full_every=50,
        new_checksums=new_checksums,
    )


def by_value() -> TensorPublisher:
    return TensorPublisher(
        carrier=ByValue(), tensor_parallel=1, bucket_bytes=4096, timeout_s=60, new_checksums=new_checksums
    )


@pytest.fixture(params=["broadcast", "broadcast in small buckets", "tensors", "delta", "disk"])
def publisher(
    request: pytest.FixtureRequest, engine: EngineControl, model: Path, tmp_path: Path
) -> Iterator[WeightPublisher]:
    made: WeightPublisher
    match request.param:
        case "disk":
            made = DiskPublisher(model_path=model, directory=tmp_path, new_checksums=new_checksums)
        case "delta":
            made = by_changes(tmp_path, model)
        case "tensors":
            made = by_value()
        case _:
            made = broadcaster(engine, bucket_bytes=1 << 26 if request.param == "broadcast" else 4096)
    if not isinstance(made, BroadcastPublisher):
        made.set_engines([engine.url])
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
    if not isinstance(publisher, DeltaPublisher):
        assert report.num_bytes == sum(tensor.numel() * 4 for tensor in other_weights.values())
    # What can be done while the engines serve is not part of the pause.
    prepares = isinstance(publisher, (DeltaPublisher, DiskPublisher))
    assert (report.pause_seconds < report.seconds) == prepares
    assert weight_version(engine.url) == "17"
    assert engine.weight_checksums() == dict(report.checksums)
    asked = {engine.url: report.checksums} if isinstance(publisher, BroadcastPublisher) else {}
    assert report.served == asked
    assert after != before
    back = publish(publisher, original, version=18)
    assert back.checksums != report.checksums
    assert greedy(engine) == before


class BadEngine(BaseHTTPRequestHandler):
    """Answers control calls, until it is asked for what it is to fail at."""

    fails_at = ""
    hangs = False

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer()

    def _answer(self) -> None:
        failing = self.path == self.fails_at
        if failing and self.hangs:
            time.sleep(3)
            return
        self.send_response(500 if failing else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"message": "out of memory"}' if failing else b'{"weight_version": "5"}')

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None: ...


@contextmanager
def bad_engine(*, fails_at: str, hangs: bool = False) -> Iterator[str]:
    handler = type("Handler", (BadEngine,), {"fails_at": fails_at, "hangs": hangs})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.stack
def test_an_engine_that_fails_in_the_middle_is_named_and_the_rest_take_the_update_again(
    engine: EngineControl, other_weights: dict[str, torch.Tensor]
) -> None:
    """No side is left half: what got a part says so, and is whole after the same version is published once more."""
    publisher = by_value()
    with bad_engine(fails_at="/update_weights_from_tensor") as bad:
        publisher.set_engines([engine.url, bad])
        publisher.prepare(other_weights.items(), version=50)
        with pytest.raises(WeightSyncError, match="1 of the engines did not take a bucket") as failure:
            publisher.activate()
        assert list(failure.value.failures) == [bad] and "out of memory" in failure.value.failures[bad]
        assert pickle.loads(pickle.dumps(failure.value)).failures == failure.value.failures
        assert weight_version(engine.url) == "50 in part"
        publisher.set_engines([engine.url])
        report = publish(publisher, other_weights, version=50)
    assert weight_version(engine.url) == "50"
    assert engine.weight_checksums() == dict(report.checksums)


@pytest.mark.stack
def test_an_engine_that_cannot_be_reached_or_says_another_version_is_named(
    engine: EngineControl, model: Path, tmp_path: Path
) -> None:
    weights = load_file(model / "model.safetensors")
    made = DiskPublisher(model_path=model, directory=tmp_path, new_checksums=None)
    with bad_engine(fails_at="") as bad:
        made.set_engines([engine.url, bad])
        made.prepare(weights.items(), version=60)
        with pytest.raises(WeightSyncError, match=r"take version 60: .*it serves '5', not 60") as failure:
            made.activate()
        assert list(failure.value.failures) == [bad]
    made.set_engines([engine.url, bad])
    made.prepare(weights.items(), version=61)
    with pytest.raises(WeightSyncError, match=r"did not answer"):
        made.activate()


@pytest.mark.stack
def test_a_barrier_has_a_deadline_and_lets_the_others_go_on(engine: EngineControl) -> None:
    with bad_engine(fails_at="/pause_generation", hangs=True) as bad:
        engines = EngineCalls([engine.url, bad], timeout_s=1)
        with (
            pytest.raises(WeightSyncError, match="stop for new weights") as failure,
            frozen(engines, "retract"),
        ):
            raise AssertionError("it was not frozen")
        assert list(failure.value.failures) == [bad]
        engines.close()
    assert len(greedy(engine)) == 12
    engines = EngineCalls([engine.url], timeout_s=30)
    with ThreadPoolExecutor(1) as thread:
        with frozen(engines, "retract"):
            asked = thread.submit(greedy, engine)
            time.sleep(0.3)
            assert not asked.done()
        assert len(asked.result(timeout=60)) == 12


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


@pytest.mark.stack
def test_an_engine_that_hangs_in_the_middle_of_an_update_is_named_long_before_the_deadline(
    server: SGLangServer, engine: EngineControl, other_weights: dict[str, torch.Tensor]
) -> None:
    publisher = broadcaster(engine, bucket_bytes=4096, hung_after_s=1.0)
    publish(publisher, other_weights, version=70)
    processes = psutil.Process(server.process.pid).children(recursive=True)
    (scheduler,) = (process for process in processes if "scheduler" in process.name())

    def stopping() -> Iterator[tuple[str, torch.Tensor]]:
        names = list(other_weights)
        yield from ((name, other_weights[name]) for name in names[:5])
        scheduler.suspend()
        yield from ((name, other_weights[name]) for name in names[5:])

    publisher.prepare(stopping(), version=71)
    try:
        with pytest.raises(WeightSyncError, match=r"did not finish within \d") as failure:
            publisher.activate()
    finally:
        scheduler.resume()
    assert list(failure.value.failures) == [engine.url]
    publisher.close()
    publisher = broadcaster(engine)
    report = publish(publisher, other_weights, version=71)
    assert engine.weight_checksums() == dict(report.checksums)
    publisher.close()


def test_what_waits_to_be_summed_up_is_bounded_and_all_of_it_is_summed_up() -> None:
    may_sum = Event()

    class Slow(EngineChecksums):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            assert may_sum.wait(30)
            super().add(name, tensor)

    tally = Tally(lambda: Slow(EngineLayout(tied_embeddings=False)))
    with TallyBeside(tally, held_bytes=32) as beside, ThreadPoolExecutor(1) as thread:
        for number in range(3):  # the first is under way, two wait: 32 bytes beside the newest
            beside.add([(f"model.norm{number}.weight", torch.full((4,), float(number)))])
        adding = thread.submit(beside.add, [("model.norm3.weight", torch.ones(4))])
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.1)
        may_sum.set()
        adding.result(timeout=30)
        beside.finish()
    report = tally.report(version=1, seconds=1.0, pause_seconds=1.0)
    assert (report.num_tensors, report.num_bytes, len(report.checksums)) == (4, 64, 4)


def test_patience_is_that_of_the_first_update_and_then_of_what_answers_took() -> None:
    patience = Patience(timeout_s=300.0, hung_after_s=20.0)
    patience.note(1.0)
    assert patience.seconds == 300.0
    patience.end_update()
    assert patience.seconds == 20.0
    patience.note(5.0)
    assert patience.seconds == 50.0
    patience.note(40.0)
    assert patience.seconds == 300.0
    with pytest.raises(RuntimeError), patience.noting():
        raise RuntimeError("refused")
    assert Patience(timeout_s=5.0, hung_after_s=60.0).seconds == 5.0


def test_buckets_keep_order_size_and_dtype() -> None:
    tensors = [("a", torch.zeros(4)), ("b", torch.zeros(4)), ("big", torch.zeros(64)), ("c", torch.zeros(2))]
    tensors.append(("half", torch.zeros(2, dtype=torch.bfloat16)))
    buckets = list(make_buckets(tensors, bucket_bytes=32))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["a", "b"], ["big"], ["c"], ["half"]]


def test_buckets_are_flattened_into_two_stretches_by_turns_and_a_single_tensor_is_not_copied() -> None:
    flattener = Flattener()
    first = flattener.flatten([("a", torch.ones(4)), ("b", torch.full((2, 2), 2.0))])
    assert first.data.view(torch.float32).tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert (first.names, first.dtypes, first.shapes) == (["a", "b"], ["float32"] * 2, [[4], [2, 2]])
    second = flattener.flatten([("c", torch.zeros(2)), ("d", torch.zeros(2))])
    assert first.data.view(torch.float32).sum() == 12, "the first is still under way"
    third = flattener.flatten([("e", torch.zeros(3)), ("f", torch.zeros(3))])
    assert third.data.data_ptr() == first.data.data_ptr() != second.data.data_ptr()
    assert flattener.held_bytes == 32 + 16
    alone = torch.ones(64)
    assert flattener.flatten([("big", alone)]).data.data_ptr() == alone.data_ptr()


def test_each_rank_of_an_engine_is_given_what_lies_on_its_own_gpu() -> None:
    """Four ranks of the trainer and two engines of two: by handle each its own, by value all the same."""
    handles = ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert share_of_engine(handles, 0, tensor_parallel=2) == ["gpu0", "gpu1"]
    assert share_of_engine(handles, 1, tensor_parallel=2) == ["gpu2", "gpu3"]
    assert share_of_engine(["all"], 1, tensor_parallel=2) == ["all", "all"]


LORA = LoraConfig(rank=4, alpha=6.0)
TARGETS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def random_adapters(weights: Mapping[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(2):
        for target in TARGETS:
            name = f"model.layers.{layer}.{target}"
            rows, columns = weights[f"{name}.weight"].shape
            prefix = f"base_model.model.{name}"
            found[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(4, columns, generator=generator)
            found[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(rows, 4, generator=generator)
    return found


def merged(
    weights: Mapping[str, torch.Tensor], adapters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    found = dict(weights)
    for name, a in adapters.items():
        if ".lora_A." in name:
            b = adapters[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            found[target] = weights[target] + LORA.scale * b @ a
    return found


def logprobs_by_transformers(
    model: Path, weights: Mapping[str, torch.Tensor], generation: Generation
) -> torch.Tensor:
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.load_state_dict(dict(weights))
    token_ids = torch.tensor([*PROMPT, *generation.token_ids.tolist()])
    with torch.no_grad():
        logits = network(token_ids[None]).logits[0, len(PROMPT) - 1 : -1]
    return logits.log_softmax(-1).gather(1, token_ids[len(PROMPT) :, None])[:, 0]


class NeverEnding(httpx.AsyncClient):
    """Has every request sampled to its last token."""

    async def post(self, url: Any, *, content: Any = None, **options: Any) -> httpx.Response:
        body = orjson.loads(content)
        body["sampling_params"]["ignore_eos"] = True
        return await super().post(url, content=orjson.dumps(body), **options)


@pytest.mark.stack
def test_adapters_alone_are_served_as_the_merged_weights_while_others_are_under_way(
    model: Path, tmp_path: Path
) -> None:
    """A request keeps the adapters it was begun with, and a new one finds nothing of theirs in the prefix cache."""
    weights = load_file(model / "model.safetensors")
    spec = EngineSpec(
        config=EnginesConfig(device="cpu"),
        model_path=model,
        sglang={"max_total_tokens": 4096},
        dtype="float32",
        seeded=False,
        log_directory=tmp_path,
        lora=LORA,
    )
    publisher = AdapterPublisher(
        adapter_config=lambda names: {
            "peft_type": "LORA",
            "r": LORA.rank,
            "lora_alpha": LORA.alpha,
            "target_modules": sorted(target.rpartition(".")[2] for target in TARGETS),
            "bias": "none",
        },
        tensor_parallel=1,
        timeout_s=60,
    )
    adapters = {version: random_adapters(weights, seed=version) for version in range(7, 11)}

    async def play(url: str) -> dict[int, Generation]:
        async with NeverEnding(timeout=60) as client:
            policy = SGLangPolicy(client=client, url=url, stop_token_ids=(), serves_adapters=True)

            def sample(num_tokens: int) -> Awaitable[Generation]:
                sampling = SamplingParams(max_tokens=num_tokens, temperature=1.0)
                return policy.generate(prompt_ids=np.array(PROMPT, dtype=np.int32), sampling=sampling)

            found = {}
            await asyncio.to_thread(publish, publisher, adapters[7], version=7)
            under_way = asyncio.ensure_future(sample(NUM_TOKENS))
            await asyncio.to_thread(wait_until_running, EngineControl(url))
            report = await asyncio.to_thread(publish, publisher, adapters[8], version=8)
            assert report.pause_seconds == 0 and report.num_bytes == 4 * sum(
                map(torch.numel, adapters[8].values())
            )
            found[8] = await sample(12)
            assert not under_way.done()
            found[7] = await under_way
            for version in (9, 10):
                await asyncio.to_thread(publish, publisher, adapters[version], version=version)
                found[version] = await sample(12)
            return found

    with SGLangServer(spec) as server:
        server.wait_ready()
        publisher.set_engines([server.url])
        found = asyncio.run(play(server.url))
        publisher.close()
    assert len(found[7]) == NUM_TOKENS
    for version, generation in found.items():
        assert generation.policy_versions.tolist() == [version] * len(generation)
        wanted = logprobs_by_transformers(model, merged(weights, adapters[version]), generation)
        ours = torch.tensor(generation.logprobs)
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=2e-6)
        others = logprobs_by_transformers(model, weights, generation)
        assert (ours - others).abs().max() > 0.01, "without adapters it is another policy"


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
