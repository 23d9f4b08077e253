"""An embedded BM25 index (tantivy), in memory or in a directory.

The index holds positions of passages only; titles and texts stay in the passage file, which is mapped into memory.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tantivy

from polyturn.tools.search.corpus import (
    PASSAGES_NAME,
    PassageFinder,
    PassageLike,
    Passages,
    Store,
    place_passages,
)
from polyturn.tools.search.retrieval import Hit

_WORDS = (
    "a about above after again against all am an and any are as at be because been before being below "
    "between both but by could did do does doing during each for from further had has have having he her "
    "here herself him himself his how i if in into is it its itself me more most my no nor not of off on "
    "once only or other our ourselves out over own same she should so some such than that the their them "
    "themselves then there these they this those through to too under until very was we were what when "
    "where which while who why will with would you your yourself "
)
STOP_WORDS = tuple(_WORDS.split())


_FIELD = "contents"
_POSITION = "position"
_TOKENIZER = "polyturn_english"
# A bound, not an allocation. What fits becomes one segment, and one segment is searched faster than many.
_HEAP_BYTES = 1024 * 1024 * 1024
_INDEX_NAME = "tantivy"
_ANALYSIS_NAME, _ANALYSIS = "polyturn_analysis", "all words, accents folded, ideographs apart\n"
"""Which file of an index says how its words were read, and what it says."""
_IDEOGRAPH = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no spaces between words: each counts as a word."""


