"""Queries per CPU-second of the embedded index, of the same index served, and of bm25s over the same passages.

The corpus is generated: words whose frequencies follow Zipf's law, the most frequent ones English function words as in
real text, 100 words a passage. A query is two function words and four other words of one passage. All are asked for the
top 3, with their texts.

CPU seconds are user and system time of the processes that search. `served` counts the server's process, and `both` the
client's too. Wall-clock figures depend on what else the machine does; CPU seconds do so much less.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from polyturn.tools.search.bm25 import STOP_WORDS, BM25Index
from polyturn.tools.search.client import ClientOptions, SearchClient
from polyturn.tools.search.corpus import Passage

TOP_K = 3
WORDS_PER_PASSAGE = 100
VOCABULARY = 200_000
BLOCK = 10_000
CONCURRENCIES = (1, 64, 1000)


class Corpus:
    """Passages, generated in blocks. The same in every process."""

    def __init__(self, size: int) -> None:
        self.size = size
        rng = random.Random(1)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        words = sorted({"".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(3 * VOCABULARY)})
        rng.shuffle(words)
        self._words = np.array([*STOP_WORDS, *words[:VOCABULARY]])
        weights = 1 / (np.arange(len(self._words)) + 2.7)
        self._cumulated = np.cumsum(weights / weights.sum())

    def __iter__(self) -> Iterator[Passage]:
        for start in range(0, self.size, BLOCK):
            for offset, row in enumerate(self._block(start // BLOCK)[: self.size - start]):
                words = self._words[row].tolist()
                yield Passage(id=str(start + offset), title=" ".join(words[:2]), text=" ".join(words[2:]))

    def queries(self, count: int) -> list[str]:
        """So many queries, from passages all over the corpus."""
        rng = random.Random(2)
        num_blocks = -(-self.size // BLOCK)
        chosen = [self._block(number) for number in rng.sample(range(num_blocks), min(num_blocks, 8))]
        return [self._query(rng, chosen[number % len(chosen)]) for number in range(count)]

    def _query(self, rng: random.Random, block: Any) -> str:
        row = set(block[rng.randrange(len(block))].tolist())
        rare = sorted(index for index in row if index >= len(STOP_WORDS))
        return " ".join(
            rng.sample(STOP_WORDS, 2) + [self._words[i] for i in rng.sample(rare, min(4, len(rare)))]
        )

    def _block(self, number: int) -> Any:
        draws = np.random.default_rng(number).random((BLOCK, WORDS_PER_PASSAGE))
        return np.searchsorted(self._cumulated, draws).clip(max=len(self._words) - 1)


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process so far."""
    times = process.cpu_times()
    return times.user + times.system


def measure_embedded(index: BM25Index, queries: Sequence[str], concurrency: int) -> dict[str, float]:
    """The index in this process, from so many threads at once (no more than cores at work)."""
    for query in queries[:50]:
        index.search(query, TOP_K)
    own = psutil.Process()
    with ThreadPoolExecutor(min(concurrency, os.cpu_count() or 1)) as threads:
        used, started = cpu_seconds(own), time.perf_counter()
        if concurrency == 1:
            for query in queries:
                index.search(query, TOP_K)
        else:
            list(threads.map(lambda query: index.search(query, TOP_K), queries))
        used, wall = cpu_seconds(own) - used, time.perf_counter() - started
    return {"queries_per_cpu_s": len(queries) / used, "queries_per_s": len(queries) / wall}


def measure_served(
    url: str, server: psutil.Process, queries: Sequence[str], concurrency: int
) -> dict[str, float]:
    """The index behind a server, asked by the client with so many searches under way."""
    own = psutil.Process()

    async def ask(client: SearchClient) -> None:
        waiting = iter(queries)

        async def worker() -> None:
            for query in waiting:
                await client.search_async(query, TOP_K)

        await asyncio.gather(*(worker() for _ in range(concurrency)))

    # One search at a time has no others to wait for.
    wait_s = 0.0 if concurrency == 1 else ClientOptions().max_wait_s
    with SearchClient(url, options=ClientOptions(cache_size=0, max_wait_s=wait_s)) as client:
        client.search("warm up", TOP_K)
        before, used, started = cpu_seconds(server), cpu_seconds(own), time.perf_counter()
        asyncio.run(ask(client))
        wall = time.perf_counter() - started
        at_server, here = cpu_seconds(server) - before, cpu_seconds(own) - used
        batch = client.counts.num_searches / client.counts.num_requests
    return {
        "queries_per_cpu_s": len(queries) / at_server,
        "queries_per_cpu_s_both": len(queries) / (at_server + here),
        "queries_per_s": len(queries) / wall,
        "queries_per_request": batch,
    }


