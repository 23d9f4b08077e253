"""What is exported is read by the programs that it is for, whatever a model wrote, and holds no keys."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from polyturn.configs.errors import ConfigError
from polyturn.rollout.evaluation.export.formats import export
from polyturn.rollout.store import TrajectoryStore
from tests.support.evaluations import HOSTILE, SECRET, episode, make_evaluation

SCHEMAS = Path(__file__).parents[2] / "support" / "schemas"
"""JSON Schemas that the packages themselves give, of what is written here: `Trajectory` of harbor 0.26.0, and `EvalLog`
of inspect_ai 0.3.285 without events, closed to keys that inspect would drop."""
NUM_EPISODES = 8


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_evaluation(tmp_path_factory.mktemp("evaluations") / "one")


def written(source: Path, kind: str, output: Path) -> tuple[Path, list[str]]:
    told: list[str] = []
    found = export(source, kind, output, tell=told.append)
    assert found.num_episodes == NUM_EPISODES and found.num_blanked == 1
    return found.paths[0], told


def check(value: Any, schema: str) -> None:
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{schema}.json").read_text())).validate(value)


def test_openai_messages_are_taken_by_openai_and_datasets(evaluation: Path, tmp_path: Path) -> None:
    import datasets
    from openai.types.chat import ChatCompletionFunctionToolParam, ChatCompletionMessageParam
    from pydantic import TypeAdapter

    path, told = written(evaluation, "openai", tmp_path / "rows.jsonl")
    assert told == ["one: 1 episodes have a line and no trajectory, and are left out"]
    # Python's own idea of lines is the widest.
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        TypeAdapter(list[ChatCompletionMessageParam]).validate_python(row["messages"])
        TypeAdapter(list[ChatCompletionFunctionToolParam]).validate_python(row["tools"])
    first, hostile, secret, failed = rows[0], rows[2], rows[3], rows[5]
    calls = [call for message in first["messages"] for call in message.get("tool_calls", ())]
    assert json.loads(calls[0]["function"]["arguments"]) == {"query": first["messages"][1]["content"]}
    assert (
        [message.get("tool_call_id") for message in first["messages"] if message["role"] == "tool"]
        == [call["id"] for call in calls]
        == ["call_0", "call_1"]
    )
    assert first["messages"][2]["reasoning_content"] == "Look it up."
    assert first["metadata"]["score"] == 1.0 and first["metadata"]["answer"] == "Carnwick"
    assert hostile["messages"][-1]["content"] == HOSTILE
    assert failed["metadata"]["score"] is None and failed["metadata"]["failure"] == "infrastructure"
    assert SECRET not in path.read_text() and "[credentials]" in secret["messages"][1]["content"]
    loaded = datasets.load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == NUM_EPISODES


def test_parquet_is_loaded_by_datasets_with_types_and_without_the_tokens_of_a_key(
    evaluation: Path, tmp_path: Path
) -> None:
    import datasets

    path, _ = written(evaluation, "hf", tmp_path / "rows.parquet")
    rows = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.features["score"].dtype == "float64"
    assert rows[0]["segments"][0]["token_ids"] == list(range(3, 15))
    assert rows[0]["metrics"] == [{"name": "hops", "value": 2.0}]
    assert json.loads(rows[0]["tools"])[0]["function"]["name"] == "search"
    assert rows[2]["messages"][-1]["content"] == HOSTILE
    assert rows[3]["segments"] == [] and SECRET not in str(rows[3])
    assert rows[5]["score"] is None


def test_atif_follows_harbors_schema_in_files_and_in_lines(evaluation: Path, tmp_path: Path) -> None:
    folder, _ = written(evaluation, "atif", tmp_path / "trajectories")
    lines, _ = written(evaluation, "atif", tmp_path / "trajectories.jsonl")
    files = sorted(folder.iterdir())
    assert len(files) == NUM_EPISODES
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert sorted(each["trajectory_id"] for each in found) == [path.stem for path in files]
    for each in found:
        check(each, "atif")
        assert [step["step_id"] for step in each["steps"]] == list(range(1, 6))
        for step in each["steps"]:
            made = {call["tool_call_id"] for call in step.get("tool_calls", ())}
            results = step.get("observation", {"results": []})["results"]
            assert {result["source_call_id"] for result in results} == made
    metrics = found[0]["steps"][2]["metrics"]
    assert metrics["completion_token_ids"] == [5] and metrics["prompt_tokens"] == 2
    assert found[0]["extra"]["score"] == 1.0 and "score" not in found[5]["extra"]
    assert SECRET not in lines.read_text()


def test_inspects_log_follows_its_schema(evaluation: Path, tmp_path: Path) -> None:
    path, _ = written(evaluation, "inspect", tmp_path / "log.json")
    log = json.loads(path.read_text())
    check(log, "inspect_log")
    samples = {sample["uuid"]: sample for sample in log["samples"]}
    assert len({(sample["id"], sample["epoch"]) for sample in log["samples"]}) == NUM_EPISODES
    failed = samples["one/eval000004.0.0"]
    assert "scores" not in failed and failed["error"]["message"] == "the engine was away"
    assert samples["one/eval000003.0.0"]["limit"]["type"] == "turn"
    assert log["results"]["scores"][0]["unscored_samples"] == 1
    assert log["results"]["scores"][0]["metrics"]["mean"]["value"] == pytest.approx(5.25 / 7)
    assert SECRET not in path.read_text()


@pytest.mark.slow
def test_inspect_reads_its_logs_back(tmp_path: Path) -> None:
    inspect = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed here")
    source = make_evaluation(tmp_path / "two", entries=("one", "two"))
    exported = export(source, "inspect", tmp_path / "logs", tell=lambda _: None)
    assert [path.name for path in exported.paths] == ["one.eval", "two.eval"]
    export(make_evaluation(tmp_path / "one"), "inspect", tmp_path / "one.json", tell=lambda _: None)
    for path in (*exported.paths, tmp_path / "one.json"):
        log = inspect.read_eval_log(str(path))
        head = inspect.read_eval_log(str(path), header_only=True)
        assert log.status == "success" and head.samples is None and head.results == log.results
        assert len(log.samples) == len(inspect.read_eval_log_sample_summaries(str(path))) == NUM_EPISODES
        hostile = next(sample for sample in log.samples if sample.uuid.endswith("/eval000001.0.0"))
        assert hostile.messages[-1].text == HOSTILE
        alone = inspect.read_eval_log_sample(str(path), id=hostile.id, epoch=hostile.epoch)
        assert alone.messages == hostile.messages and alone.scores["polyturn"].value == 1.0
        call = hostile.messages[2].tool_calls[0]
        assert (call.function, call.arguments) == ("search", {"query": HOSTILE})


def test_a_run_and_a_file_of_it_are_exported_in_order_of_their_steps(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = TrajectoryStore(run)
    for step in (1, 2):
        store.write_step(step, [episode(step, sample, 1.0) for sample in range(2)])
    store.close()
    (run / "config.yaml").write_text("name: mine\nenvironment: {id: polyturn/TwoHopSearch-v0}\n")
    found = export(run, "openai", tmp_path / "run.jsonl", tell=print)
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert found.num_episodes == 4 and [row["metadata"]["step"] for row in rows] == [1, 1, 2, 2]
    assert rows[0]["tools"][0]["function"]["name"] == "search"
    assert export(store.path(2), "hf", tmp_path / "a.parquet", tell=print).num_episodes == 2


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(evaluation: Path, tmp_path: Path) -> None:
    two = make_evaluation(tmp_path / "two", entries=("one", "two"))
    (tmp_path / "there.jsonl").touch()
    for source, kind, name, sentence in (
        (evaluation, "csv", "a.csv", "'csv' is none; the formats are inspect, openai, hf, atif"),
        (evaluation, "openai", "a.txt", "must end with .jsonl"),
        (evaluation, "openai", "there.jsonl", "is there already"),
        (tmp_path / "nowhere", "openai", "a.jsonl", "is not there"),
        (tmp_path, "openai", "a.jsonl", "is neither an evaluation"),
        (two, "inspect", "a.eval", "the suite has 2 entries: name a directory"),
    ):
        with pytest.raises(ConfigError) as refused:
            export(source, kind, tmp_path / name, tell=print)
        assert sentence in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.jsonl", "two"]


def test_memory_does_not_grow_with_the_number_of_episodes(tmp_path: Path) -> None:
    def peak(num_episodes: int) -> int:
        store = TrajectoryStore(tmp_path / str(num_episodes))
        long = "word " * 2_000
        each = episode(0, 0, 1.0)
        messages = (*each.messages[:-1], {"role": "assistant", "content": long})
        for number in range(num_episodes):
            segment = each.segments[0]
            store.journal(0, episode(number, 0, 1.0, messages=messages, segments=(segment,)))
        store.write_step(1, store.journaled(0))
        store.close()
        path = store.path(1)
        tracemalloc.start()
        export(path, "openai", tmp_path / f"{num_episodes}.jsonl", tell=print)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(8)
    few, many = peak(16), peak(128)
    assert many < few + 500_000, (few, many)
