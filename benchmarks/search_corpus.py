"""What an index of a large corpus costs to build and to serve: time, memory and disk, each of a passage.

The corpus is generated in wiki-18's format (`benchmarks/search.py`: Zipf's law, 100 words a passage). BM25 is built and
served by the command that a user types, `polyturn serve search`. The vectors of the dense index are drawn at random, so
its figures are those of faiss alone: an encoder comes on top of them. With --shards the same passages are indexed in
several directories, too, and served as one.

Memory is sampled from /proc: `private` is what the process has allocated, `mapped` are pages of its files, which the
kernel may drop and read again. Latencies are seen by a client over HTTP, of queries that were not asked before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from search import TOP_K, Corpus, cpu_seconds

from polyturn.tools.search.client import ClientOptions, SearchClient
from polyturn.tools.search.corpus import write_passages
from polyturn.tools.search.dense import DenseIndex, DenseOptions
from polyturn.tools.search.server import SearchApp, run_server

MIB = 2**20
PROBES = 16


@dataclass(kw_only=True, slots=True)
class Memory:
    """The most that was seen, in bytes."""

    private: int = 0
    mapped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a process took."""

    wall_s: float
    cpu_s: float
    memory: Memory


@contextmanager
def watched(pid: int, *, every_s: float = 0.2) -> Iterator[Memory]:
    """Samples the memory of a process while the block runs."""
    memory, ended = Memory(), threading.Event()

    def sample() -> None:
        while not ended.wait(every_s):
            try:
                text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            except OSError:
                return
            found = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", text))
            memory.private = max(memory.private, 1024 * int(found.get("RssAnon", 0)))
            memory.mapped = max(memory.mapped, 1024 * int(found.get("RssFile", 0)))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def run_watched(command: Sequence[str]) -> Cost:
    """Run a command to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with watched(process.pid) as memory:
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return Cost(wall_s=time.perf_counter() - started, cpu_s=usage.ru_utime + usage.ru_stime, memory=memory)


def cpu_s_of_children() -> float:
    """Of all that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def serve_command(*options: str) -> list[str]:
    """`polyturn serve search` with these options."""
    return [sys.executable, "-m", "polyturn", "serve", "search", *options]


class RandomEncoder:
    """Vectors of length 1 that follow from the text and mean nothing."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def encode(self, texts: Sequence[str]) -> Any:
        rows = [
            np.random.default_rng(zlib.crc32(text.encode())).standard_normal(self.dimension, dtype=np.float32)
            for text in texts
        ]
        vectors = np.stack(rows)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build_dense(folder: Path, dimension: int, factory: str) -> None:
    """The dense part of an index, of the passages that are in its folder. Runs in a process of its own."""
    options = DenseOptions(factory=factory, search_options=f"nprobe={PROBES}")
    DenseIndex.build(None, folder, encoder=RandomEncoder(dimension), options=options)


def serve_dense(folder: Path, dimension: int, url: Any) -> None:
    """Serve it, and tell the url."""
    index = DenseIndex.open(folder, encoder=RandomEncoder(dimension))
    run_server(SearchApp(index), host="127.0.0.1", port=0, on_start=url.put)


def ask(url: str, queries: Sequence[str], concurrency: int) -> dict[str, float]:
    """Latencies in milliseconds, and queries a second, with so many under way."""
    options = ClientOptions(cache_size=0, max_wait_s=0.0 if concurrency == 1 else ClientOptions().max_wait_s)
    with SearchClient(url, options=options) as client:

        def timed(query: str) -> float:
            started = time.perf_counter()
            client.search(query, TOP_K)
            return 1000 * (time.perf_counter() - started)

        started = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as threads:
            latencies = list(threads.map(timed, queries))
        wall_s = time.perf_counter() - started
    cuts = statistics.quantiles(latencies, n=20)
    return {
        "queries_per_s": len(queries) / wall_s,
        "p50_ms": statistics.median(latencies),
        "p95_ms": cuts[-1],
    }


def measure_serving(url: str, pid: int, queries: Sequence[str]) -> dict[str, Any]:
    """A third of the queries to warm up (and to read the index from disk), one at a time, and 64 at once."""
    process, third = psutil.Process(pid), len(queries) // 3
    with watched(pid) as memory:
        first = ask(url, queries[:third], 1)
        used = cpu_seconds(process)
        alone = ask(url, queries[third : 2 * third], 1)
        together = ask(url, queries[2 * third :], 64)
        used = cpu_seconds(process) - used
    return {
        "first": first,
        "alone": alone,
        "at_once": together,
        "cpu_ms_per_query": 1000 * used / (len(queries) - third),
        "memory": asdict(memory),
    }


@contextmanager
def served(command: Sequence[str]) -> Iterator[tuple[str, int, float]]:
    """A server by a command: its url, its process and the seconds until it answered."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise RuntimeError("the search server did not start")
        yield found[0], process.pid, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()


