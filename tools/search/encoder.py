"""Texts as vectors: the protocol, and sentence encoders in Hugging Face directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

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
