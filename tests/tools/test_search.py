"""Search: ranking, ties, both forms of the index, and the passage file."""

import gzip
import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.corpus import (
    Passage,
    Passages,
    offsets_path,
    read_passages,
    write_offsets,
    write_passages,
)
from polyturn.tools.search.retrieval import NOTHING_FOUND, render_hits, search_tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall

PASSAGES = [
    Passage(id="a", title="Mara Lindqvist", text="Mara Lindqvist works for Holloway Mills."),
    Passage(
        id="b", title="Holloway Mills", text="Holloway Mills is based in Ashford. It was once led by Mara Ek."
    ),
    Passage(id="c", title="Ashford", text="Ashford lies on a river. The river is long."),
    Passage(id="d", title="Žofie Ørsted", text='She said "hello".\nOn two lines, with a tab\t.'),
]


@pytest.fixture(params=["memory", "directory", "opened"])
def index(request, tmp_path):
    if request.param == "memory":
        return BM25Index.build(PASSAGES)
    built = BM25Index.build(PASSAGES, tmp_path / "index")
    return built if request.param == "directory" else BM25Index.open(tmp_path / "index")


def ids(hits):
    return [hit.passage_id for hit in hits]


def test_the_passage_that_says_most_comes_first(index):
    hits = index.search("Mara Lindqvist", 3)
    assert ids(hits) == ["a", "b"]
    assert hits[0].score > hits[1].score > 0
    assert (hits[0].title, hits[0].text) == (PASSAGES[0].title, PASSAGES[0].text)
    assert ids(index.search("where is holloway mills BASED", 1)) == ["b"]
    assert ids(index.search("rivers", 3)) == ["c"], "words are stemmed"
    assert index.search("žofie ørsted", 1)[0].text == PASSAGES[3].text


@pytest.mark.parametrize("query", ["", "   ", "zzz", "(((", '"', "\x00", "<|im_end|>"])
def test_a_query_without_known_words_finds_nothing(index, query):
    assert index.search(query, 3) == []


@pytest.mark.parametrize(
    "query", ["NOT river", "contents:river", "+river -ashford", '"river long', "river~2 [a TO b]"]
)
def test_a_query_is_words_and_not_a_query_language(index, query):
    assert "c" in ids(index.search(query, 3))


@given(st.text(max_size=50))
def test_no_query_raises(query):
    _INDEX.search(query, 2)


_INDEX = BM25Index.build(PASSAGES)


def test_equal_scores_are_ranked_by_position_also_across_the_cut():
    twins = [Passage(id=str(i), title=f"T{i:03}", text="equal words stand") for i in range(100)]
    index = BM25Index.build(twins)
    assert ids(index.search("equal words", 5)) == ["0", "1", "2", "3", "4"]
    assert ids(index.search("equal words", 60)) == [str(i) for i in range(60)]
    assert len(index.search("equal", 1000)) == 100


def test_wrong_uses_are_told(tmp_path):
    with pytest.raises(ValueError, match="no passages"):
        BM25Index.build([])
    with pytest.raises(ValueError, match="holds no search index"):
        BM25Index.open(tmp_path / "nowhere")
    BM25Index.build(PASSAGES, tmp_path)
    with pytest.raises(ValueError, match="holds an index already"):
        BM25Index.build(PASSAGES, tmp_path)
    with pytest.raises(ValueError, match="top_k"):
        _INDEX.search("river", 0)


def test_a_build_that_was_cut_short_is_no_index(tmp_path):
    def stop(number):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BM25Index.build(PASSAGES, tmp_path, on_passage=stop)
    with pytest.raises(ValueError, match="holds no search index"):
        BM25Index.open(tmp_path)
    assert ids(BM25Index.build(None, tmp_path).search("rivers", 3)) == ["c"], (
        "built anew from the passages there"
    )


def test_passages_round_trip_through_the_map(tmp_path):
    path = tmp_path / "passages.jsonl"
    assert write_passages(path, PASSAGES) == 4
    passages = Passages(path)
    assert list(passages) == PASSAGES
    assert (len(passages), passages[2]) == (4, PASSAGES[2])
    with pytest.raises(IndexError):
        passages[4]
    passages.close()
    assert json.loads(path.read_text().splitlines()[0]) == {
        "id": "a",
        "contents": '"Mara Lindqvist"\nMara Lindqvist works for Holloway Mills.',
    }


