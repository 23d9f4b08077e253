"""Engines that fail, with real ones: seconds from the fault to serving the right version, and what was lost with them.

    python benchmarks/recovery.py [--short] [--sync disk|broadcast] [--faults killed hung …]

Two SGLang servers behind a keeper, a fleet that episodes of several turns are played through all the time, and weights
that move on by a version every few seconds, published by the real publisher as a run's driver does. Each fault is done
to one of the servers (or to the router, or to a node of a pretended Ray cluster), and the next one comes when all serve
again:

    killed         SIGKILL of the server
    out of memory  SIGKILL of its scheduler, as the kernel does it
    hung           SIGSTOP of all its processes: it takes connections and answers nothing
    hung in sync   the same in the middle of a sync, when an engine can be asked nothing else
    garbled        every answer has NaN logprobs (a proxy in front of it makes them so)
    failing        every answer is a 500
    slow           every answer takes `--slow-s` longer: it is not replaced, and gets fewer requests
    router         SIGKILL of sglang-router; until requests pass through it again
    node           the Ray node of an engine is removed; another node takes the engine

seconds_to_serving  from the fault to the version that the others serve, its checksums compared
starts              the same in starts of an engine, measured in the same run without a fault
tokens_lost         of tokens that episodes had: those that are in none at its end
under_way           what the engine had sampled for requests that it never answered: an estimate by its pace
recomputed          prompt tokens that other engines computed again for its episodes
failed              episodes that ended without their turns

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import psutil
import torch
from aiohttp import ClientError, ClientSession, ClientTimeout, web
from safetensors.torch import load_file

from polyturn.agents.policy import EngineUnavailable, PolicyFault, SamplingParams, TokenPolicy
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import EnginesConfig, ReplaceConfig, RouterConfig
from polyturn.configs.sizing.nodes import Node
from polyturn.configs.sizing.placement import plan_placement
from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout
from polyturn.rollout.engines.engine_log import EngineLog
from polyturn.rollout.engines.fleet import Ailment, EngineFleet, Traffic
from polyturn.rollout.engines.keeper import EngineKeeper
from polyturn.rollout.engines.launch import Engines, Launcher, LocalLauncher
from polyturn.rollout.engines.membership import Membership
from polyturn.rollout.engines.placement import free_port
from polyturn.rollout.engines.ray_launcher import RayLauncher
from polyturn.rollout.engines.reservation import Reservation
from polyturn.rollout.engines.server import EngineSpec, Router, SGLangServer
from polyturn.rollout.engines.watch import EngineWatch
from polyturn.rollout.factory import fleet_retries, open_client
from polyturn.tools.retries import Retries
from polyturn.trainer.run.checks import RunChecks
from polyturn.trainer.run.served_weights import ServedWeights
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.weight_sync import SyncReport, WeightPublisher
from polyturn.trainer.weight_sync.broadcast import BroadcastPublisher
from polyturn.trainer.weight_sync.disk import DiskPublisher

SHORT = ("killed", "hung", "garbled")
FAULTS = ("killed", "out of memory", "hung", "hung in sync", "garbled", "failing", "slow", "router", "node")
NUM_LIVE = 8
NUM_TURNS = 4
TURN_TOKENS = 24
VERSION_S = 3.0
"""Between two versions of the weights."""
WITHIN_S = 300.0
NODES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
"""Of the pretended cluster, the head first. Never 127.0.0.1, which Ray takes for the machine's other address."""


class Proxy:
    """Stands in front of a server, and passes on what it is asked and answers, or spoils it."""

    def __init__(self, target: str) -> None:
        self.mode = "pass"
        self.slow_s = 0.0
        self._target = target
        self.port = free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        self._ready.wait()

    def _run(self) -> None:
        async def serve() -> None:
            app = web.Application(client_max_size=1 << 28)
            app.router.add_route("*", "/{path:.*}", self._pass)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port).start()
            self._session = ClientSession(timeout=ClientTimeout(total=None), trust_env=False)
            self._ready.set()
            await asyncio.Event().wait()

        self._loop.run_until_complete(serve())

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        is_generation = request.path == "/generate"
        if is_generation and self.mode == "failing":
            return web.Response(status=500, text="CUDA error: an illegal memory access was encountered")
        try:
            async with self._session.request(
                request.method,
                self._target + request.path_qs,
                data=body,
                headers={"Content-Type": "application/json"},
            ) as reply:
                answer = await reply.read()
                status, kind = reply.status, reply.content_type
        except (OSError, ClientError):
            if request.transport is not None:  # None: whoever asked has gone
                request.transport.close()  # as a dead server would
            return web.Response(status=502)
        if is_generation and self.mode == "garbled":
            spoiled = json.loads(answer)
            for entry in spoiled["meta_info"]["output_token_logprobs"]:
                entry[0] = float("nan")
            answer = json.dumps(spoiled).encode()
        if is_generation and self.mode == "slow":
            await asyncio.sleep(self.slow_s)
        return web.Response(status=status, body=answer, content_type=kind)


