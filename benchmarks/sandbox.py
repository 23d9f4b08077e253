"""Latency and throughput of sandboxed code, beside a bare interpreter and `docker exec`, in one run.

Every way runs the same `print(6 * 7)`. The rounds of all ways alternate, so that what else the machine does hits all of
them. `p50` is the median over one caller's executions, one after the other; executions per second are those of one
caller, and of as many callers as there are cores, each with a sandbox of its own (bare interpreters need none).

- bare: `python3 -I -c CODE`, with no isolation at all.
- embedded: a fresh interpreter in an embedded sandbox, by native namespaces.
- persistent: the persistent interpreter of such a sandbox.
- bubblewrap: as embedded, in namespaces that bubblewrap made.
- docker: a fresh interpreter in a sandbox of the Docker backend.
- docker exec: an interpreter that the daemon starts in a running container, which is how it is commonly done.

Ways that this machine does not offer are left out, and named. `create` is the time of a new sandbox with its first
execution.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from polyturn.tools.sandbox import Sandbox, SandboxBackend, SandboxUnavailable
from polyturn.tools.sandbox.embedded import EmbeddedBackend, probe, summary

CODE = "print(6 * 7)"
ANSWER = "42\n"
NUM_CREATED = 5
Run = Callable[[], None]


@dataclass(kw_only=True)
class Way:
    """One way to run the code. `runs` holds one callable for each caller."""

    name: str
    runs: list[Run]
    created_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    rates: dict[int, list[float]] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        row = {
            "p50_ms": statistics.median(self.latencies_s) * 1e3,
            "p95_ms": statistics.quantiles(self.latencies_s, n=20)[-1] * 1e3,
        }
        for callers, rates in self.rates.items():
            row[f"per_s_{callers}"] = statistics.median(rates)
        if self.created_s:
            row["create_ms"] = statistics.median(self.created_s) * 1e3
        return {key: round(value, 3) for key, value in row.items()}


def run_bare() -> None:
    told = subprocess.run([sys.executable, "-I", "-c", CODE], capture_output=True, text=True, check=True)
    assert told.stdout == ANSWER, told


def run_in(sandbox: Sandbox, *, fresh: bool) -> None:
    result = sandbox.exec(CODE, timeout_s=60, fresh=fresh)
    assert result.stdout == ANSWER, result


def run_docker_exec(sandbox: Sandbox) -> None:
    """What a program does that starts an interpreter in a container by the daemon's own means."""
    code, output = sandbox._runner.handle.exec_run(["python3", "-I", "-c", CODE])
    assert (code, output.decode()) == (0, ANSWER), output


def time_creation(backend: SandboxBackend) -> Iterator[float]:
    for _ in range(NUM_CREATED):
        start = time.perf_counter()
        with backend.create() as sandbox:
            run_in(sandbox, fresh=True)
            yield time.perf_counter() - start


@contextlib.contextmanager
def open_ways(docker_host: str | None, num_callers: int) -> Iterator[tuple[list[Way], dict[str, str]]]:
    """The ways that work here, and why the others do not."""
    ways = [Way(name="bare", runs=[run_bare] * num_callers)]
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def add(name: str, make: Callable[[], SandboxBackend], **others: Callable[[Sandbox], None]) -> None:
            try:
                backend = make()
            except SandboxUnavailable as unavailable:
                missing[name] = str(unavailable)
                return
            stack.callback(backend.close)
            sandboxes = [stack.enter_context(backend.create()) for _ in range(num_callers)]
            runs = [partial(run_in, sandbox, fresh=True) for sandbox in sandboxes]
            ways.append(Way(name=name, runs=list(runs), created_s=list(time_creation(backend))))
            for other, run in others.items():
                ways.append(Way(name=other, runs=[partial(run, sandbox) for sandbox in sandboxes]))

        add("embedded", lambda: EmbeddedBackend(launcher="native"), persistent=partial(run_in, fresh=False))
        add("bubblewrap", lambda: EmbeddedBackend(launcher="bubblewrap"))
        add("docker", partial(docker_backend, docker_host), docker_exec=run_docker_exec)
        yield ways, missing


def docker_backend(host: str | None) -> SandboxBackend:
    from polyturn.tools.sandbox.docker import DockerBackend

    return DockerBackend(host=host)


def measure(way: Way, seconds: float, num_callers: int) -> None:
    """One round: one caller, then all."""
    end = time.perf_counter() + seconds
    start = time.perf_counter()
    count = 0
    while (before := time.perf_counter()) < end or count < 3:
        way.runs[0]()
        way.latencies_s.append(time.perf_counter() - before)
        count += 1
    way.rates.setdefault(1, []).append(count / (time.perf_counter() - start))

    def call(run: Run) -> int:
        done = 0
        while time.perf_counter() < end or done < 3:
            run()
            done += 1
        return done

    start = time.perf_counter()
    end = start + seconds
    with ThreadPoolExecutor(num_callers) as pool:
        total = sum(pool.map(call, way.runs))
    way.rates.setdefault(num_callers, []).append(total / (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="3 rounds of half a second")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round of one way")
    parser.add_argument("--docker-host", help="the daemon's address; by default the usual one")
    arguments = parser.parse_args()
    rounds, seconds = (3, 0.5) if arguments.short else (arguments.rounds, arguments.seconds)
    num_callers = max(len(os.sched_getaffinity(0)), 2)
    load = os.getloadavg()[0]
    with open_ways(arguments.docker_host, num_callers) as (ways, missing):
        for _ in range(rounds):
            for way in ways:
                measure(way, seconds, num_callers)
    rows = {way.name: way.row() for way in ways}
    report = {
        "load_average": load,
        "cores": os.cpu_count(),
        "embedded": summary(probe()),
        "missing": missing,
    }
    columns = ["p50_ms", "p95_ms", "per_s_1", f"per_s_{num_callers}", "create_ms"]
    print(f"{'':12}" + "".join(f"{column:>12}" for column in columns))
    for name, row in rows.items():
        print(
            f"{name:12}"
            + "".join(f"{row[column]:12.1f}" if column in row else " " * 12 for column in columns)
        )
    for name, reason in missing.items():
        print(f"no {name}: {reason}")
    ratios = {}
    if "embedded" in rows:
        for other in rows:
            ratios[f"{other}_over_embedded_p50"] = round(
                rows[other]["p50_ms"] / rows["embedded"]["p50_ms"], 2
            )
    print(json.dumps({**report, "ways": rows, **ratios}))


if __name__ == "__main__":
    main()