def measure_bm25s(corpus: Corpus, queries: Sequence[str]) -> dict[str, float] | None:
    """bm25s over the same passages; None where it is not installed. Unstemmed, texts in memory."""
    if importlib.util.find_spec("bm25s") is None:
        return None
    bm25s = importlib.import_module("bm25s")
    own = psutil.Process()
    used = cpu_seconds(own)
    texts = [f"{passage.title} {passage.text}" for passage in corpus]
    generated = cpu_seconds(own) - used
    engine = bm25s.BM25()
    engine.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    build = cpu_seconds(own) - used - generated
    used = cpu_seconds(own)
    for query in queries:
        tokens = bm25s.tokenize(query, stopwords="en", show_progress=False)
        rows, _ = engine.retrieve(tokens, k=TOP_K, show_progress=False, n_threads=1)
        _ = [texts[row] for row in rows[0]]
    used = cpu_seconds(own) - used
    return {"queries_per_cpu_s": len(queries) / used, "build_cpu_s": build}


def start_server(index: Path) -> tuple[subprocess.Popen[str], str]:
    """`polyturn serve search` over a directory, and its url."""
    command = [sys.executable, "-m", "polyturn", "serve", "search", "--index", str(index), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    if found is None:
        process.kill()
        raise RuntimeError(f"the search server did not start: {line!r}")
    return process, found[0]


def report(passages: int, num_queries: int, with_bm25s: bool) -> dict[str, Any]:
    """Measure everything, and print it."""
    corpus = Corpus(passages)
    queries = corpus.queries(num_queries)
    figures: dict[str, Any] = {"passages": passages, "queries": num_queries, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory(prefix="polyturn-search-") as folder:
        used = cpu_seconds(psutil.Process())
        index = BM25Index.build(corpus, Path(folder) / "index")
        figures["build_cpu_s"] = cpu_seconds(psutil.Process()) - used
        files = (Path(folder) / "index" / "tantivy").iterdir()
        figures["index_bytes"] = sum(path.stat().st_size for path in files)
        row("", "concurrency", "queries/CPU-s", "of embedded", "client too", "queries/s")
        for concurrency in CONCURRENCIES:
            embedded = measure_embedded(index, queries, concurrency)
            figures[f"embedded_{concurrency}"] = embedded
            row("embedded", concurrency, embedded["queries_per_cpu_s"], 1.0, "", embedded["queries_per_s"])
        process, url = start_server(Path(folder) / "index")
        try:
            measure_served(url, psutil.Process(process.pid), queries[:200], 64)
            for concurrency in CONCURRENCIES:
                served = measure_served(url, psutil.Process(process.pid), queries, concurrency)
                base = figures[f"embedded_{concurrency}"]["queries_per_cpu_s"]
                served["ratio"] = served["queries_per_cpu_s"] / base
                figures[f"served_{concurrency}"] = served
                both = served["queries_per_cpu_s_both"] / base
                row(
                    "served",
                    concurrency,
                    served["queries_per_cpu_s"],
                    served["ratio"],
                    both,
                    served["queries_per_s"],
                )
        finally:
            process.terminate()
            process.wait()
    peer = measure_bm25s(corpus, queries) if with_bm25s else None
    if peer is not None:
        base = figures["embedded_1"]["queries_per_cpu_s"]
        figures["bm25s"] = peer
        figures["times_bm25s"] = base / peer["queries_per_cpu_s"]
        row("bm25s", 1, peer["queries_per_cpu_s"], peer["queries_per_cpu_s"] / base, "", "")
    print(
        f"built in {figures['build_cpu_s']:.1f} CPU-s, generation included; {figures['index_bytes'] / 2**20:.0f} MiB"
    )
    return figures


def row(*cells: object) -> None:
    """One line of the table."""
    texts = [
        f"{cell:,.2f}"
        if isinstance(cell, float) and cell < 10
        else f"{cell:,.0f}"
        if isinstance(cell, float)
        else str(cell)
        for cell in cells
    ]
    print("".join(text.rjust(15) if at else text.ljust(10) for at, text in enumerate(texts)), flush=True)


def main() -> None:
    """Measure as asked, and print the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=1_000_000, help="default: 1,000,000")
    parser.add_argument("--queries", type=int, default=2000, help="default: 2000")
    parser.add_argument("--without-bm25s", action="store_true", help="it needs 4 GB at a million passages")
    parser.add_argument("--short", action="store_true", help="20,000 passages; under a minute")
    options = parser.parse_args()
    passages = 20_000 if options.short else options.passages
    figures = report(passages, options.queries, not options.without_bm25s)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
