"""What passed becomes rows; what does not is counted with its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from polyturn.agents.episode import TurnRecord
from polyturn.configs.models import resolve_model_path
from polyturn.rollout.evaluation import curate as curation
from polyturn.rollout.evaluation.curate import Choice, curate
from polyturn.rollout.fine_tuning.rows import read_rows, tokenizer_digest
from polyturn.rollout.store import write_episodes
from tests.support.evaluations import SECRET, conversation, episode, make_evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_evaluation(tmp_path_factory.mktemp("evaluations") / "one")


def ids(path: Path) -> list[str]:
    return [json.loads(line)["metadata"]["episode_id"] for line in path.read_text().splitlines()]


def test_the_best_of_each_task_is_kept_and_every_other_has_a_reason(evaluation: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    found = curate(evaluation, path, Choice(), tell=print)
    # Of task 0 the one with fewer turns; task 5 has the conversation of the other one.
    assert ids(path) == ["eval000000.1.0", "eval000001.0.0"] and found.num_rows == 2
    assert found.dropped == {
        curation.NO_SCORE: 1,
        curation.TRUNCATED: 1,
        curation.BELOW: 1,
        curation.CREDENTIAL: 1,
        curation.SAME: 1,
        curation.NOT_BEST: 1,
    }
    assert found.num_rows + found.num_dropped == 8 and SECRET not in path.read_text()
    rows = list(read_rows(path))
    # Who played is known, and with that whose the tokens are.
    assert found.num_with_tokens == 2
    assert {row.tokenizer for row in rows} == {tokenizer_digest(resolve_model_path("builtin:tiny-searcher"))}
    assert rows[0].segments[0].token_ids.tolist() == list(range(4, 16))
    assert rows[0].segments[0].taught.tolist() == [place % 3 == 2 for place in range(12)]


def test_all_are_kept_that_reach_a_score(evaluation: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    found = curate(evaluation, path, Choice(per_task=None, min_score=0.2), tell=print)
    assert found.num_rows == 4 and found.dropped[curation.SAME] == 1 and curation.BELOW not in found.dropped
    assert found.num_with_tokens == 3
    assert curate(evaluation, tmp_path / "none", Choice(min_score=2.0), tell=print).num_rows == 0
    assert not (tmp_path / "none").exists()


def test_environments_are_balanced_by_their_best(tmp_path: Path) -> None:
    made = [
        episode(number, 0, score, env_id=environment, messages=conversation(str(number)))
        for number, (environment, score) in enumerate([("a", 1.0), ("a", 3.0), ("a", 2.0), ("b", 1.0)])
    ]
    several = replace(made[0], episode_id="s", turn_records=(TurnRecord(role="solver"),))
    unread = [{"id": "call_0", "type": "function", "function": {"name": "", "arguments": {}}}]
    broken = (*conversation("broken")[:2], {"role": "assistant", "content": "", "tool_calls": unread})
    path = tmp_path / "step.parquet"
    write_episodes(path, [*made, several, replace(made[0], episode_id="u", messages=broken)], step=1)
    output = tmp_path / "rows.jsonl"
    found = curate(path, output, Choice(balance=True), tell=lambda _: None)
    assert ids(output) == ["eval000001.0.0", "eval000003.0.0"]
    assert found.by_environment == {"a": 1, "b": 1} and found.num_with_tokens == 0
    assert found.dropped[curation.UNBALANCED] == 2
    assert found.dropped[curation.SEVERAL] == found.dropped[curation.UNREAD_CALL] == 1


def test_what_a_call_ended_is_learnt_from_and_what_nobody_answered_is_not(tmp_path: Path) -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "guess", "arguments": {"code": "1"}}}
    user = {"role": "user", "content": "Guess."}
    ended = (
        user,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "name": "guess", "content": "Right."},
    )
    path, output = tmp_path / "step.parquet", tmp_path / "rows.jsonl"
    made = [
        episode(number, 0, 1.0, env_id="a", messages=said) for number, said in enumerate((ended, (user,)))
    ]
    write_episodes(path, made, step=1)
    found = curate(path, output, Choice(), tell=lambda _: None)
    assert ids(output) == ["eval000000.0.0"] and found.dropped[curation.NO_ANSWER] == 1
    assert next(iter(read_rows(output))).taught == (False, True, False)
