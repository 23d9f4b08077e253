"""Files that are held out whole, as published sets are."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.envs.math.env import GSM8KEnv, MathEnv

MATH_500 = {
    "problem": "Convert the point $(0,3)$ in rectangular coordinates to polar coordinates.",
    "solution": "Therefore, the polar coordinates are $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
    "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
    "subject": "Precalculus",
    "level": 2,
    "unique_id": "test/precalculus/807.json",
}
AIME = {
    "id": 60,
    "problem": "Find $m + n$.",
    "solution": "So $m + n = 113$.",
    "answer": "113",
    "year": "2024",
    "url": None,
}
GSM8K = {"question": "How many clips?", "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 24"}


def test_jsonl_and_parquet_are_held_out_whole(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(MATH_500) + "\n")
    pq.write_table(pa.Table.from_pylist([AIME, AIME | {"problem": "Find $n$."}]), tmp_path / "test.parquet")
    (tmp_path / "train.jsonl").write_text(json.dumps(GSM8K) + "\n")
    math = MathEnv(heldout_path=str(tmp_path / "test.jsonl"))
    assert math.tasks("test")[0].label == MATH_500["answer"]
    with pytest.raises(ValueError, match="there is no split 'train': give a file of it as path="):
        math.tasks("train")
    gsm8k = GSM8KEnv(heldout_path=str(tmp_path / "test.parquet"), path=str(tmp_path / "train.jsonl"))
    assert [len(gsm8k.tasks(split)) for split in ("train", "heldout")] == [1, 2]
    assert gsm8k.tasks("train")[0].label == "24"
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the file holds no problem"):
        MathEnv(heldout_path=str(tmp_path / "empty.jsonl")).tasks("heldout")
