"""The check for machines with a GPU, at tiny sizes on a CPU: every part gives its figures, and the driver its lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.__main__ import answer
from benchmarks.gpu_check.parts import PARTS, TOTAL_S
from tests.support.megatron.ranks_pool import RankContext, RankPool

ROOT = Path(__file__).resolve().parents[3]
PLAIN = (
    # Of torch itself.
    *(
        "filelock",
        "fsspec",
        "jinja2",
        "markupsafe",
        "mpmath",
        "networkx",
        "setuptools",
        "sympy",
        "torch",
        "torchgen",
    ),
    *("triton", "typing_extensions"),
    *("annotated_types", "megatron", "numpy", "orjson", "packaging", "psutil", "pydantic", "pydantic_core"),
    *("safetensors", "typing_inspection", "yaml"),
    *("benchmarks", "polyturn"),
)
"""What torch brings along, and the small packages that docs/gpu_check.md names."""
ONLY_PLAIN = f"""
import importlib.machinery, importlib.metadata, sys
ALLOWED = {{*{PLAIN!r}, *sys.stdlib_module_names}}
KNOWN = set(importlib.metadata.packages_distributions())
class Plain(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in KNOWN and top not in ALLOWED and not top.startswith("_"):
            return None
        return super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Plain
"""


def ask(context: RankContext, name: str) -> dict[str, Any]:
    (part,) = (part for part in PARTS if part.name == name)
    return answer(part, "cpu")


@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_each_part_works_at_tiny_sizes(rank_pool: RankPool, name: str) -> None:
    (found,) = rank_pool.run(1, ask, name)
    if name == "transformer_layers":
        assert found["state"] == "skipped" and "transformer_engine is not installed" in found["reason"]
        assert 0 < found["torch"]["error_before"] < 0.01
        return
    assert found["state"] == "passed", found
    assert found["device"] == "cpu" and len(found) > 2


def test_the_driver_says_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    """With nothing installed but what docs/gpu_check.md asks for, and without torch's GPU."""
    (tmp_path / "sitecustomize.py").write_text(ONLY_PLAIN)
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "src")])
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--only", "mfu"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["gpu_check"], line["state"]) == ("mfu", "passed") and line["mfu"] > 0, line


def test_a_part_that_hangs_or_breaks_is_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(part.limit_s for part in PARTS) <= TOTAL_S
    from benchmarks.gpu_check import __main__ as driver

    programs = {"logprob_head": "import time; time.sleep(60)", "mfu": "raise SystemExit('no such luck')"}
    real = subprocess.Popen

    def started(command: list[str], **kwargs: Any) -> Any:
        return real([sys.executable, "-S", "-c", programs[command[4]]], **kwargs)

    monkeypatch.setattr(driver.subprocess, "Popen", started)
    parts = {part.name: part for part in PARTS}
    assert driver.ask(parts["logprob_head"], "cpu", limit_s=0.2) == {
        "state": "failed",
        "reason": "it took longer than 0 s",
    }
    assert driver.ask(parts["mfu"], "cpu", limit_s=20) == {"state": "failed", "reason": "no such luck"}
