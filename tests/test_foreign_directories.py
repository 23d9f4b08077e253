"""Directories that bring code of their own: nothing of it is run, and nobody is asked whether to."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polyturn.agents.chat import load_tokenizer
from polyturn.tools.search.dense import TransformerEncoder


@pytest.mark.parametrize("load", [load_tokenizer, TransformerEncoder])
def test_code_in_a_model_directory_is_not_run(
    load: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, ran = tmp_path / "model", tmp_path / "ran"
    directory.mkdir()
    (directory / "theirs.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n", encoding="utf-8")
    names = {
        "AutoConfig": "theirs.Config",
        "AutoTokenizer": ["theirs.Slow", None],
        "AutoModel": "theirs.Model",
    }
    for file in ("config.json", "tokenizer_config.json"):
        (directory / file).write_text(
            json.dumps({"model_type": "theirs", "auto_map": names}), encoding="utf-8"
        )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(directory)
    assert not ran.exists()
