"""Rows are data: they choose by name among what the recipe declares, and bring no code, URL or option."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.messages import EnvironmentChoice
from polyturn.envs.tasks import GeneratedTasks, RowReader
from polyturn.envs.tasks.sources import open_source
from polyturn.tools.tool import Tool
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolSpec


def attacks(marker):
    """What rows tried; each would leave the file `marker`, or call out."""
    popen = {"kind": "function", "target": "subprocess:Popen", "options": {"args": ["touch", str(marker)]}}
    remote = {"kind": "remote", "url": "http://127.0.0.1:9/grade"}
    return [
        {"reward": popen},
        {"reward": {"kind": "function", "target": f"{marker.parent / 'beside.py'}:grade"}},
        {"reward": {"kind": "rubric", "parts": [{"name": "a", "reward": popen}]}},
        {"reward": {"kind": "rubric", "parts": [{"name": "a", "weight": 0, "reward": remote}]}},
        {"reward": remote},
        {"reward": {"kind": "rule", "name": "regex", "options": {"pattern": "(a+)+$"}}},
        {"reward": {"name": "unit_tests", "options": {"timeout_s": 1e9}}},
        {"reward": {"kind": "environment"}},
        {"reward": "subprocess:Popen"},
        {"reward": str(marker.parent / "beside.py") + ":grade"},
        {"reward": "contains"},
        {"reward": ["right"]},
        {"reward": True},
        {"environment": {"id": "polyturn/TextEnv-v0", "options": {"env_id": "beside:Env-v0"}}},
        {"environment": {"id": "polyturn/OpenEnv-v0", "options": {"url": "http://127.0.0.1:9"}}},
        {"environment": {"id": "small", "options": {"tasks": "/etc/passwd"}}},
        {"environment": "polyturn/PythonTool-v0"},
        {"environment": "beside:Env-v0"},
        {"environment": ["small"]},
    ]


NUM_ATTACKS = 19


def config(path, **options):
    return TaskSourceConfig(
        path=str(path),
        environments={"small": {"id": "polyturn/TwoHopSearch-v0", "options": {"num_people": 9}}},
        rewards={"right": {"kind": "rule", "name": "exact_match"}},
        **options,
    )


@pytest.fixture
def marker(tmp_path):
    file = tmp_path / "owned"
    (tmp_path / "beside.py").write_text(
        f"open({str(file)!r}, 'w').close()\ndef grade(episode):\n    return 1.0\n"
    )
    return file


@pytest.mark.parametrize("index", range(NUM_ATTACKS))
def test_a_row_that_brings_something_is_refused_with_its_line_and_the_way_out(tmp_path, marker, index):
    assert len(attacks(marker)) == NUM_ATTACKS
    attack = attacks(marker)[index]
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "q", "answer": "a", "reward": "right"}, {"prompt": "q", "answer": "a", **attack}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (key,) = attack
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: '{key}': .*the source declares under '{key}s'"):
        open_source(config(path))
    assert not marker.exists()


def test_columns_and_made_rows_are_no_more_trusted(tmp_path, marker):
    popen = attacks(marker)[0]["reward"]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "answer": "a", "reward": popen}]), path)
    with pytest.raises(ValueError, match=r"rows\.parquet:1: 'reward': a row may not describe rewards"):
        open_source(config(path))
    with pytest.raises(ValueError, match="task 0: 'reward': a row may not describe rewards"):
        GeneratedTasks(lambda index, seed: {"prompt": "q", "answer": "a", "reward": popen})
    assert not marker.exists()


def test_rows_choose_what_is_declared(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"prompt": "q", "answer": "a", "reward": "right", "environment": "small"}) + "\n"
    )
    task = open_source(config(path))[0]
    assert task.reward.name == "exact_match"
    assert task.environment == EnvironmentChoice(env_id="polyturn/TwoHopSearch-v0", options={"num_people": 9})


def test_lists_declare_rules_and_environments_by_their_own_names():
    declared = TaskSourceConfig(
        path="x.jsonl", rewards=["f1", "numeric"], environments=["polyturn/SingleTurn-v0"]
    )
    assert [reward.name for reward in declared.rewards.values()] == list(declared.rewards)
    assert {name: one.id for name, one in declared.environments.items()} == {
        "polyturn/SingleTurn-v0": "polyturn/SingleTurn-v0"
    }


def test_what_is_declared_wrongly_is_named_by_its_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": "a"}) + "\n")
    with pytest.raises(ValueError, match=r"rewards\.f2: there is no reward rule 'f2'; did you mean"):
        open_source(TaskSourceConfig(path=str(path), rewards=["f2"]))
    with pytest.raises(ValueError, match=r"environments\.a: there is no environment 'none/None-v0'"):
        open_source(TaskSourceConfig(path=str(path), environments={"a": {"id": "none/None-v0"}}))


def test_rows_that_are_vouched_for_describe_rewards_and_environments(tmp_path, marker):
    path = tmp_path / "rows.jsonl"
    reward = {"kind": "function", "target": f"{tmp_path / 'beside.py'}:grade"}
    path.write_text(
        json.dumps({"prompt": "q", "answer": "a", "reward": reward, "environment": "polyturn/SingleTurn-v0"})
    )
    task = open_source(config(path, trusted_rows=True))[0]
    assert marker.exists()
    assert task.environment == EnvironmentChoice(env_id="polyturn/SingleTurn-v0")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(given=JSON.filter(lambda value: value is not None and value != "right"))
def test_nothing_but_a_declared_name_is_taken(given):
    reader = RowReader(rewards={"right": lambda episode: 1.0}, environments={})
    for key in ("reward", "environment"):
        with pytest.raises(ValueError, match=rf"^file:7: '{key}': "):
            reader.read({"prompt": "q", "answer": "a", key: given}, "file:7", default_id="x")


def test_a_dry_run_runs_nothing_of_a_row(tmp_path, marker):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "answer": "a", **attacks(marker)[0]}))
    (tmp_path / "recipe.yaml").write_text(
        "name: t\nmodel: {path: 'builtin:tiny-searcher'}\n"
        "environment: {id: polyturn/SingleTurn-v0, tasks: rows.jsonl, max_tokens_per_episode: 512}\n"
        "rollout: {prompts_per_step: 2, samples_per_prompt: 2}\n"
        "trainer: {num_steps: 1, global_batch_size: 4, device: cpu}\nengines: {device: cpu}\n"
        "reward: {kind: rule, name: exact_match}\n"
    )
    command = [sys.executable, "-m", "polyturn", "train", "recipe.yaml", "--dry-run"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode != 0
    assert "rows.jsonl:1: 'reward': a row may not describe rewards" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("http://127.0.0.1:9/schema", "only what stands in the schema itself is read"),
        ("file:///etc/hostname", "only what stands in the schema itself is read"),
        ("other.json#/a", "only what stands in the schema itself is read"),
        ("#/$defs/none", "which is not in their schema"),
    ],
)
def test_a_foreign_tools_schema_chooses_nothing_to_fetch(reference, words):
    schema = {"type": "object", "properties": {"a": {"anyOf": [{"$ref": reference}]}}}
    foreign = Tool(spec=ToolSpec(name="t", description="", parameters=schema), function=lambda **_: "ok")
    with pytest.raises(ValueError, match=words):
        Toolset([foreign])