class BM25Index:
    """BM25 over title and text of passages: words in lower case without accents, stemmed; Chinese by letter.

    English function words of a query are dropped, unless it has no other (the band "The Who").

    Made by `build` or `open`. Searches may run in several threads at once.
    """

    is_quick = True
    """A search costs less than handing it to another thread."""

    def __init__(self, index: Any, passages: Store) -> None:
        self._index = index
        self._passages = passages
        self._searcher = index.searcher()
        self._analyzer = _analyzer(drop=STOP_WORDS)
        self._full_analyzer = _analyzer()
        self._finder = PassageFinder(passages)

    @classmethod
    def build(
        cls,
        passages: Iterable[PassageLike] | Path | None,
        directory: str | Path | None = None,
        *,
        on_passage: Callable[[int], None] | None = None,
    ) -> BM25Index:
        """Index passages.

        Args:
            passages: Anything with `id`, `title` and `text`; or, with a directory, a file in wiki-18's format, which is
                linked and not copied; or None, for those that are in the directory.
            directory: Where index and passages are written; None keeps both in memory.
            on_passage: Told the number of passages so far after each.

        Raises:
            ValueError: there are no passages, or the directory holds an index already.
        """
        store: Store
        if directory is None:
            if passages is None or isinstance(passages, Path):
                raise ValueError(
                    "an index in memory is built from passages; give a directory for a file of them"
                )
            store = tuple(passages)
            index = tantivy.Index(_schema())
        else:
            folder = Path(directory)
            if (folder / _INDEX_NAME).exists():
                raise ValueError(f"{folder} holds an index already; open it, or build into another directory")
            store = place_passages(folder, passages)
            # Renamed at the end: an index that was not finished must not look like a small one.
            partial = folder / f"{_INDEX_NAME}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / _ANALYSIS_NAME).write_text(_ANALYSIS, encoding="utf-8")
            index = tantivy.Index(_schema(), path=str(partial))
        if len(store) == 0:
            raise ValueError("there are no passages to index")
        index.register_tokenizer(_TOKENIZER, _analyzer())
        # One thread keeps the passages in order, so that equal builds rank equal scores equally.
        writer = index.writer(heap_size=_HEAP_BYTES, num_threads=1)
        for position in range(len(store)):
            document = tantivy.Document()
            document.add_unsigned(_POSITION, position)
            passage = store[position]
            document.add_text(_FIELD, _spaced(f"{passage.title}\n{passage.text}"))
            writer.add_document(document)
            if on_passage is not None:
                on_passage(position + 1)
        writer.commit()
        writer.wait_merging_threads()
        if directory is not None:
            partial.rename(Path(directory) / _INDEX_NAME)
            index = tantivy.Index.open(str(Path(directory) / _INDEX_NAME))
        index.reload()
        return cls(index, store)

    @classmethod
    def open(cls, directory: str | Path) -> BM25Index:
        """Open an index that `build` wrote.

        Raises:
            ValueError: there is none, or its passages are missing.
        """
        folder = Path(directory)
        if not (folder / _INDEX_NAME).is_dir() or not tantivy.Index.exists(str(folder / _INDEX_NAME)):
            raise ValueError(f"{folder} holds no search index")
        analysis = folder / _INDEX_NAME / _ANALYSIS_NAME
        if not analysis.is_file() or analysis.read_text(encoding="utf-8") != _ANALYSIS:
            raise ValueError(
                f"{folder} holds an index that reads words differently; remove {folder / _INDEX_NAME} "
                "and build it again"
            )
        index = tantivy.Index.open(str(folder / _INDEX_NAME))
        # The index names its tokenizer without containing it. Only writing needs it: a query is split by `_parse`.
        return cls(index, Passages(folder / PASSAGES_NAME))

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The `top_k` passages of the highest score, best first; of equal scores the earlier passage comes first.

        Empty when no word of the query is in the index.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        query_of_words = self._parse(query)
        if query_of_words is None:
            return []
        limit = top_k + 8
        ranked = self._ranked(query_of_words, limit)
        # A tie across the limit would be cut in the engine's order, which depends on how segments were merged.
        while len(ranked) == limit and limit < len(self) and ranked[top_k - 1][0] == ranked[-1][0]:
            limit *= 4
            ranked = self._ranked(query_of_words, limit)
        return [self._hit(-negated, position) for negated, position in sorted(ranked)[:top_k]]

    def page(self, url: str) -> str | None:
        """The contents of the passage that a search named as `passage:ID`; None for another url."""
        return self._finder.page(url)

    def _parse(self, query: str) -> Any | None:
        """Any of the query's words; None without any. Tantivy's query language would read `a:b` and `NOT` as syntax."""
        query = _spaced(query)
        words = self._analyzer.analyze(query) or self._full_analyzer.analyze(query)
        clauses = [
            (
                tantivy.Occur.Should,
                tantivy.Query.term_query(self._index.schema, _FIELD, word, index_option="freq"),
            )
            for word in words
        ]
        return tantivy.Query.boolean_query(clauses) if clauses else None

    def _ranked(self, query: Any, limit: int) -> list[tuple[float, int]]:
        """(negated score, position) of the best documents."""
        hits = self._searcher.search(query, limit=limit, count=False).hits
        positions = self._searcher.fast_field_values(_POSITION, [address for _, address in hits])
        return [(-score, position) for (score, _), position in zip(hits, positions, strict=True)]

    def _hit(self, score: float, position: int) -> Hit:
        passage = self._passages[position]
        return Hit(passage_id=passage.id, title=passage.title, text=passage.text, score=score)


def _schema() -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field(_POSITION, stored=False, fast=True)
    builder.add_text_field(_FIELD, stored=False, tokenizer_name=_TOKENIZER, index_option="freq")
    return builder.build()


def _analyzer(drop: Sequence[str] = ()) -> Any:
    builder = (
        tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        .filter(tantivy.Filter.remove_long(64))
        .filter(tantivy.Filter.lowercase())
        .filter(tantivy.Filter.ascii_fold())
    )
    if drop:
        builder = builder.filter(tantivy.Filter.custom_stopword(list(drop)))
    return builder.filter(tantivy.Filter.stemmer("english")).build()


def _spaced(text: str) -> str:
    """The text in composed letters, with spaces around those of scripts that put none between words."""
    if text.isascii():
        return text
    return _IDEOGRAPH.sub(r" \g<0> ", unicodedata.normalize("NFKC", text))
