"""The real SGLang server and router: what they answer and leave behind, and what is collected and evaluated with them.

One file, so that its tests share one engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import ray
from safetensors.torch import load_file

from polyturn.agents.episode import BEST_OF_SAMPLES, Episode, Outcome
from polyturn.agents.ledger import Ledger
from polyturn.agents.policies.named import make_policy
from polyturn.agents.policy import PolicyFault, SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.endpoint import ChatEndpoint
from polyturn.configs.schema.engines import EnginesConfig, TeacherConfig
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.faults import EnvironmentFault, UserFault
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task
from polyturn.envs.registry import make
from polyturn.envs.rewards.factory import make_reward
from polyturn.envs.tasks.rates import read_difficulties
from polyturn.envs.users.model import ModelUser, shared_chat, user_endpoint
from polyturn.envs.users.user import Briefing
from polyturn.rollout import probe
from polyturn.rollout.collection import play_groups
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.groups import judged
from polyturn.rollout.engines.memory import EngineMemory
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
from polyturn.rollout.evaluation.held_out import evaluate
from polyturn.rollout.factory import build_player, open_client, open_policy
from polyturn.rollout.groups import PromptCursor
from polyturn.rollout.named_play import ModelEpisodes, named_player
from polyturn.rollout.player import offer_engines
from polyturn.rollout.remote_players import RemotePlayers
from polyturn.rollout.scheduler import Frontier
from polyturn.rollout.source import RolloutStart
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.worker import RolloutWorker
from polyturn.tools.chat.client import ChatClient
from polyturn.tools.search.retrieval import SEARCH_SPEC
from polyturn.trainer.credit.estimates import make_samples
from tests.support.engines import engine_checksums, weight_version
from tests.support.samples import sample_of

pytestmark = pytest.mark.stack

PROMPT = list(range(20, 60))


async def generate(url, prompts, sampling):
    """One request per prompt, all at once."""
    async with open_client(timeout_s=60) as client:
        policy = SGLangPolicy(client=client, url=url, stop_token_ids=(2,))
        return await asyncio.gather(
            *(
                policy.generate(prompt_ids=prompt, sampling=params)
                for prompt, params in zip(prompts, sampling, strict=True)
            )
        )


@pytest.mark.catalogue("B25")
async def test_logprobs_agree_with_transformers(engines, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    prompts = [PROMPT[: 3 + 7 * n] for n in range(5)]
    generations = await generate(
        engines.url, prompts, [SamplingParams(max_tokens=24, seed=n) for n in range(5)]
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for prompt, generation in zip(prompts, generations, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *generation.token_ids]])).logits[0, len(prompt) - 1 : -1]
        reference = torch.log_softmax(logits, -1).gather(
            1, torch.tensor(generation.token_ids, dtype=torch.long)[:, None]
        )[:, 0]
        difference = (reference - torch.tensor(generation.logprobs)).abs().max().item()
        assert difference <= 1e-4
        assert set(generation.policy_versions) == {0}


@pytest.mark.catalogue("B23", "B25")
async def test_logprobs_are_those_at_the_sampling_temperature(engines, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    sampling = SamplingParams(max_tokens=24, seed=1, temperature=0.7)
    [generation] = await generate(engines.url, [PROMPT], [sampling])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *generation.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    reference = torch.log_softmax(logits / 0.7, -1).gather(
        1, torch.tensor(generation.token_ids, dtype=torch.long)[:, None]
    )[:, 0]
    assert (reference - torch.tensor(generation.logprobs)).abs().max().item() <= 1e-4


DRAWN = [{"top_p": 0.7, "top_k": 20}, {"top_p": 0.9, "top_k": 300}, {"top_k": 2}, None]
"""How each turn of an episode is sampled; None: from the whole vocabulary."""


@pytest.mark.catalogue("B24", "B25")
async def test_engine_and_trainer_agree_over_what_a_token_was_drawn_from(engines, tiny_model):
    from tests.support.megatron.policies import make_policy

    ledger, [url] = Ledger(), engines.engine_urls
    async with open_client(timeout_s=60) as client:
        policy = SGLangPolicy(client=client, url=url, stop_token_ids=(2,))
        for turn, filters in enumerate(DRAWN):
            ledger.append_observation(PROMPT[turn:])
            sampling = SamplingParams(max_tokens=24, seed=turn, temperature=0.8)
            if filters is not None:
                sampling = replace(sampling, **filters, records_support=True)
            ledger.append_generation(await policy.generate(prompt_ids=ledger.token_ids, sampling=sampling))
        behind_router = SGLangPolicy(client=client, url=engines.url, stop_token_ids=(2,))
        with pytest.raises(PolicyFault, match="a router in front of it may drop"):
            await behind_router.generate(
                prompt_ids=ledger.token_ids, sampling=replace(sampling, top_k=20, records_support=True)
            )
    segment = ledger.to_segment()
    assert segment.support is not None
    sizes = [segment.support.sizes[segment.sampled & (segment.turns == turn)] for turn in range(4)]
    assert 1 <= sizes[0].min() <= sizes[0].max() <= 20 < sizes[1].max() < 300
    assert (sizes[2] == 2).all() and (sizes[3] == 0).all()
    sample = sample_of(segment)
    trainer = make_policy(tiny_model)
    try:
        column, unrestricted = (
            trainer.logprobs([each], temperature=0.8)[0] for each in (sample, replace(sample, support=None))
        )
    finally:
        trainer.close()
    assert abs(column - sample.behavior_logprobs)[sample.sampled].max() < 1e-4
    assert abs(unrestricted - sample.behavior_logprobs)[sample.sampled].max() > 0.1


async def test_an_engines_own_chat_endpoint_is_read_as_any_other(engines):
    """Whole and as a stream, as a policy and as a user of an environment ask it."""
    [url] = engines.engine_urls
    question = [{"role": "user", "content": "Where was she born?"}]
    answers = {}
    for stream in (False, True):
        endpoint = ChatEndpoint(url=f"{url}/v1", model="m", temperature=0.0, max_tokens=12, stream=stream)
        async with contextlib.aclosing(ChatClient(endpoint)) as client:
            answers[stream] = await client.ask(question, [SEARCH_SPEC])
            full = await client.ask([{"role": "user", "content": "where " * 40_000}])
            assert full.finish_reason == "context", full
    assert answers[False].content == answers[True].content != ""
    options = {"url": f"{url}/v1", "model": "m", "max_tokens": 4}
    user = ModelUser(Briefing(role="a guest", requests=("A room.",)), shared_chat(user_endpoint(options)))
    with pytest.raises(UserFault, match=r"has no whole message \(finish_reason length\)"):
        await asyncio.to_thread(user.opening)
    for answer in answers.values():
        assert answer.usage is not None and answer.usage.prompt_tokens > 10
        assert answer.finish_reason == ("length" if answer.usage.completion_tokens == 12 else "stop")


async def test_the_filters_of_an_evaluation_pass_the_router(engines):
    """Each leaves one token: whatever the seed, it is the likeliest."""
    greedy = SamplingParams(max_tokens=24, seed=0, temperature=0.0)
    alone = [
        SamplingParams(max_tokens=24, seed=1, top_k=1),
        SamplingParams(max_tokens=24, seed=2, top_p=1e-6),
    ]
    expected, *found = await generate(engines.url, [PROMPT] * 3, [greedy, *alone])
    for generation in found:
        assert generation.token_ids.tolist() == expected.token_ids.tolist()
        assert generation.support is None


@pytest.mark.catalogue("B24", "B47")
async def test_what_was_aborted_tells_what_its_tokens_were_drawn_from(engines, control):
    sampling = [
        SamplingParams(max_tokens=400, seed=seed, top_k=20, records_support=True) for seed in range(8)
    ]
    for wait_s in (0.05, 0.1, 0.2, 0.4, 0.8):
        pending = asyncio.create_task(generate(control.url, [PROMPT] * len(sampling), sampling))
        await asyncio.sleep(wait_s)
        await asyncio.to_thread(control._post, "/pause_generation", {"mode": "abort"})
        await asyncio.to_thread(control._post, "/continue_generation", {})
        aborted = [each for each in await pending if each.finish_reason == "abort" and len(each)]
        if aborted:
            break
    assert aborted
    for each in aborted:
        assert each.support is not None and (each.support.sizes == 20).all()


@pytest.mark.catalogue("B50")
async def test_a_seed_repeats_alone_and_in_a_batch(engines):
    sampling = SamplingParams(max_tokens=24, seed=123)
    [alone] = await generate(engines.url, [PROMPT], [sampling])
    crowd = [SamplingParams(max_tokens=24, seed=seed) for seed in range(12)]
    batch = await generate(
        engines.url, [PROMPT, *(PROMPT[: 5 + n] for n in range(11)), PROMPT], [sampling, *crowd[1:], crowd[0]]
    )
    assert batch[0].token_ids.tolist() == alone.token_ids.tolist()
    assert batch[-1].token_ids.tolist() != alone.token_ids.tolist()


@pytest.mark.catalogue("B49")
def test_checksums_of_the_engine_are_those_of_its_files(control, tiny_model):
    """Fused projections and a vocabulary that the engine pads included."""
    tensors = load_file(tiny_model / "model.safetensors")
    assert control.weight_checksums() == engine_checksums(tensors, tied_embeddings=False)
    changed = dict(tensors)
    changed["model.layers.1.self_attn.k_proj.weight"] = (
        tensors["model.layers.1.self_attn.k_proj.weight"] + 1e-7
    )
    ours, theirs = engine_checksums(changed, tied_embeddings=False), control.weight_checksums()
    assert [name for name in ours if ours[name] != theirs[name]] == [
        "model.layers.1.self_attn.qkv_proj.weight"
    ]


@pytest.mark.catalogue("B46")
async def test_an_update_changes_version_weights_and_cached_prefixes(
    engines, control, tiny_model, other_model
):
    """The same prompt before and after an update: nothing of the old weights' KV cache is used."""
    sampling = SamplingParams(max_tokens=8, seed=5)
    try:
        [before] = await generate(engines.url, [PROMPT], [sampling])
        control.update_weights_from_disk(model_path=str(other_model), weight_version=7)
        [after] = await generate(engines.url, [PROMPT], [sampling])
        control.flush_cache()
        [without_cache] = await generate(engines.url, [PROMPT], [sampling])
        assert weight_version(control.url) == "7"
        tensors = load_file(other_model / "model.safetensors")
        assert control.weight_checksums() == engine_checksums(tensors, tied_embeddings=False)
    finally:
        control.update_weights_from_disk(model_path=str(tiny_model), weight_version=0)
    assert (set(before.policy_versions), set(after.policy_versions)) == ({0}, {7})
    assert before.token_ids.tolist() != after.token_ids.tolist()
    assert after.token_ids.tolist() == without_cache.token_ids.tolist()
    assert after.logprobs == pytest.approx(without_cache.logprobs, abs=1e-5)


