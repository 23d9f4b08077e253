"""The text of tokens, by the tokenizer of the model that a run names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

MAX_PIECE = 16
"""Tokens that one character may be spread over."""


class Decodes(Protocol):
    """A tokenizer, as far as it is needed."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str: ...


class TokenTexts:
    """Decodes token by token; `sentence` says of which tokenizer, or why there is none."""

    def __init__(self, model: Path | None) -> None:
        """`model`: a directory with the tokenizer; None: nobody knows one."""
        self._tokenizer, self.sentence = _load(model)

    def pieces(self, token_ids: Sequence[int] | npt.NDArray[np.int32]) -> list[str] | None:
        """The text of each token; where a character is spread over several, it is that of the last, "" of the others.

        None without a tokenizer.
        """
        if self._tokenizer is None:
            return None
        pieces: list[str] = []
        waiting: list[int] = []
        for token_id in (int(one) for one in token_ids):
            waiting.append(token_id)
            text = self._decode(waiting)
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(waiting) < MAX_PIECE:
                pieces.append("")
                continue
            pieces.append(text)
            waiting = []
        if waiting:
            pieces[-1] = self._decode(waiting)
        return pieces

    def _decode(self, token_ids: list[int]) -> str:
        assert self._tokenizer is not None
        try:
            return self._tokenizer.decode(token_ids, skip_special_tokens=False)
        except (OverflowError, TypeError, ValueError, IndexError):
            return f"<{token_ids[-1]}>"  # an id that the vocabulary does not have


def _load(model: Path | None) -> tuple[Decodes | None, str]:
    if model is None:
        return None, "the run names no model with a tokenizer"
    file = model / "tokenizer.json"
    if file.is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError:
            return None, "texts of tokens need the package tokenizers: pip install 'polyturn[train]'"
        try:
            return Tokenizer.from_file(str(file)), f"of {model}"
        except Exception as error:  # noqa: BLE001  the package raises plain exceptions for a file that is damaged
            return None, f"{file} cannot be read: {str(error)[:200]}"
    if not model.is_dir():
        return None, f"the model's directory {model} is not on this machine"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None, "texts of tokens need the package transformers: pip install 'polyturn[train]'"
    try:
        return AutoTokenizer.from_pretrained(str(model), local_files_only=True), f"of {model}"
    except Exception as error:  # noqa: BLE001  it raises whatever is wrong with the files
        return None, f"{model} has no tokenizer that can be read: {str(error)[:200]}"
