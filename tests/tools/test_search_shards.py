"""Several indexes, here and behind other servers, that answer as one."""

import json
import re
import subprocess
import sys

import httpx
import numpy as np
import pytest

from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.client import ClientOptions, SearchClient
from polyturn.tools.search.corpus import Passage, write_passages
from polyturn.tools.search.dense import DenseIndex
from polyturn.tools.search.retrieval import SearchUnavailable
from polyturn.tools.search.server import SearchApp, served
from polyturn.tools.search.shards import ShardedRetriever

PASSAGES = [
    Passage(
        id=str(number), title=f"Town {number}", text=f"It lies on river {number % 7} below hill {number % 5}."
    )
    for number in range(60)
]


class Words:
    """An encoder without a model: which of 64 buckets the words are in."""

    dimension = 64

    def encode(self, texts):
        rows = np.zeros((len(texts), 64), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.lower().split():
                row[sum(word.encode()) % 64] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_shards_here_and_elsewhere_find_what_one_index_finds():
    pytest.importorskip("faiss")
    whole = DenseIndex.build(PASSAGES, encoder=Words())
    dealt = [DenseIndex.build(PASSAGES[start::3], encoder=Words()) for start in range(3)]
    with served(SearchApp(dealt[1])) as url, SearchClient(url) as other:
        shards = ShardedRetriever([dealt[0], other, dealt[2]])
        for query in ("river 3 below hill 2", "town 41", "hill 4"):
            for top_k in (1, 5, 60):
                expected = [hit.score for hit in whole.search(query, top_k)]
                found = shards.search(query, top_k)
                assert [hit.score for hit in found] == pytest.approx(expected, abs=1e-6)
                assert len({hit.passage_id for hit in found}) == len(found)
        assert len(shards) == 40
        assert "Town 5" in shards.page("passage:5") and shards.page("passage:1") is None


def test_a_shard_that_fails_fails_the_search():
    index = BM25Index.build(PASSAGES[:30])
    with served(SearchApp(BM25Index.build(PASSAGES[30:]))) as url:
        gone = url
    quick = ClientOptions(deadline_s=0.5, first_wait_s=0.01, max_retries=1)
    with SearchClient(gone, options=quick) as other:
        shards = ShardedRetriever([index, other])
        with pytest.raises(SearchUnavailable):
            shards.search("river 3", 3)
    with pytest.raises(ValueError, match="there are no shards"):
        ShardedRetriever([])


def test_the_command_serves_directories_as_one(tmp_path):
    for number in range(2):
        write_passages(tmp_path / f"{number}.jsonl", PASSAGES[number::2])
        BM25Index.build(tmp_path / f"{number}.jsonl", tmp_path / f"index-{number}")
    command = [sys.executable, "-m", "polyturn", "serve", "search", "--port", "0"]
    for number in range(2):
        command += ["--shard", str(tmp_path / f"index-{number}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        body = {"queries": ["town 40", "town 41"], "topk": 1}
        found = httpx.post(f"{url}/retrieve", json=body, timeout=60).json()["result"]
        assert [[document["id"] for document in hits] for hits in found] == [["40"], ["41"]]
        assert json.loads(httpx.get(f"{url}/health").text)["num_passages"] == 60
    finally:
        process.terminate()
        process.wait()
    done = subprocess.run([*command, "--build-only"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--shard takes what is built" in done.stderr