@pytest.mark.catalogue("B47")
async def test_pause_holds_requests_and_continue_lets_them_end(engines, control):
    # One of many is long enough to be under way when the pause comes, however late that is.
    sampling = [SamplingParams(max_tokens=400, seed=seed) for seed in range(16)]
    pending = asyncio.create_task(generate(engines.url, [PROMPT] * len(sampling), sampling))
    await asyncio.sleep(0.05)
    await asyncio.to_thread(control._post, "/pause_generation", {"mode": "in_place"})
    await asyncio.sleep(0.3)
    assert not pending.done()
    assert engines.url
    async with open_client(timeout_s=5) as client:
        assert (await client.get(f"{engines.engine_urls[0]}/health")).status_code == 200, (
            "a pause is no illness"
        )
    await asyncio.to_thread(control._post, "/continue_generation", {})
    assert all(generation.finish_reason in ("stop", "length") for generation in await pending)


async def test_memory_is_released_under_requests_and_comes_back(engines, control, tiny_model):
    """Released as it is, with requests under way or new ones, the server would end."""
    memory = EngineMemory([control], num_sharing=1, timeout_s=60)
    greedy = [SamplingParams(max_tokens=12, temperature=0.0)]
    [expected] = await generate(engines.url, [PROMPT], greedy)
    sampling = [SamplingParams(max_tokens=400, seed=seed) for seed in range(16)]
    under_way = asyncio.create_task(generate(control.url, [PROMPT] * len(sampling), sampling))
    while not (await asyncio.to_thread(control.load)).num_running:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(memory.release)
    assert control.released == {"weights", "kv_cache", "cuda_graph"}
    later = asyncio.create_task(generate(engines.url, [PROMPT], greedy))
    await asyncio.to_thread(memory.release)
    await asyncio.to_thread(memory.resume_weights)
    # What cannot be resumed twice is not asked for twice.
    await asyncio.to_thread(memory.resume_weights)
    await asyncio.to_thread(control.update_weights_from_disk, model_path=str(tiny_model), weight_version=0)
    assert not later.done(), "it waits, behind the router that sees nothing of it"
    await asyncio.to_thread(memory.resume_cache)
    [answer] = await later
    assert answer.token_ids.tolist() == expected.token_ids.tolist() and control.released == frozenset()
    # What ran was cut off; what was not yet there waited, too.
    assert "abort" in {generation.finish_reason for generation in await under_way}