@contextmanager
def process_of(function: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """A function in a fresh process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def size_of(folder: Path) -> int:
    """Bytes of the files of a folder; what is linked is not counted."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def told(what: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Print figures of a part as they come, so that a long run shows where it is."""
    print(f"{what}: {json.dumps(figures)}", flush=True)
    return figures


def measure_bm25(
    corpora: Sequence[Path], root: Path, passages: int, queries: Sequence[str]
) -> dict[str, Any]:
    """Build an index of each corpus file, and serve them as one."""
    folders = [root / f"bm25-{len(corpora)}-{number}" for number in range(len(corpora))]
    costs = [
        run_watched(serve_command("--corpus", str(corpus), "--index", str(folder), "--build-only"))
        for corpus, folder in zip(corpora, folders, strict=True)
    ]
    figures: dict[str, Any] = {
        "shards": len(corpora),
        "build": [asdict(cost) for cost in costs],
        "build_cpu_us_per_passage": 1e6 * sum(cost.cpu_s for cost in costs) / passages,
        "disk_bytes_per_passage": sum(map(size_of, folders)) / passages,
    }
    option = "--index" if len(corpora) == 1 else "--shard"
    options = [word for folder in folders for word in (option, str(folder))]
    with served(serve_command(*options, "--port", "0")) as (url, pid, start_s):
        figures |= {"start_s": start_s, **measure_serving(url, pid, queries)}
    return told(f"bm25, {len(corpora)} shard(s)", figures)


def measure_dense(
    folder: Path, passages: int, queries: Sequence[str], dimension: int, factory: str
) -> dict[str, Any]:
    """Build a dense index beside the words of `folder`, and serve it."""
    started, before = time.perf_counter(), cpu_s_of_children()
    with process_of(build_dense, folder, dimension, factory) as process, watched(process.pid) as memory:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"building the dense index ended with {process.exitcode}")
    cost = Cost(wall_s=time.perf_counter() - started, cpu_s=cpu_s_of_children() - before, memory=memory)
    figures: dict[str, Any] = {
        "dimension": dimension,
        "factory": factory,
        "probes": PROBES,
        "build": asdict(cost),
        "build_cpu_us_per_passage": 1e6 * cost.cpu_s / passages,
        "disk_bytes_per_passage": size_of(folder / "dense") / passages,
    }
    urls = multiprocessing.get_context("spawn").Queue()
    started = time.perf_counter()
    with process_of(serve_dense, folder, dimension, urls) as process:
        url = urls.get(timeout=600)
        figures["start_s"] = time.perf_counter() - started
        figures |= measure_serving(url, process.pid, queries)
    return told("dense", figures)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Generate, build and serve as asked."""
    corpus, shards = Corpus(options.passages), options.shards
    queries = list(dict.fromkeys(corpus.queries(options.queries)))
    figures: dict[str, Any] = {
        "passages": options.passages,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory(prefix="polyturn-corpus-", dir=options.folder) as folder:
        root = Path(folder)
        rows = iter(corpus)
        parts = [root / f"corpus-{number}.jsonl" for number in range(shards)]
        share = -(-options.passages // shards)
        for part in parts:
            write_passages(part, islice(rows, share))
        whole = parts[0]
        if shards > 1:
            whole = root / "corpus.jsonl"
            with whole.open("wb") as file:
                for part in parts:
                    file.write(part.read_bytes())
        figures["corpus_bytes_per_passage"] = whole.stat().st_size / options.passages
        told("corpus", {"bytes_per_passage": figures["corpus_bytes_per_passage"]})
        figures["bm25"] = measure_bm25([whole], root, options.passages, queries)
        if shards > 1:
            figures["bm25_in_shards"] = measure_bm25(parts, root, options.passages, queries)
        if options.dense:
            figures["dense"] = measure_dense(
                root / "bm25-1-0", options.passages, queries, options.dimension, options.factory
            )
    return figures


def main() -> None:
    """Measure as asked, and print the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=5_000_000, help="default: 5,000,000")
    parser.add_argument("--queries", type=int, default=3000, help="default: 3000")
    parser.add_argument("--shards", type=int, default=2, help="default: 2; 1 leaves them out")
    parser.add_argument("--dense", action="store_true", help="a dense index too")
    parser.add_argument("--dimension", type=int, default=768, help="of its vectors; default: 768, as E5 base")
    parser.add_argument("--factory", default="IVF1024,SQ8", help="as faiss names it; default: IVF1024,SQ8")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the temporary one")
    parser.add_argument("--short", action="store_true", help="20,000 passages; under a minute")
    options = parser.parse_args()
    if options.short:
        options.passages, options.queries, options.factory = 20_000, 600, "IVF64,SQ8"
        options.dimension = 64
    print(json.dumps(report(options)))


if __name__ == "__main__":
    main()
