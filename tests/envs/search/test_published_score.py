"""`qa_em` gives what Search-R1's own scorer gives.

The values are those of its `verl/utils/reward_score/qa_em.py`, on the transcript that its generation loop makes of
these turns.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.search.env import SearchEnv
from polyturn.envs.search.questions import read_questions
from polyturn.envs.search.styles import SEARCH_R1, parse_turn
from polyturn.envs.wrappers import RawTextAction
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.corpus import Passage

PLAIN = "Rome is the capital of Italy."
TAGGED = "<answer> Rome </answer> is the capital of Italy."
SEARCHED = "<search> Rome </search>"


def score(turns, golds, passage=PLAIN):
    index = BM25Index.build([Passage(id="0", title="Rome", text=passage)])
    task = Task.from_prompt("t", "Which town", label=golds)
    env = RawTextAction(
        SearchEnv(reward="qa_em", tasks=ListTasks([task]), retriever=index),
        lambda text: parse_turn(text, SEARCH_R1.tags),
    )
    env.reset(options={"task": "t"})
    for turn in turns:
        _, reward, terminated, truncated, _ = env.step(turn)
    assert terminated and not truncated
    return reward


@pytest.mark.parametrize(
    ("answer", "golds", "published"),
    [
        (" Paris ", ["Paris"], 1.0),
        ("paris", ["PARIS"], 1.0),
        (" The  Beatles! ", ["beatles"], 1.0),
        (" Spider-Man ", ["Spiderman"], 1.0),
        (" Spider-Man ", ["Spider Man"], 0.0),
        (" O\u2019Neill ", ["O'Neill"], 0.0),
        (" an apple a day ", ["apple day"], 1.0),
        (" A-Team ", ["Team"], 0.0),
        (" 1,000 ", ["1000"], 1.0),
        (" 1.0 ", ["1"], 0.0),
        (" caf\u00e9 ", ["cafe"], 0.0),
        (" Paris, France ", ["Paris"], 0.0),
        (" Christiania ", ["Oslo", "Christiania"], 1.0),
        (" New\n York ", ["new york"], 1.0),
        ("", ["The"], 1.0),
        (" a ", ["The"], 1.0),
        (" + ", ["-"], 1.0),
        ("", ["Paris"], 0.0),
    ],
)
def test_answers_are_compared_as_published(answer, golds, published):
    assert score([f"<answer>{answer}</answer>"], golds) == published


@pytest.mark.parametrize(
    ("turns", "gold", "passage", "published"),
    [
        (["<answer> Paris </answer> <answer> Rome </answer>"], "Paris", PLAIN, 1.0),
        (["<answer> Paris </answer> <answer> Rome </answer>"], "Rome", PLAIN, 0.0),
        (["<answer> <answer> Paris </answer>"], "Paris", PLAIN, 0.0),
        ([SEARCHED, "<answer> Paris </answer>"], "Paris", TAGGED, 1.0),
        ([SEARCHED, "<answer> Paris </answer>"], "Rome", TAGGED, 0.0),
        (["<answer> perhaps " + SEARCHED, "<answer> Paris </answer>"], "Paris", PLAIN, 0.0),
        (["<answer> perhaps " + SEARCHED, "<answer> Paris </answer>"], "Paris", TAGGED, 1.0),
        (["I do not know.", "<answer> Paris </answer>"], "Paris", PLAIN, 1.0),
        (["I <answer> do not know.", "<answer> Paris </answer>"], "Paris", PLAIN, 1.0),
        (["<think> It is <answer> Paris </answer>"], "Paris", PLAIN, 1.0),
    ],
)
def test_the_answer_is_found_as_published(turns, gold, passage, published):
    assert score(turns, [gold], passage) == published


def test_an_episode_without_an_answer_earns_nothing():
    """As published it would have the prompt's example for its answer, and be paid for "Beijing"."""
    env = SearchEnv(
        reward="qa_em",
        tasks=ListTasks([Task.from_prompt("t", "Which town", label=["Beijing"])]),
        retriever=BM25Index.build([Passage(id="0", title="Rome", text=PLAIN)]),
    )
    acting = RawTextAction(env, lambda text: parse_turn(text, SEARCH_R1.tags))
    acting.reset(options={"task": "t"})
    for _ in range(5):
        _, reward, _, truncated, _ = acting.step(SEARCHED)
    assert (reward, truncated) == (0.0, True)


def test_search_r1s_parquet_holds_several_sets(tmp_path):
    rows = [
        {
            "id": f"test_{index}",
            "question": f"{name} {index}?",
            "golden_answers": [f"{index}"] if index else None,
            "data_source": name,
            "prompt": [{"role": "user", "content": "Answer the given question."}],
            "reward_model": {"style": "rule", "ground_truth": {"target": [f"{index}"]}},
            "metadata": {"long": "x" * 1000},
        }
        for name in ("nq", "popqa")
        for index in range(3)
    ]
    path = tmp_path / "test.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert [task.task_id for task in map(read_questions(str(path)).__getitem__, (0, 3))] == [
        "nq-test_0",
        "popqa-test_0",
    ]
    nq = read_questions(str(path), "nq")
    assert len(nq) == 3
    assert (nq[0].label, nq[2].label) == (("0",), ("2",))
    assert nq[0].metadata == {"data_source": "nq"}
    with pytest.raises(ValueError, match=r"there is no data_source 'hotpot'; there are nq, popqa"):
        read_questions(str(path), "hotpot")
    (tmp_path / "no.parquet").write_text("nothing")
    with pytest.raises(ValueError, match=r"no\.parquet: not a Parquet file"):
        read_questions(str(tmp_path / "no.parquet"))


def test_a_set_is_chosen_among_rows_that_name_one(tmp_path):
    """FlashRAG's files hold one set, and do not say which."""
    path = tmp_path / "test.jsonl"
    row = {"id": "test_0", "question": "who?", "golden_answers": ["A"], "metadata": {}}
    path.write_text(json.dumps(row) + "\n")
    assert read_questions(str(path), "nq")[0].task_id == "test_0"