def test_an_engine_that_does_not_give_its_memory_up_is_named(control):
    with EngineControl("http://127.0.0.1:9") as nobody:
        with pytest.raises(EngineError, match=r"127.0.0.1:9 has not given its memory up: .* did not answer"):
            EngineMemory([nobody], num_sharing=1, timeout_s=5).release()
        with pytest.raises(EngineError, match=r"taken the memory of its KV back: .*engines.turn_timeout_s"):
            EngineMemory([nobody], num_sharing=1, timeout_s=0).resume_cache()
    others = EngineMemory([control], num_sharing=0, timeout_s=60)
    others.release()
    assert control.released == frozenset(), "it has a GPU of its own, and only stands still"
    others.resume_weights()
    others.resume_cache()


def test_a_refused_control_call_says_why(control):
    with pytest.raises(EngineError, match=r"answered 400: .*begin_weight_update"):
        control.update_weights_from_distributed(names=[], dtypes=[], shapes=[], group_name="none")
    with EngineControl("http://127.0.0.1:9") as nobody, pytest.raises(EngineError, match="did not answer"):
        nobody.flush_cache()


def test_everything_listens_on_loopback_only(engines):
    pids = [server.process.pid for server in engines.by_number.values()]
    listening = set()
    for pid in pids:
        for process in psutil.Process(pid).children(recursive=True):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listening.add(connection.laddr.ip)
    assert listening == {"127.0.0.1"}
    router = psutil.Process(engines._router.process.pid)
    addresses = {
        connection.laddr.ip
        for process in router.children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_a_server_that_dies_at_start_says_why(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    spec = EngineSpec(
        config=EnginesConfig(device="cpu", start_timeout_s=120),
        model_path=tmp_path,
        dtype="float32",
        seeded=False,
        log_directory=tmp_path,
    )
    with (
        SGLangServer(spec) as server,
        pytest.raises(EngineError, match=r"(?s)SGLang server 0 ended with status .*model"),
    ):
        server.wait_ready()


DRIVER = """
import sys
from pathlib import Path
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.server import EngineSpec, SGLangServer
spec = EngineSpec(config=EnginesConfig(device="cpu"), model_path=Path(sys.argv[1]), dtype="float32", seeded=False,
                  log_directory=Path(sys.argv[2]))
with SGLangServer(spec) as server:
    server.wait_ready()
    print(server.process.pid, server.url, flush=True)
    sys.stdin.read()
"""


def test_kill_9_of_the_driver_leaves_no_server(tiny_model, tmp_path):
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny_model), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    pid, url = driver.stdout.readline().split()
    supervisor = psutil.Process(int(pid))
    processes = [supervisor, *supervisor.children(recursive=True)]
    assert {"sglang::scheduler", "sglang::detokenizer"} <= {process.name() for process in processes}
    segments = {path for process in processes for path in shared_memory(process)}
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health", trust_env=False)
    assert segments
    assert not [path for path in segments if path.exists()]


def shared_memory(process: psutil.Process) -> list[Path]:
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    except OSError:
        return []
    return [Path(line.split()[-1]) for line in maps if "/dev/shm/sgl" in line]


async def test_sampling_ends_behind_a_stop_string_which_stays(engines, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt, sampling = list(range(20, 60)), SamplingParams(max_tokens=40, seed=3)
    async with open_client(timeout_s=60) as client:
        free = await SGLangPolicy(client=client, url=engines.url, stop_token_ids=()).generate(
            prompt_ids=prompt, sampling=sampling
        )
        assert len(free.token_ids) == 40
        # A letter of one token that was not sampled before.
        text = [tokenizer.decode([token]) for token in free.token_ids]
        letters = (part if part.isascii() and part.isprintable() else "" for part in text)
        at = next(i for i, part in enumerate(letters) if part and i >= 3 and part not in "".join(text[:i]))
        stop = text[at]
        stopped = await SGLangPolicy(
            client=client, url=engines.url, stop_token_ids=(), stop_strings=("</never>", stop)
        ).generate(prompt_ids=prompt, sampling=sampling)
    assert stopped.token_ids.tolist() == free.token_ids[: at + 1].tolist()
    assert stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == at + 1


def run_config(model: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "environment": {
                "id": "polyturn/TwoHopSearch-v0",
                "options": {"num_people": 20, "num_employers": 10},
                "max_turns": 3,
                "max_tokens_per_turn": 16,
                "max_tokens_per_episode": 2000,
            },
            "model": {"path": str(model), "dtype": "float32"},
            "rollout": {
                "prompts_per_step": 4,
                "samples_per_prompt": 3,
                "max_concurrent_requests": 5,
                "sampling": {"seeded": True},
            },
            "engines": {"device": "cpu"},
            "trainer": {"num_steps": 1, "global_batch_size": 12},
        }
    )


async def collect(config, model, url, on_episode=None):
    player = build_player(config, model_path=model, split="train", sampling=SamplingParams())
    prompts = PromptCursor(len(player.tasks), seed=0).take(config.rollout.prompts_per_step)
    try:
        async with open_policy(config, model_path=model, url=url) as policy:
            return await play_groups(
                player,
                prompts,
                samples_per_prompt=config.rollout.samples_per_prompt,
                policy=policy,
                on_episode=on_episode,
            )
    finally:
        player.close()


@pytest.mark.catalogue("B50")
async def test_a_seeded_collection_repeats_and_is_kept(engines, tiny_model, tmp_path):
    config = run_config(tiny_model)
    store = TrajectoryStore(tmp_path)
    groups = await collect(config, tiny_model, engines.url, lambda episode: store.journal(1, episode))
    again = await collect(config, tiny_model, engines.url)
    first = [episode for group in groups for episode in group.episodes]
    second = [episode for group in again for episode in group.episodes]
    assert len(first) == 12
    assert [group.num_dropped for group in groups] == [0, 0, 0, 0]
    for one, other in zip(first, second, strict=True):
        assert one.episode_id == other.episode_id
        assert one.segments[0].token_ids.tolist() == other.segments[0].token_ids.tolist()
        assert one.segments[0].logprobs == pytest.approx(other.segments[0].logprobs, abs=1e-4)
        versions = itertools.compress(one.segments[0].policy_versions, one.segments[0].sampled)
        assert set(versions) == {0}
        assert one.timings.generate_s > 0
    tokens = {episode.segments[0].token_ids.tobytes() for group in groups for episode in group.episodes}
    assert len(tokens) == 12, "samples of one prompt have seeds of their own"
    journaled = {episode.episode_id: episode for episode in store.journaled(1)}
    assert [journaled[episode.episode_id] for episode in first] == first
    store.write_step(1, first)
    assert store.read_step(1) == first


async def test_evaluation_of_a_random_model(engines, tiny_model):
    config = run_config(tiny_model)
    player = build_player(config, model_path=tiny_model, split="heldout", sampling=SamplingParams())
    async with open_policy(config, model_path=tiny_model, url=engines.url) as policy:
        result = await evaluate(player=player, policy=policy, num_tasks=8)
    player.close()
    assert (result.num_tasks, result.num_episodes, result.num_failed) == (8, 8, 0)
    assert result.mean == 0.0
    assert 0.0 == result.low < result.high < 0.5


async def test_the_best_of_a_served_models_episodes_is_no_data_to_train_on(engines, tiny_model):
    config = run_config(tiny_model)
    player, episodes = named_player(config), []
    choice = {"policy": "model", "num_samples": 2, "by": "grade"}
    async with open_policy(config, model_path=tiny_model, url=engines.url) as policy:
        model = ModelEpisodes(config, model_path=tiny_model, policy=policy, sampling=SamplingParams())
        best = make_policy("best_of", choice, model=model)
        await evaluate(player=player, policy=best, num_tasks=2, on_episode=episodes.append)
        offer_engines(told := make("polyturn/CustomerService-v0"), policy)
        assert told.engine_urls == policy.chat_urls == (f"{engines.url}/v1",)
    player.close()
    assert [episode.metrics[BEST_OF_SAMPLES] for episode in episodes] == [2.0, 2.0]
    assert all(episode.num_sampled_tokens for episode in episodes)
    with pytest.raises(ValueError, match="is the best of 2 samples"):
        make_samples(episodes)


@pytest.fixture
def private_ray():
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


async def test_rollout_workers_play_what_one_process_plays_and_one_that_dies_loses_nothing(
    engines, tiny_model, private_ray
):
    """The same episodes as in this process; of a worker that is killed, what had ended stays and the rest is played."""
    config = run_config(tiny_model)
    config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"num_workers": 2, "samples_per_prompt": 6})}
    )
    local = build_player(config, model_path=tiny_model, split="train", sampling=SamplingParams())
    prompts = PromptCursor(len(local.tasks), seed=0).take(4)
    players = RemotePlayers(local, config, model_path=tiny_model, url=engines.url)
    await players.wait_ready()
    kept, killed = [], []

    async def keep(episode):
        kept.append(episode)
        if len(kept) == 3:
            worker = next(
                process
                for process in psutil.Process().children(recursive=True)
                if process.name().startswith("ray::PlayerActo")
            )
            killed.append(worker.pid)
            worker.kill()

    try:
        groups = await play_groups(players, prompts, samples_per_prompt=6, policy=None, keep=keep)
        traffic = await players.take_traffic()
    finally:
        await asyncio.to_thread(players.close)
    assert sum(one.num_requests for of_process in traffic for one in of_process.values()) > 0
    episodes = [episode for group in groups for episode in group.episodes]
    assert killed and [group.num_dropped for group in groups] == [0, 0, 0, 0]
    assert [group.num_retries for group in groups] == [0, 0, 0, 0], (
        "the death of a worker is no failed attempt"
    )
    assert len(kept) == len({episode.episode_id for episode in kept}) == len(episodes) == 24
    here = await collect(
        config.model_copy(update={"rollout": config.rollout.model_copy(update={"num_workers": 0})}),
        tiny_model,
        engines.url,
    )
    alone = {episode.episode_id: episode for group in here for episode in group.episodes}
    assert all(
        episode.segments[0].token_ids.tolist() == alone[episode.episode_id].segments[0].token_ids.tolist()
        for episode in episodes
    )


