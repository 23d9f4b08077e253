"""A dense index: vectors of passages in faiss, searched by inner product, and the encoders that make them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from polyturn.tools.search.corpus import (
    PASSAGES_NAME,
    PassageFinder,
    PassageLike,
    Passages,
    Store,
    place_passages,
)
from polyturn.tools.search.retrieval import Hit

Vectors = npt.NDArray[np.float32]
Pooling = Literal["mean", "cls"]


class Encoder(Protocol):
    """Makes vectors of length 1. Safe in several threads."""

    @property
    def dimension(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row for each text: (len(texts), dimension), float32."""
        ...


class TransformerEncoder:
    """A sentence encoder that `transformers` loads: its last layer pooled, and scaled to length 1.

    E5 and BGE want prefixes, which `DenseIndex` adds. Nothing is downloaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        pooling: Pooling = "mean",
        max_tokens: int = 256,
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        """
        Args:
            path: A Hugging Face model directory.
            pooling: `mean` over the tokens (E5, MiniLM), or the first token's (BGE).
            max_tokens: Longer texts are cut.
            batch_size: Texts in one forward pass.
            device: Where the model runs.

        Raises:
            ValueError: there is no such directory, or torch or transformers is not installed.
        """
        if not Path(path).is_dir():
            raise ValueError(f"{path}: no such model directory")
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f"an encoder needs {error.name}; install it with: pip install 'polyturn[train]'"
            ) from error
        self._torch = torch
        self._pooling = pooling
        self._max_tokens = max_tokens
        self._batch_size = batch_size
        self._device = device
        # A directory may bring code of its own, which is never run, nor asked about.
        files: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path), **files)
        self._model: Any = AutoModel.from_pretrained(str(path), **files).eval().to(device)

    @property
    def dimension(self) -> int:
        return int(self._model.config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row for each text. Texts of like length share a pass, so that little is padded."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(texts), self._batch_size):
            rows = order[start : start + self._batch_size]
            vectors[rows] = self._forward([texts[row] for row in rows])
        return vectors

    def _forward(self, texts: list[str]) -> Vectors:
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._device)
        with self._torch.inference_mode():
            states = self._model(**inputs).last_hidden_state
            if self._pooling == "cls":
                pooled = states[:, 0]
            else:
                mask = inputs["attention_mask"][..., None].to(states.dtype)
                pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            return self._torch.nn.functional.normalize(pooled.float(), dim=-1).cpu().numpy()


_FOLDER, _VECTORS_NAME, _OPTIONS_NAME = "dense", "index.faiss", "dense.json"
_ENCODED_AT_ONCE = 256
_TRAINING_ROWS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseOptions:
    """How passages become vectors and how those are searched."""

    factory: str = "Flat"
    """As `faiss.index_factory` takes it: `Flat`, `IVF800,SQ8`, `HNSW32,SQ8`, ..."""
    query_prefix: str = ""
    """`query: ` for E5."""
    passage_prefix: str = ""
    """`passage: ` for E5."""
    search_options: str = ""
    """As faiss' ParameterSpace takes them: `nprobe=16`, `efSearch=64`."""
    model: str | None = None
    """The encoder's directory, for opening the index; None where the encoder is given then."""
    pooling: Pooling = "mean"