def test_offsets_of_a_file_from_elsewhere_are_those_we_would_write(tmp_path):
    path = tmp_path / "passages.jsonl"
    write_passages(path, PASSAGES)
    ours = offsets_path(path).read_bytes()
    offsets_path(path).unlink()
    with pytest.raises(ValueError, match="write_offsets"):
        Passages(path)
    assert write_offsets(path) == 4
    assert offsets_path(path).read_bytes() == ours


def test_a_file_that_changed_and_a_broken_row_are_told(tmp_path):
    path = tmp_path / "passages.jsonl"
    write_passages(path, PASSAGES)
    with path.open("a") as file:
        file.write('{"id": "e"}\n')
    with pytest.raises(ValueError, match="not those of this file"):
        Passages(path)
    write_offsets(path)
    with pytest.raises(ValueError, match=r"passages\.jsonl:5: .*contents"):
        Passages(path)[4]


def test_any_title_and_text_comes_back(tmp_path):
    passages = [Passage(id="x", title='a "b"\nc', text="d\n"), Passage(id="y", title="", text='"q"\nr')]
    write_passages(tmp_path / "p", passages)
    assert list(Passages(tmp_path / "p")) == passages


def test_rows_of_beir_and_compressed_files_are_read(tmp_path):
    rows = b"".join(
        orjson.dumps({"_id": f"d{n}", "title": title, "text": f"{title} is a town.", "metadata": {}}) + b"\n"
        for n, title in enumerate(("Ashford", "Ludwick"))
    )
    (tmp_path / "corpus.jsonl").write_bytes(rows)
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(rows))
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        built = BM25Index.build(tmp_path / name, tmp_path / f"index of {name}")
        for index in (built, BM25Index.open(tmp_path / f"index of {name}")):
            [hit] = index.search("Ludwick", 1)
            assert (hit.passage_id, hit.title, hit.text) == ("d1", "Ludwick", "Ludwick is a town.")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-12])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz:\d+: .*damaged"):
        list(read_passages(tmp_path / "cut.jsonl.gz"))


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("The Who", "The Who"),
        ("who is it?", "The Who"),
        ("Zurich", "Zürich"),
        ("ZÜRICH", "Zürich"),
        ("Zu\u0308rich", "Zürich"),
        ("Sao Paulo", "São Paulo"),
        ("北京", "中国"),
        ("東京タワー", "日本"),
        ("\uff4d\uff41\uff52\uff41", "Mara"),
    ],
)
def test_words_of_any_script_are_found(query, title):
    texts = {
        "The Who": "The Who play loud.",
        "Zürich": "Zürich liegt am See.",
        "São Paulo": "São Paulo is large.",
        "中国": "中国的首都是北京。",
        "日本": "高さ333メートルの東京タワーがある。",
        "Mara": "Mara sings.",
    }
    index = BM25Index.build([Passage(id=name, title=name, text=text) for name, text in texts.items()])
    assert index.search(query, 1)[0].title == title


def test_an_index_whose_words_were_read_otherwise_is_not_opened(tmp_path):
    BM25Index.build(PASSAGES, tmp_path)
    (tmp_path / "tantivy" / "polyturn_analysis").unlink()
    with pytest.raises(ValueError, match=r"reads words differently; remove .* and build it again"):
        BM25Index.open(tmp_path)


def test_the_tool_renders_results_as_search_r1_does():
    tools = Toolset([search_tool(_INDEX, top_k=2)])
    result = tools.call(ToolCall(id="1", name="search", arguments={"query": "Mara Lindqvist"}))
    assert result.content == (
        "Doc 1(Title: Mara Lindqvist) Mara Lindqvist works for Holloway Mills.\n"
        "Doc 2(Title: Holloway Mills) Holloway Mills is based in Ashford. It was once led by Mara Ek."
    )
    assert tools.call(ToolCall(id="1", name="search", arguments={"query": "zzz"})).content == NOTHING_FOUND
    assert render_hits([]) == NOTHING_FOUND