class ProxiedServer:
    """An `Engine` that is asked through a proxy."""

    def __init__(self, server: SGLangServer) -> None:
        self.server = server
        self.proxy = Proxy(server.url)
        self.url = self.proxy.url
        self.start, self.ready, self.ended = server.start, server.ready, server.ended
        self.release, self.stop = server.release, server.stop

    @property
    def processes(self) -> list[psutil.Process]:
        """Of the server, without those that watch over it."""
        supervisor = psutil.Process(self.server.process.pid)
        return [
            child
            for child in supervisor.children(recursive=True)
            if "polyturn.rollout.engines.supervisor" not in child.cmdline()
        ]


class Play:
    """Episodes that are played all the time, in an event loop of their own; the `Players` of a keeper."""

    def __init__(self, urls: Sequence[str], *, is_router: bool, vocab_size: int, engine_urls: Sequence[str]):
        self._urls, self._is_router = urls, is_router
        self._vocab_size, self._engine_urls = vocab_size, engine_urls
        self.num_lost_tokens = self.num_failed = self.num_ended = 0
        self.faults: list[str] = []
        self.answered = 0.0
        self.versions: dict[int, int] = {}
        self._loop = asyncio.new_event_loop()
        self._opened: Future[None] = Future()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._live()))

    def __enter__(self) -> Play:
        self._thread.start()
        self._opened.result()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _live(self) -> None:
        async with open_client(timeout_s=60) as client:

            def connect(url: str) -> TokenPolicy:
                alone = Retries(max_retries=0, deadline_s=60)
                return SGLangPolicy(
                    client=client, url=url, stop_token_ids=(), retries=alone, vocab_size=self._vocab_size
                )

            self.fleet = EngineFleet(
                [connect(url) for url in self._urls],
                retries=fleet_retries(120, is_behind_router=self._is_router),
            )
            self._watch = EngineWatch(
                self.fleet,
                urls=self._engine_urls,
                client=client,
                is_direct=not self._is_router,
                connect=None if self._is_router else connect,
            )
            async with self._watch.watching():
                playing = [asyncio.create_task(self._play(number)) for number in range(NUM_LIVE)]
                self._opened.set_result(None)
                await self._closing.wait()
                for task in playing:
                    task.cancel()
                await asyncio.gather(*playing, return_exceptions=True)

    async def _play(self, number: int) -> None:
        random = np.random.default_rng(number)
        while True:
            ids = random.integers(10, self._vocab_size, 48, dtype=np.int32)
            told: list[np.ndarray] = [ids]
            try:
                with self.fleet.for_episode() as policy:
                    for _ in range(NUM_TURNS):
                        sampling = SamplingParams(max_tokens=TURN_TOKENS)
                        generation = await policy.generate(prompt_ids=ids, sampling=sampling)
                        self.answered = time.time()
                        result = random.integers(10, self._vocab_size, 16, dtype=np.int32)
                        told += [generation.token_ids, result]
                        ids = np.concatenate([ids, generation.token_ids, result])
                        await asyncio.sleep(0.05)
            except (EngineUnavailable, PolicyFault) as fault:
                self.num_failed += 1
                self.faults.append(str(fault))
                continue
            self.num_ended += 1
            self.num_lost_tokens += int(sum(map(len, told)) - len(ids))

    def set_engines(self, members: Membership) -> None:
        self._loop.call_soon_threadsafe(self._watch.set_engines, members)

    def ailments(self) -> Mapping[int, Ailment]:
        return self._watch.ailments

    def num_requests(self) -> Mapping[int, int]:
        return self.fleet.num_requests

    @property
    def traffic(self) -> Traffic:
        return sum(self.fleet.traffic.values(), Traffic())


class InProcess:
    """The trainer as `ServedWeights` knows it, in this process: weights of a file, moved a little with each version."""

    def __init__(self, publisher: WeightPublisher, weights: Mapping[str, torch.Tensor]) -> None:
        self._publisher, self._weights = publisher, weights
        self._moved: list[tuple[str, torch.Tensor]] = []
        self.meanwhile: Callable[[], None] = lambda: None
        """What happens in the middle of the next sync."""
        self.set_engines = publisher.set_engines

    def prepare_weights(self, version: int) -> None:
        self._moved = [(name, tensor * (1 + 1e-4 * version)) for name, tensor in self._weights.items()]
        self._publisher.prepare(self._sent(), version=version)

    def _sent(self) -> Iterator[tuple[str, torch.Tensor]]:
        middle = len(self._moved) // 2
        yield from self._moved[:middle]
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        yield from self._moved[middle:]

    def activate_weights(self) -> SyncReport:
        return self._publisher.activate()