async def test_answers_that_a_rest_cuts_off_go_on_from_their_tokens_by_the_new_version(
    engines, control, tiny_model, tmp_path
):
    """`play_while_training: false`. What was sampled before the rest is kept, and what comes behind goes on from it.

    The weights of both versions are the same.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = run_config(tiny_model)
    rollout = {
        "prompts_per_step": 2,
        "samples_per_prompt": 2,
        "max_staleness": 1,
        "play_while_training": False,
    }
    config = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update=rollout),
            "trainer": config.trainer.model_copy(update={"num_steps": 2}),
            "environment": config.environment.model_copy(update={"max_tokens_per_turn": 48, "max_turns": 2}),
        }
    )

    has_ended = threading.Event()

    def rest(worker: RolloutWorker) -> None:
        """As a step of the trainer does, while others are under way."""
        assert has_ended.wait(timeout=60)
        worker.rest()
        control.pause("abort")
        control.update_weights_from_disk(model_path=str(tiny_model), weight_version=1)
        control.go_on()
        worker.go_on()

    def play() -> list[Episode]:
        with (
            contextlib.closing(TrajectoryStore(tmp_path)) as store,
            RolloutWorker(
                config, model_path=tiny_model, url=engines.url, engine_urls=engines.engine_urls
            ) as worker,
            ThreadPoolExecutor(1) as trainer,
        ):
            worker.begin(RolloutStart(step=0, version=0, frontier=Frontier()), store)
            training = trainer.submit(rest, worker)
            first = worker.take(on_episode=lambda _: has_ended.set())
            training.result()
            worker.advance(version=1, engine_step=1, engine_version=1)
            second = worker.take(on_episode=lambda _: None)
        assert first is not None and second is not None
        return [episode for taken in (first, second) for group in taken.groups for episode in group.episodes]

    try:
        rested = await asyncio.to_thread(play)
    finally:
        control.update_weights_from_disk(model_path=str(tiny_model), weight_version=0)
    assert {episode.outcome for episode in rested} <= {Outcome.COMPLETED, Outcome.TRUNCATED}
    whole = await collect(
        config.model_copy(update={"rollout": config.rollout.model_copy(update={"prompts_per_step": 4})}),
        tiny_model,
        engines.url,
    )
    at_once = {episode.episode_id: episode for group in whole for episode in group.episodes}
    assert len(rested) == len(at_once) == 8
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    num_cut_off = 0
    for episode in rested:
        (ours,), (theirs,) = episode.segments, at_once[episode.episode_id].segments
        (renewed,) = np.nonzero(ours.policy_versions == 1)
        num_kept = renewed[0] if len(renewed) else len(ours)
        kept = slice(0, num_kept)
        assert ours.token_ids[kept].tolist() == theirs.token_ids[kept].tolist()
        assert set(ours.policy_versions[num_kept:][ours.sampled[num_kept:]].tolist()) <= {1}
        num_cut_off += 0 < num_kept < len(ours) and bool(ours.sampled[num_kept - 1])
        with torch.no_grad():
            logits = model(torch.tensor(ours.token_ids[None], dtype=torch.long)).logits[0, :-1]
        scored = torch.log_softmax(logits, -1).gather(
            1, torch.tensor(ours.token_ids[1:, None], dtype=torch.long)
        )
        sampled = ours.sampled[1:]
        np.testing.assert_allclose(ours.logprobs[1:][sampled], scored[:, 0].numpy()[sampled], atol=1e-4)
    assert num_cut_off, "no answer was under way"


def test_a_probe_of_a_random_model_is_written_task_by_task_and_goes_on(
    engines, tiny_model, tmp_path, monkeypatch
):
    """On the engines of this session, which it would start for itself."""
    monkeypatch.setattr(probe, "local_engines", lambda *_, **__: contextlib.nullcontext(engines))
    config, path = run_config(tiny_model), tmp_path / "difficulties.jsonl"
    options = {"model_path": tiny_model, "output": path, "samples_per_task": 2}
    begun = []
    first = probe.probe_model(config, num_tasks=2, on_begin=begun.append, **options)
    assert (first.num_tasks, first.never, first.num_unknown) == (2, 2, 0)
    second = probe.probe_model(config, num_tasks=3, on_begin=begun.append, **options)
    assert begun == [2, 1] and second.num_tasks == 3
    assert sorted(found.task_id for found in read_difficulties(path)) == ["train-0", "train-1", "train-2"]


async def test_a_teacher_that_is_the_policy_says_what_it_said(engines, tiny_model):
    """Scored as given tokens, by a real engine, they have the logprobs that they were drawn with."""
    teacher = {"name": "same", "path": str(tiny_model), "urls": engines.engine_urls}
    config = run_config(tiny_model)
    config = config.model_copy(update={"teachers": [TeacherConfig.model_validate(teacher)]})
    player = build_player(
        config, model_path=tiny_model, split="train", sampling=SamplingParams(), with_teachers=True
    )
    [prompt] = PromptCursor(len(player.tasks), seed=0).take(1)
    try:
        async with open_policy(config, model_path=tiny_model, url=engines.url) as policy, player.serves:
            [group] = await play_groups(player, [prompt], samples_per_prompt=3, policy=policy)
    finally:
        player.close()
    assert len(group.episodes) == 3
    for episode in group.episodes:
        for segment in episode.segments:
            assert segment.num_sampled > 1
            assert segment.teacher_logprobs == pytest.approx(segment.logprobs, abs=1e-4)
            assert not segment.teacher_logprobs[~segment.sampled].any()
        assert 0 < episode.metrics["teacher_seconds"] < episode.timings.total_s + 60


async def test_an_engine_of_the_run_judges(engines):
    """A random model says nothing of use; that it said something is worth 1 here."""
    (url,) = engines.engine_urls
    given = {"kind": "judge", "judge": "self", "pattern": "()", "values": {"": 1.0}, "max_tokens": 4}
    config = load_config("quickstart").model_dump()
    config |= {"reward": given, "judges": [{"name": "self", "urls": [url]}]}
    with judged(RunConfig.model_validate(config), log_directory=Path("nowhere")) as served:
        grader = make_reward(served.reward)
    task = Task.from_prompt("t", "?")
    answer = AssistantMessage(content="!")
    assert await grader(EpisodeView(task=task, message=answer, messages=task.messages)) == 1.0
    with pytest.raises(EnvironmentFault, match="no grade"):
        never = served.reward.model_copy(update={"pattern": "(never)", "values": {}, "max_retries": 0})
        await make_reward(never)(EpisodeView(task=task, message=answer, messages=task.messages))
