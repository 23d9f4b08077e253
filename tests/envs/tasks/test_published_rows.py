"""Rows as published data sets write them, by the options that read them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.configs.schema.tasks import TaskSourceConfig
from polyturn.envs.messages import AssistantMessage, EpisodeView, as_score
from polyturn.envs.rewards.rules import check_label, make_rule
from polyturn.envs.tasks.sources import open_source

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]


def source(tmp_path, rows, *, suffix="jsonl", **options):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(TaskSourceConfig(path=str(path), **options))


def verl_row(index, **changes):
    return {
        "data_source": "openai/gsm8k",
        "prompt": QUESTION,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "42"},
        "extra_info": {"index": index, "split": "train", "answer": "17 + 25 = 42\n#### 42"},
        **changes,
    }


VERL = {"label_key": "reward_model.ground_truth", "id_key": "extra_info.index", "metadata_key": "extra_info"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("other_keys", ["keep", "drop"])
def test_columns_of_verl(tmp_path, suffix, other_keys):
    rows = [verl_row(index) for index in range(3)]
    tasks = source(tmp_path, rows, suffix=suffix, other_keys=other_keys, **VERL)
    task = tasks[2]
    assert (task.task_id, task.label, task.messages) == ("2", "42", tuple(QUESTION))
    assert task.metadata["split"] == "train"
    kept = {"data_source": "openai/gsm8k", "ability": "math", "reward_model": rows[2]["reward_model"]}
    assert {key: task.metadata.get(key) for key in kept} == (
        kept if other_keys == "keep" else dict.fromkeys(kept)
    )
    assert tasks.find("1").task_id == "1"


def test_a_dotted_key_that_leads_nowhere_is_named_with_the_nearest(tmp_path):
    wrong = {**VERL, "label_key": "reward_model.groundtruth", "other_keys": "drop"}
    with pytest.raises(
        ValueError,
        match=r":1: missing key 'reward_model.groundtruth', did you mean 'reward_model.ground_truth'\?",
    ):
        source(tmp_path, [verl_row(0)], **wrong)
    with pytest.raises(ValueError, match=r":1: 'reward_model.ground_truth' is null"):
        rows = [verl_row(0, reward_model={"style": "rule", "ground_truth": None})]
        source(tmp_path, rows, other_keys="drop", **VERL)


def test_a_key_with_a_dot_of_its_own_goes_before_where_its_dots_lead(tmp_path):
    rows = [{"prompt": "p", "a.b": "itself", "a": {"b": "inside"}}]
    assert source(tmp_path, rows, label_key="a.b", other_keys="drop")[0].label == "itself"


def test_prompt_and_completion_of_trl(tmp_path):
    rows = [{"prompt": QUESTION, "completion": [{"role": "assistant", "content": "42"}]}]
    assert source(tmp_path, rows, label_key="completion.0.content")[0].label == "42"
    assert source(tmp_path, rows, label_key="completion.-1.content")[0].label == "42"
    plain = [{"prompt": "What is 17 + 25?", "completion": " 42"}]
    assert source(tmp_path, plain, label_key="completion")[0].label == " 42"
    with pytest.raises(ValueError, match=r":1: missing key 'completion.5.content'"):
        source(tmp_path, rows, label_key="completion.5.content")


def test_conversations_of_openai(tmp_path):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 17, "b": 25}'}}
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "17 + 25?"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
        {"role": "user", "content": "So?"},
    ]
    rows = [{"messages": messages, "answer": "42"}]
    read = source(tmp_path, rows, prompt_key="messages")[0].messages
    assert read[1]["content"] == "What is\n17 + 25?"
    assert read[2]["content"] == ""
    assert read[2]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 17, "b": 25}}


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([*QUESTION, {"role": "assistant", "content": "42"}], "ends with what the assistant said"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"prompt\[0\]: a part of 'content' is of type 'image_url'; only texts can be played",
        ),
        ([{"role": "user", "content": None}], r"prompt\[0\] must have a text as 'content'"),
        ([{"role": "user", "content": [{"text": 3}]}], r"prompt\[0\]: a part of 'content' must be"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, *QUESTION],
            r"prompt\[0\]: the arguments of a tool call are not valid JSON",
        ),
    ],
)
def test_a_prompt_that_cannot_be_played_is_named(tmp_path, prompt, words):
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{words}"):
        source(tmp_path, [{"prompt": prompt, "answer": "42"}])


def test_values_that_pandas_writes_for_what_is_missing(tmp_path):
    rows = [{"prompt": "p", "answer": 1.0, "id": 1.0}, {"prompt": "q", "answer": float("nan"), "id": None}]
    with pytest.raises(ValueError, match=r"rows\.parquet:2: 'answer' is nan; a value that was missing"):
        source(tmp_path, rows, suffix="parquet")
    rows = [{"prompt": "p", "answer": "a", "id": float("nan")}]
    assert source(tmp_path, rows, suffix="parquet")[0].task_id == "rows-1"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "p", "answer": NaN}', "not valid JSON"),
        ('{"prompt": "p", "answer": NaN, "n": 1234567890123456789012}', "NaN is no JSON value"),
        ('{"prompt": "p", "answer": 1e999}', "number is infinity"),
        (f'{{"prompt": "p", "answer": {"1" * 5000}}}', "not valid JSON"),
        (f'{{"prompt": "p", "answer": {"[" * 5000}{"]" * 5000}}}', "not valid JSON"),
        ('{"prompt": "p", "answer": "\\ud800"}', "not valid JSON"),
        ('{"prompt": "p", "answer": "a", "id": {"a": 1}}', "'id' must be a text or a number"),
        ('{"prompt": "p", "answer": "a", "id": true}', "'id' must be a text or a number"),
    ],
)
def test_odd_values_of_a_row_are_refused_by_line(tmp_path, line, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{words}"):
        open_source(TaskSourceConfig(path=str(path), other_keys="drop"))


def test_messages_that_a_table_holds_as_text_are_messages(tmp_path):
    rows = [{"prompt": json.dumps(QUESTION), "answer": "42"}, {"prompt": '[{"role": 1}]', "answer": "42"}]
    tasks = source(tmp_path, rows)
    assert tasks[0].messages == tuple(QUESTION)
    assert tasks[1].messages[0]["content"] == '[{"role": 1}]', "a text like any other"


def test_the_data_source_of_verl_chooses_among_declared_rewards(tmp_path):
    rows = [verl_row(0), verl_row(1, data_source="searchR1_nq")]
    rewards = {
        "openai/gsm8k": {"kind": "rule", "name": "numeric"},
        "searchR1_nq": {"kind": "rule", "name": "f1"},
    }
    tasks = source(tmp_path, rows, other_keys="drop", reward_key="data_source", rewards=rewards, **VERL)
    assert [task.reward.name for task in (tasks[0], tasks[1])] == ["numeric", "f1"]
    rows = [verl_row(0, data_source="subprocess:Popen")]
    with pytest.raises(ValueError, match=r":1: 'data_source': 'subprocess:Popen' is not among those"):
        source(tmp_path, rows, other_keys="drop", reward_key="data_source", rewards=rewards, **VERL)


def test_rows_of_swe_bench_and_of_gsm8k(tmp_path):
    rows = [
        {
            "instance_id": "django__django-11099",
            "problem_statement": "Fix it.",
            "FAIL_TO_PASS": '["tests.a"]',
            "repo": "django/django",
        }
    ]
    keys = {"prompt_key": "problem_statement", "id_key": "instance_id", "label_key": "FAIL_TO_PASS"}
    task = source(tmp_path, rows, other_keys="keep", **keys)[0]
    assert (task.task_id, task.label, task.metadata) == (
        "django__django-11099",
        '["tests.a"]',
        {"repo": "django/django"},
    )
    solution = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72"
    task = source(tmp_path, [{"question": "How many?", "answer": solution}], prompt_key="question")[0]
    for rule in ("numeric", "math"):
        check_label(make_rule(rule), task.label)
        view = EpisodeView(task=task, message=AssistantMessage(content="72"), messages=())
        assert as_score(make_rule(rule)(view)).value == 1.0
    for rule in ("exact_match", "f1", "contains"):
        with pytest.raises(ValueError, match="a whole solution, which ends in '#### 72'"):
            check_label(make_rule(rule), task.label)