@dataclass(kw_only=True, slots=True)
class Row:
    """What one fault came to."""

    fault: str
    policy: str
    seconds_to_serving: float | None = None
    starts: float | None = None
    tokens_lost: int = 0
    under_way: float = 0.0
    recomputed: int = 0
    failed: int = 0
    version: int | None = None
    """That it serves."""


@dataclass(kw_only=True)
class Bench:
    """Engines that are kept going, with what is played on them and published to them."""

    engines: Engines
    keeper: EngineKeeper
    play: Play
    served: ServedWeights
    trainer: InProcess
    directory: Path
    start_s: float
    slow_s: float
    hung_after_s: float
    rows: list[Row] = field(default_factory=list)
    _next_version: float = 0.0

    def tend(self) -> None:
        """What a run's driver does while it waits, and after each step."""
        self.served.tend()
        if time.monotonic() > self._next_version:
            version = self.served.version + 1
            self.served.sync_if_due(version, version, Stopwatch())
            self._next_version = time.monotonic() + VERSION_S

    def until(self, is_so: Callable[[], object]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not is_so():
            if time.monotonic() > deadline:
                raise SystemExit(f"not within {WITHIN_S:g} s; see {self.directory}")
            self.tend()
            time.sleep(0.1)

    def event(self, kind: str, since: float) -> Mapping[str, Any] | None:
        """The first event of a kind since a time."""
        log = self.directory / "engines.jsonl"
        lines = log.read_bytes().splitlines() if log.exists() else []
        found = (line for line in map(json.loads, lines) if line["event"] == kind and line["time"] >= since)
        return next(found, None)

    def measure(self, fault: str, policy: str, inject: Callable[[], None], *, until: str = "serving") -> Row:
        """Do a fault, and wait until all serve again."""
        self.until(lambda: len(self.keeper.members.serving) == len(self.engines.by_number))
        settle = time.monotonic() + 3.0
        self.until(lambda: time.monotonic() > settle)
        before, failed, lost = self.play.traffic, self.play.num_failed, self.play.num_lost_tokens
        faulted = time.time()
        inject()
        self.until(lambda: self.event(until, faulted))
        event = self.event(until, faulted)
        assert event is not None
        row = Row(fault=fault, policy=policy, seconds_to_serving=event["time"] - faulted)
        if until == "router":
            self.until(lambda: self.play.answered > event["time"])
            row.seconds_to_serving = self.play.answered - faulted
        settle = time.monotonic() + 3.0
        self.until(lambda: time.monotonic() > settle)
        traffic = self.play.traffic - before
        assert row.seconds_to_serving is not None
        row.starts = row.seconds_to_serving / self.start_s
        row.version = event.get("version")
        row.under_way = traffic.num_cut_off_tokens
        row.recomputed = traffic.num_recomputed_tokens
        row.failed = self.play.num_failed - failed
        row.tokens_lost = self.play.num_lost_tokens - lost
        self.rows.append(row)
        show(row)
        return row

    def measure_slow(self) -> None:
        """One that is slow stays, and gets fewer requests."""
        victim = self.victim()
        settle = time.monotonic() + 3.0
        self.until(lambda: time.monotonic() > settle)
        before, failed = self.play.fleet.traffic, self.play.num_failed
        victim.proxy.mode, victim.proxy.slow_s = "slow", self.slow_s
        settle = time.monotonic() + 10.0
        self.until(lambda: time.monotonic() > settle)
        now = self.play.fleet.traffic
        pace = {number: (now[number] - before[number]).token_s for number in now}
        victim.proxy.mode = "pass"
        slowest, other = max(pace.values()), min(pace.values())
        policy = f"stays; alarm at {slowest / other:.1f} times the other's seconds a token"
        row = Row(fault="slow", policy=policy, failed=self.play.num_failed - failed)
        self.rows.append(row)
        show(row)

    def victim(self) -> ProxiedServer:
        """The engine that faults are done to."""
        return cast(ProxiedServer, self.engines.by_number[0])


def show(row: Row) -> None:
    seconds = "-" if row.seconds_to_serving is None else f"{row.seconds_to_serving:.1f}"
    starts = "-" if row.starts is None else f"{row.starts:.2f}"
    print(
        f"{row.fault:>14} {seconds:>19} {starts:>7} {row.tokens_lost:>11} {row.under_way:>9.0f} {row.recomputed:>10} "
        f"{row.failed:>6}  {row.policy}",
        flush=True,
    )


@contextmanager
def bench(
    scratch: Path,
    *,
    sync: str,
    slow_s: float,
    hung_after_s: float,
    router: RouterConfig | None = None,
    make_launcher: Callable[[EngineSpec], Launcher] | None = None,
) -> Iterator[Bench]:
    """Two engines, and all that belongs to them."""
    model = resolve_model_path("builtin:tiny-searcher")
    hf = json.loads((model / "config.json").read_text())
    logs = Path(tempfile.mkdtemp(dir=scratch))
    config = load_config("quickstart", ["engines.num_engines=2", f"weight_sync.kind={sync}"])
    spec = EngineSpec(
        config=EnginesConfig(device="cpu", num_engines=2),
        model_path=model,
        dtype="float32",
        seeded=False,
        log_directory=logs,
        sglang={"max_total_tokens": 16384},
        router=router,
    )
    local = LocalLauncher(spec)
    launcher = make_launcher(spec) if make_launcher else lambda number: ProxiedServer(local(number))
    with ExitStack() as stack:
        started = time.monotonic()
        engines = stack.enter_context(Engines(spec, launcher))
        start_s = time.monotonic() - started
        urls = engines.request_urls
        play = stack.enter_context(
            Play(
                [urls] if isinstance(urls, str) else urls,
                is_router=isinstance(urls, str),
                vocab_size=hf["vocab_size"],
                engine_urls=engines.engine_urls,
            )
        )
        keeper = EngineKeeper(
            engines,
            ReplaceConfig(hung_after_s=hung_after_s, faults_in_a_row=8, deaths_per_hour=None),
            players=play,
            directory=logs,
            log=EngineLog(logs, lambda sentence: print(f"  {sentence}", flush=True)),
            start_timeout_s=240.0,
            drain_s=30.0,
        )
        stack.callback(keeper.close)
        publisher = stack.enter_context(
            publishing(sync, model, logs, tied=hf["tie_word_embeddings"], hung_after_s=hung_after_s)
        )
        trainer = InProcess(publisher, load_file(model / "model.safetensors"))
        served = ServedWeights(
            config,
            keeper=keeper,
            turns=None,
            trainer=cast(Any, trainer),
            worker=cast(Any, play),
            # Requests are under way all the time.
            heldout=cast(Any, SimpleNamespace(is_playing=True)),
            checks=RunChecks(config.checks),
            progress=cast(Any, SimpleNamespace(message=print)),
            step=0,
            version=0,
        )
        served.begin(Stopwatch())
        found = Bench(
            engines=engines,
            keeper=keeper,
            play=play,
            served=served,
            trainer=trainer,
            directory=logs,
            start_s=start_s,
            slow_s=slow_s,
            hung_after_s=hung_after_s,
        )
        yield found
        for fault in dict.fromkeys(play.faults):
            print(f"  an episode failed: {fault}")


@contextmanager
def publishing(
    sync: str, model: Path, directory: Path, *, tied: bool, hung_after_s: float
) -> Iterator[WeightPublisher]:
    def new_checksums() -> EngineChecksums:
        return EngineChecksums(EngineLayout(tied_embeddings=tied))

    publisher: WeightPublisher
    if sync == "disk":
        publisher = DiskPublisher(
            model_path=model, directory=directory / "weights", new_checksums=new_checksums
        )
    else:
        publisher = BroadcastPublisher(
            tensor_parallel=1,
            address="127.0.0.1",
            backend="gloo",
            bucket_bytes=1 << 29,
            timeout_s=300,
            hung_after_s=hung_after_s,
            new_checksums=new_checksums,
        )
    yield publisher
    publisher.close()


def measure_servers(found: Bench, faults: Sequence[str]) -> None:
    """The faults of one server."""

    def signalled(number: int, name: str | None = None) -> None:
        for process in found.victim().processes:
            if name is None or name in process.name():
                os.kill(process.pid, number)
                if number == signal.SIGKILL:
                    return

    def spoiled(mode: str) -> None:
        found.victim().proxy.mode = mode

    replaced = "replaced at once"
    for fault in faults:
        match fault:
            case "killed":
                found.measure(fault, replaced, lambda: signalled(signal.SIGKILL))
            case "out of memory":
                found.measure(fault, replaced, lambda: signalled(signal.SIGKILL, "scheduler"))
            case "hung":
                policy = f"replaced after {found.hung_after_s:g} s without an answer"
                found.measure(fault, policy, lambda: signalled(signal.SIGSTOP))
            case "hung in sync":

                def stop_in_sync() -> None:
                    stopped = []

                    def stop() -> None:
                        signalled(signal.SIGSTOP)
                        stopped.append(time.time())

                    found.trainer.meanwhile = stop
                    found.until(lambda: stopped)

                policy = f"replaced after {found.hung_after_s:g} s in which a bucket does not arrive"
                found.measure(fault, policy, stop_in_sync)
            case "garbled" | "failing" as mode:
                policy = "asked of another at once; replaced after 8 in a row"
                found.measure(mode, policy, lambda mode=mode: spoiled(mode))
            case "slow":
                found.measure_slow()


def measure_router(found: Bench) -> None:
    """The router is killed; it comes back at its address."""
    assert isinstance(found.engines._router, Router)

    def kill() -> None:
        assert found.engines._router is not None
        for process in psutil.Process(found.engines._router.process.pid).children(recursive=True):
            process.kill()

    found.measure("router", "started again at its address", kill, until="router")


def measure_node(scratch: Path, *, sync: str, hung_after_s: float) -> list[Row]:
    """The node of an engine is removed from a cluster of three."""
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = True
    os.environ.update(
        RAY_health_check_period_ms="500",
        RAY_health_check_timeout_ms="1000",
        RAY_health_check_failure_threshold="2",
        RAY_health_check_initial_delay_ms="0",
    )
    shape = {"num_cpus": 4, "object_store_memory": 80 << 20}
    head, *others = NODES
    cluster = Cluster(
        initialize_head=True,
        head_node_args={**shape, "node_ip_address": head, "include_dashboard": False},
    )
    added = {address: cluster.add_node(**shape, node_ip_address=address) for address in others}
    ray.init(address=cluster.address, log_to_driver=False)
    config = load_config("quickstart", [f"cluster.address={cluster.address}", "engines.num_engines=2"])
    # The engines sit on the nodes that can be removed.
    places = [Node(address=address, num_cpus=4, num_gpus=0) for address in added]
    reservation = Reservation(plan_placement(config, places, trains=False))
    try:
        with bench(
            scratch,
            sync=sync,
            slow_s=0.0,
            hung_after_s=hung_after_s,
            make_launcher=lambda spec: RayLauncher(spec, reservation),
        ) as found:

            def remove() -> None:
                host = httpx.URL(found.engines.by_number[0].url).host
                cluster.remove_node(added[host], allow_graceful=False)

            found.measure("node", "replaced on another node", remove)
            return found.rows
    finally:
        reservation.release()
        ray.shutdown()
        cluster.shutdown()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="which of them")
    parser.add_argument("--sync", choices=("broadcast", "disk"), default="broadcast", help="how weights go")
    parser.add_argument(
        "--hung-after-s",
        type=float,
        default=5.0,
        help="without an answer, after which an engine is replaced; 60 s in a run, where it may compute for long",
    )
    parser.add_argument("--slow-s", type=float, default=1.0, help="for which a slow answer is held back")
    parser.add_argument("--short", action="store_true", help=f"{', '.join(SHORT)} alone")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    faults = [fault for fault in (SHORT if arguments.short else FAULTS) if fault in arguments.faults]
    of_servers = [fault for fault in faults if fault not in ("router", "node")]
    rows: list[Row] = []
    torch.set_num_threads(1)
    start_s: float | None = None
    print(
        f"{'fault':>14} {'seconds to serving':>19} {'starts':>7} {'tokens lost':>11} {'under way':>9} "
        f"{'recomputed':>10} {'failed':>6}  policy"
    )
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        if of_servers:
            with bench(
                scratch,
                sync=arguments.sync,
                slow_s=arguments.slow_s,
                hung_after_s=arguments.hung_after_s,
            ) as found:
                start_s = found.start_s
                measure_servers(found, of_servers)
                rows += found.rows
        if "router" in faults:
            config = RouterConfig(policy="cache_aware")
            with bench(
                scratch,
                sync=arguments.sync,
                slow_s=0.0,
                hung_after_s=arguments.hung_after_s,
                router=config,
            ) as found:
                measure_router(found)
                rows += found.rows
        if "node" in faults:
            rows += measure_node(scratch, sync=arguments.sync, hung_after_s=arguments.hung_after_s)
    figures = {
        "benchmark": "recovery",
        "sync": arguments.sync,
        "start_seconds_of_two": start_s,
        "load": os.getloadavg()[0],
        "faults": {row.fault: asdict(row) for row in rows},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
