"""A suite is proved before a model plays it: what is wrong with one is found, and what is well is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.configs.loading.loader import load_config, shipped_names
from polyturn.configs.loading.suites import load_evaluation, missing_needs, read_suite
from polyturn.configs.schema.suite import Accepted
from polyturn.rollout.evaluation.validate import EntryProof, validate_entry
from tests.support.command_line import in_this_process

SUM = {"prompt": "What is 17 + 25?", "answer": "42"}
ROWS = [
    SUM,
    {"prompt": "What is 1 + 2?", "answer": "3"},
    {"prompt": "Name the capital of Norway.", "answer": "Oslo"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def proof(tmp_path: Path, rows: list[dict[str, Any]], *, training: Any = (), **options: Any) -> EntryProof:
    overrides = [
        "environment.id=polyturn/SingleTurn-v0",
        f"evaluation.tasks={write(tmp_path / 'test.jsonl', rows)}",
        *options.pop("overrides", ()),
    ]
    if training:
        overrides.append(f"environment.tasks={write(tmp_path / 'train.jsonl', training)}")
    return validate_entry("mine", load_config("quickstart", overrides), num_played=8, **options)


def failed(found: EntryProof) -> list[str]:
    return [finding.check for finding in found.findings if finding.severity == "fail"]


def test_a_good_set_is_valid(tmp_path: Path) -> None:
    found = proof(tmp_path, ROWS, training=[{"prompt": "What is 3 + 4?", "answer": "7"}])
    assert found.ok and found.findings == ()
    assert found.scores == {"oracle": 1.0, "nothing": 0.0, "random": 0.0, "gold": 1.0}
    assert (found.num_tasks, found.num_played, found.num_training) == (3, 3, 1)


def test_duplicates_and_tasks_that_are_trained_on_refuse_it(tmp_path: Path) -> None:
    rows = [*ROWS, {**SUM, "prompt": "what is 17 + 25"}]
    found = proof(tmp_path, rows, training=[{"prompt": "NAME the capital of Norway", "answer": "-"}])
    assert failed(found) == ["duplicates", "leaks"]
    assert "1 of 4 tasks are trained on, such as test-3 (train-1)" in found.findings[1].sentence
    known = [Accepted(check="duplicates", num_tasks=1, why="it was published so.")]
    found = proof(tmp_path, rows, accepts=known)
    assert found.ok and found.findings[-1].sentence.endswith("1 are accepted: it was published so.")
    assert failed(proof(tmp_path, [*rows, SUM], accepts=known)) == ["duplicates"]


def test_what_pays_anybody_or_nobody_is_found(tmp_path: Path) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def always(episode):\n    return 1.0\n\n\ndef never(episode):\n    return 0.0\n")
    always = [f"reward={{kind: function, target: '{rewards}:always'}}"]
    assert failed(proof(tmp_path, ROWS, overrides=always)) == ["do_nothing", "random"]
    never = [f"reward={{kind: function, target: '{rewards}:never'}}"]
    found = proof(tmp_path, ROWS, overrides=never)
    assert failed(found) == ["oracle"]
    assert "the oracle does not solve 3 of 3 tasks, such as test-1 (scores 0)" in found.findings[0].sentence
    assert failed(proof(tmp_path, ROWS, overrides=never, has_oracle=False)) == []


def test_a_grader_that_fails_and_tasks_that_cannot_be_had_are_told(tmp_path: Path) -> None:
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def broken(episode):\n    raise OSError('no grader here')\n")
    found = proof(
        tmp_path,
        ROWS,
        overrides=[
            f"reward={{kind: function, target: '{rewards}:broken'}}",
            "rollout.max_retries=0",
        ],
    )
    assert set(failed(found)) == {"played"} and "no grader here" in found.findings[0].sentence
    found = proof(tmp_path, [{"prompt": "What?"}])
    assert failed(found) == ["tasks"] and "test.jsonl:1: a task has one of" in found.findings[0].sentence
    found = proof(tmp_path, [])
    assert failed(found) == ["tasks"] and "the file holds no task" in found.findings[0].sentence


def test_the_command_prints_one_table_and_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "test.jsonl", [*ROWS, SUM])
    (tmp_path / "mine.yaml").write_text(
        "name: mine\nrecipe: quickstart\nentries:\n"
        "  - environment: {id: polyturn/SingleTurn-v0, tasks: test.jsonl}\n"
        "    evaluation: {split: heldout}\n"
    )
    done = in_this_process("eval", "validate", "mine.yaml", "--tasks", "2")
    assert done.returncode == 1
    *told, head, row, verdict, last = done.stdout.splitlines()
    assert any("SingleTurn: fail: duplicates: 1 of 4 tasks stand there before" in line for line in told)
    assert head.split()[:4] == ["entry", "split", "tasks", "played"]
    assert row.split()[:6] == ["SingleTurn", "heldout", "4", "2", "1.000", "0.000"] and row.endswith("FAIL")
    assert verdict == "mine: NOT valid"
    assert json.loads(last)["entries"][0]["counts"]["duplicates"] == 1
    refused = in_this_process("eval", "validate", "search-qa", "data=nowhere")
    assert refused.returncode == 2 and refused.stderr.count("there is no 'nowhere/") == 7
    assert "Get nq/test.jsonl of the data set RUC-NLPIR/FlashRAG_datasets on Hugging Face." in refused.stderr


def test_shipped_suites_are_listed(tmp_path: Path) -> None:
    done = in_this_process("eval", "list", "--data", str(tmp_path))
    assert done.returncode == 0
    listed = {suite["name"]: suite for suite in json.loads(done.stdout.splitlines()[-1])["suites"]}
    assert listed.keys() == set(shipped_names("suite"))
    sizes = {entry["name"]: entry["num_tasks"] for entry in listed["search-qa"]["entries"]}
    assert sum(sizes.values()) == 51_713  # the rows of Search-R1's test.parquet
    assert listed["games"]["entries"][0]["missing"] == []
    assert f"{tmp_path}/mbpp/mbpp.jsonl: Get mbpp/mbpp.jsonl of google-research" in done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of every file that a shipped suite needs, in the form in which it is published."""
    where = tmp_path_factory.mktemp("data")
    questions = [
        {
            "id": "test_0",
            "question": "who wrote he ain't heavy",
            "golden_answers": ["Bobby Scott"],
            "metadata": {},
        },
        {"id": "test_1", "question": "What year?", "golden_answers": ["1999", "the year 1999"]},
    ]
    problems = [
        {"problem": "Convert $(0,3)$ to polar coordinates.", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"},
        {"problem": "Find $m + n$.", "answer": "113", "solution": "It is $\\boxed{113}$."},
    ]
    school = [{"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}]
    function = "def twice(x):\n    return 2 * x"
    mbpp = [
        {
            "task_id": index,
            "text": f"Double it, {index}.",
            "code": function,
            "test_list": ["assert twice(2) == 4"],
        }
        for index in (11, 602)
    ]
    humaneval = [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def twice(x):\n    """Double it."""\n',
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n",
            "entry_point": "twice",
        }
    ]
    for name in shipped_names("suite"):
        for entry in read_suite(name)[0].entries:
            for need in entry.needs:
                if not need.required or need.file is None or name == "harbor":
                    continue
                path = where / need.file
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = {"search-qa": questions, "math": problems, "code": humaneval}[name]
                if path.suffix == ".parquet":
                    pq.write_table(pa.Table.from_pylist(rows), path)
                else:
                    write(path, {"gsm8k": school, "mbpp": mbpp}.get(entry.called, rows))
    (where / "passages.jsonl").write_text('{"id": "0", "contents": "\\"Nothing\\"\\nNothing is here."}\n')
    return where


@pytest.mark.parametrize("name", [name for name in shipped_names("suite") if name != "harbor"])
def test_shipped_suites_are_valid(name: str, data: Path) -> None:
    """What ships whole as it is, the rest with a few rows of each file; Harbor's tasks need Docker."""
    overrides = [f"data={data}", "evaluation.num_tasks=64"]
    if name == "search-qa":
        overrides += [
            "environment.options.search_url=null",
            f"environment.options.corpus={data / 'passages.jsonl'}",
        ]
    written = {entry.called: entry for entry in read_suite(name, overrides)[0].entries}
    for loaded in load_evaluation(name, overrides).entries:
        entry = written[loaded.name]
        assert [need for need in missing_needs(entry, data) if need.required] == []
        found = validate_entry(loaded.name, loaded.config, num_played=1, accepts=entry.accepts)
        assert found.ok and found.scores["oracle"] == 1.0, found
