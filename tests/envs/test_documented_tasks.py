"""The examples of docs/tasks.md and docs/rewards.md work as they stand there."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.tasks import GroupRewardConfig
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task
from polyturn.envs.rewards.factory import make_group_rewards
from polyturn.envs.tasks import JsonlTasks, MixtureTasks
from polyturn.envs.tasks.rows import RowKeys

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page, language):
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the examples name."""
    monkeypatch.chdir(tmp_path)
    (row,) = blocks("tasks.md", "json")
    Path("train.jsonl").write_text(
        "".join(json.dumps({**json.loads(row), "id": f"q{i}"}) + "\n" for i in range(600))
    )
    Path("heldout.jsonl").write_text(row)
    rows = [{"question": "Which?", "gold": "this", "source": "web"} for _ in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), "questions.parquet")
    verl = {"prompt": [{"role": "user", "content": "Which?"}], "reward_model": {"ground_truth": "this"}}
    pq.write_table(
        pa.Table.from_pylist([{**verl, "extra_info": {"index": i}} for i in range(4)]), "verl.parquet"
    )
    for page in ("tasks.md", "rewards.md"):
        for source in blocks(page, "python"):
            named = re.match(r"# (\w+\.py)\n", source)
            if named:
                Path(named[1]).write_text(source)
    return tmp_path


def run_config(section):
    base = {
        "name": "documented",
        "environment": {"id": "polyturn/SingleTurn-v0"},
        "model": {"path": "builtin:tiny-searcher"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2},
        "trainer": {"num_steps": 1, "global_batch_size": 4},
    }
    return RunConfig.model_validate({**base, **section})


@pytest.mark.parametrize("page", ["tasks.md", "rewards.md"])
def test_every_section_that_is_shown_passes_the_checks_before_a_run(files, page):
    from polyturn.trainer.run.preflight import check_environment

    model = resolve_model_path("builtin:tiny-searcher")
    sections = [yaml.safe_load(text) for text in blocks(page, "yaml")]
    assert len(sections) >= 4
    for section in sections:
        if ".parquet" in str(section) and "reward" not in section:
            section["reward"] = {"kind": "rule", "name": "exact_match"}
        check_environment(run_config(section), ("train", "heldout"), model)


def test_the_python_of_the_tasks_page_runs(files):
    for source in blocks("tasks.md", "python"):
        names: dict = {"__name__": "documented"}
        exec(compile(source, "tasks.md", "exec"), names)
    assert isinstance(names["mixture"], MixtureTasks)
    assert isinstance(names["train"], JsonlTasks)


async def test_the_rewards_of_the_rewards_page_grade(files):
    from polyturn.envs.plugins import load_plugin
    from polyturn.envs.rewards.factory import REWARD

    view = EpisodeView(
        task=Task.from_prompt("t", "p"), message=AssistantMessage(content="see [1]"), messages=()
    )
    assert load_plugin(REWARD, "my_rewards.py:brief", {"limit": 3})(view) == 0.0
    assert await load_plugin(REWARD, "my_rewards.py:Cites", {"sources": ["[1]"]})(view) == {"cited": 1.0}
    (text,) = [text for text in blocks("rewards.md", "yaml") if "group_rewards" in text]
    configs = [GroupRewardConfig.model_validate(one) for one in yaml.safe_load(text)["group_rewards"]]
    assert [part.reward([view, view]) for part in make_group_rewards(configs)] == [[0.5, 0.5], [0.0, 0.0]]


def test_the_keys_of_a_row_are_documented():
    text = (DOCS / "tasks.md").read_text(encoding="utf-8")
    assert [key for key in RowKeys().all if f"`{key}`" not in text] == []