E5 = DenseOptions(query_prefix="query: ", passage_prefix="passage: ")
"""What the E5 family was trained with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """What an index is made of."""

    vectors: Any
    passages: Store
    encoder: Encoder
    options: DenseOptions = field(default_factory=DenseOptions)


class DenseIndex:
    """Nearest passages by inner product, which is the cosine: encoders give vectors of length 1.

    Made by `build` or `open`. Searches may run in several threads at once.
    """

    def __init__(self, parts: _Parts) -> None:
        self._parts = parts
        self._finder = PassageFinder(parts.passages)
        if parts.options.search_options:
            with _faiss_errors(f"set {parts.options.search_options!r}"):
                _faiss().ParameterSpace().set_index_parameters(parts.vectors, parts.options.search_options)

    @classmethod
    def build(
        cls,
        passages: Iterable[PassageLike] | Path | None,
        directory: str | Path | None = None,
        *,
        encoder: Encoder,
        options: DenseOptions | None = None,
        on_passage: Callable[[int], None] | None = None,
    ) -> DenseIndex:
        """Encode and index passages; arguments as `BM25Index.build` takes them.

        Raises:
            ValueError: there are no passages, the directory holds a dense index already, or faiss refuses the factory.
        """
        options = options or DenseOptions()
        faiss = _faiss()
        store: Store
        if directory is None:
            if passages is None or isinstance(passages, Path):
                raise ValueError(
                    "an index in memory is built from passages; give a directory for a file of them"
                )
            store = tuple(passages)
        else:
            if (Path(directory) / _FOLDER).exists():
                raise ValueError(f"{directory} holds a dense index already")
            store = place_passages(Path(directory), passages)
        if len(store) == 0:
            raise ValueError("there are no passages to index")
        with _faiss_errors(f"make an index {options.factory!r} of {len(store):,} passages"):
            vectors = faiss.index_factory(encoder.dimension, options.factory, faiss.METRIC_INNER_PRODUCT)
        _fill(vectors, store, encoder, options.passage_prefix, on_passage)
        if directory is not None:
            partial = Path(directory) / f"{_FOLDER}.partial"
            partial.mkdir(exist_ok=True)
            faiss.write_index(vectors, str(partial / _VECTORS_NAME))
            (partial / _OPTIONS_NAME).write_text(json.dumps(asdict(options), indent=2), encoding="utf-8")
            partial.rename(Path(directory) / _FOLDER)
        return cls(_Parts(vectors=vectors, passages=store, encoder=encoder, options=options))

    @classmethod
    def open(cls, directory: str | Path, *, encoder: Encoder | None = None) -> DenseIndex:
        """Open an index that `build` wrote; its vectors are mapped into memory.

        Args:
            encoder: Of queries; None loads the model that the index names.

        Raises:
            ValueError: there is none, it names no model, or the model does not fit it.
        """
        folder = Path(directory) / _FOLDER
        if not (folder / _VECTORS_NAME).is_file():
            raise ValueError(f"{directory} holds no dense index")
        try:
            options = DenseOptions(**json.loads((folder / _OPTIONS_NAME).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / _OPTIONS_NAME}: not the options of a dense index: {error}"
            ) from error
        if encoder is None:
            if options.model is None:
                raise ValueError(f"{directory} does not name its encoder's model; give an encoder")
            encoder = TransformerEncoder(options.model, pooling=options.pooling)
        faiss = _faiss()
        with _faiss_errors(f"read {folder / _VECTORS_NAME}"):
            vectors = faiss.read_index(str(folder / _VECTORS_NAME), faiss.IO_FLAG_MMAP_IFC)
        if vectors.d != encoder.dimension:
            raise ValueError(
                f"{directory} has vectors of {vectors.d} numbers, the encoder makes {encoder.dimension}"
            )
        passages = Passages(Path(directory) / PASSAGES_NAME)
        return cls(_Parts(vectors=vectors, passages=passages, encoder=encoder, options=options))

    def __len__(self) -> int:
        return len(self._parts.passages)

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The `top_k` nearest passages, best first."""
        return self.search_many([query], top_k)[0]

    def search_many(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The `top_k` nearest passages of each query; the queries are encoded together."""
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}")
        if not queries:
            return []
        parts = self._parts
        encoded = parts.encoder.encode([parts.options.query_prefix + query for query in queries])
        scores, positions = parts.vectors.search(encoded, min(top_k, len(self)))
        return [
            # faiss fills up with -1 where an inverted list holds fewer.
            [self._hit(float(score), int(at)) for score, at in zip(*row, strict=True) if at >= 0]
            for row in zip(scores, positions, strict=True)
        ]

    def page(self, url: str) -> str | None:
        """The contents of the passage that a search named as `passage:ID`; None for another url."""
        return self._finder.page(url)

    def _hit(self, score: float, position: int) -> Hit:
        passage = self._parts.passages[position]
        return Hit(passage_id=passage.id, title=passage.title, text=passage.text, score=score)


def _fill(
    vectors: Any, store: Store, encoder: Encoder, prefix: str, on_passage: Callable[[int], None] | None
) -> None:
    """Encode all passages into an index, which is trained on a sample of them if it needs to be.

    The sample is drawn over the whole corpus: files are often sorted, and their first rows like no others.
    """

    def encode(positions: Sequence[int]) -> Any:
        passages = [store[at] for at in positions]
        return encoder.encode([f"{prefix}{passage.title}\n{passage.text}" for passage in passages])

    sampled: dict[int, Any] = {}
    if not vectors.is_trained:
        chosen = np.random.default_rng(0).permutation(len(store))[:_TRAINING_ROWS]
        positions = sorted(int(at) for at in chosen)
        for start in range(0, len(positions), _ENCODED_AT_ONCE):
            chunk = positions[start : start + _ENCODED_AT_ONCE]
            sampled.update(zip(chunk, encode(chunk), strict=True))
        with _faiss_errors(f"train the index on {len(sampled):,} passages"):
            vectors.train(np.stack(list(sampled.values())))
    for start in range(0, len(store), _ENCODED_AT_ONCE):
        stop = min(start + _ENCODED_AT_ONCE, len(store))
        missing = [at for at in range(start, stop) if at not in sampled]
        encoded = dict(zip(missing, encode(missing), strict=True)) if missing else {}
        rows = [encoded[at] if at in encoded else sampled.pop(at) for at in range(start, stop)]
        vectors.add(np.stack(rows))
        if on_passage is not None:
            on_passage(stop)


@contextlib.contextmanager
def _faiss_errors(what: str) -> Iterator[None]:
    """What faiss raises, as a `ValueError` that says what was tried."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).rpartition("Error: ")[2] or str(error)
        raise ValueError(f"faiss cannot {what}: {said.strip()}") from error


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "a dense index needs faiss; install it with: pip install 'polyturn[search]'"
        ) from error
    return faiss
