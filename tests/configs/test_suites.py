"""Suites: one config for each environment, over a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading import suites
from polyturn.configs.loading.loader import load_config, shipped_names
from polyturn.configs.loading.suites import (
    NEUTRAL_RECIPE,
    has_gpu,
    is_suite,
    load_evaluation,
    read_suite,
)
from polyturn.configs.schema.suite import Budget

SUITE = """\
name: two
recipe: quickstart
entries:
  - environment: {id: a/B-v0}
  - environment: {id: a/C-v0, max_turns: 3}
    evaluation: {split: dev, num_tasks: 4}
"""


def configs_of(suite, overrides=()):
    """One for each entry."""
    return [entry.config for entry in load_evaluation(suite, overrides).entries]


@pytest.mark.parametrize("name", shipped_names("suite"))
def test_shipped_suites_load(name: str) -> None:
    assert is_suite(name)
    suite, _ = read_suite(name)
    assert suite.name == name and suite.about
    load_config(suite.recipe or NEUTRAL_RECIPE)


def test_a_suite_is_its_recipe_with_each_entry_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    assert is_suite(path)
    first, second = configs_of(path, ["engines.num_engines=2"])
    assert (first.environment.id, second.environment.id) == ("a/B-v0", "a/C-v0")
    assert (second.environment.max_turns, second.evaluation.split, second.evaluation.num_tasks) == (
        3,
        "dev",
        4,
    )
    recipe = load_config("quickstart", ["engines.num_engines=2"])
    assert first.engines == second.engines == recipe.engines
    assert first.model == recipe.model


def test_a_suite_without_a_recipe_is_served_where_the_machine_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, devices = tmp_path / "suite.yaml", tmp_path / "dev"
    path.write_text(SUITE.replace("recipe: quickstart\n", ""))
    devices.mkdir()
    assert not has_gpu(devices)
    (devices / "nvidia0").touch()
    assert has_gpu(devices)
    for is_there, device, dtype in ((True, "cuda", "bfloat16"), (False, "cpu", "float32")):
        monkeypatch.setattr(suites, "has_gpu", lambda is_there=is_there: is_there)
        loaded = load_evaluation(path)
        config = loaded.entries[0].config
        assert (config.engines.device, config.trainer.device, config.model.dtype) == (device, device, dtype)
        assert loaded.is_on_cpu is not is_there
    loaded = load_evaluation(path, ["engines.device=cuda"])
    assert loaded.entries[0].config.engines.device == "cuda" and not loaded.is_on_cpu


def test_a_suite_may_use_a_recipe_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: quickstart\nseed: 9\n")
    (tmp_path / "suite.yaml").write_text(SUITE.replace("recipe: quickstart", "recipe: mine.yaml"))
    assert configs_of(tmp_path / "suite.yaml")[0].seed == 9


def test_a_recipe_is_no_suite(tmp_path: Path) -> None:
    assert not is_suite("quickstart")
    (tmp_path / "r.yaml").write_text("extends: quickstart\n")
    assert not is_suite(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match=r"there is no recipe or suite 'twohop'.*did you mean 'two-hop'\?"):
        is_suite("twohop")


def test_mistakes_in_an_entry_are_told_with_their_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SUITE + "    evalution: {}\n")
    with pytest.raises(ConfigError) as caught:
        configs_of("s.yaml")
    assert str(caught.value) == (
        "s.yaml:7: unknown key 'entries.1.evalution', did you mean 'entries.1.evaluation'?"
    )
    Path("s.yaml").write_text(SUITE.replace("num_tasks: 4", "num_tasks: all"))
    with pytest.raises(ConfigError) as caught:
        configs_of("s.yaml")
    assert str(caught.value) == "s.yaml:6: 'entries.1.evaluation.num_tasks' must be an integer, got 'all'"
    Path("s.yaml").write_text("name: a\nrecipe: quickstart\nentries: []\n")
    with pytest.raises(ConfigError, match=r"s.yaml:3: 'entries' must be a list of at least 1, got a list"):
        configs_of("s.yaml")


NEEDS = (
    SUITE
    + """\
  - name: nq
    environment: {id: polyturn/SearchR1-v0, options: {top_k: 5}}
    needs:
      - {option: heldout_questions, file: nq/test.jsonl, get: "Get nq/test.jsonl of FlashRAG_datasets."}
"""
)


def test_a_file_that_an_entry_needs_is_an_option_of_its_environment(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(NEEDS)
    (tmp_path / "flashrag" / "nq").mkdir(parents=True)
    file = tmp_path / "flashrag" / "nq" / "test.jsonl"
    file.write_text("{}")
    *_, nq = configs_of(path, [f"data={tmp_path / 'flashrag'}", "engines.num_engines=2"])
    assert nq.environment.options == {"top_k": 5, "heldout_questions": str(file)}
    assert nq.engines.num_engines == 2
    *_, nq = configs_of(path, ["only=[nq]", f"environment.options.heldout_questions={file}"])
    assert nq.environment.options == {"top_k": 5, "heldout_questions": str(file)}


def test_a_suite_without_its_files_is_refused_with_what_to_get(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(NEEDS)
    with pytest.raises(ConfigError) as caught:
        configs_of(path)
    assert str(caught.value).splitlines() == [
        "two: nq: there is no 'data/nq/test.jsonl': Get nq/test.jsonl of FlashRAG_datasets.",
        "two: name another directory than 'data' with data=DIR, one file with "
        "entries.NAME.environment.options.OPTION=FILE, or play other entries with only=[NAME]",
    ]
    path.write_text(NEEDS.replace("file: nq", "required: false, file: nq"))
    *_, nq = configs_of(path)
    assert nq.environment.options == {"top_k": 5}
    path.write_text(NEEDS)
    assert [config.environment.id for config in configs_of(path, ["only=[C]"])] == ["a/C-v0"]
    with pytest.raises(ConfigError, match=r"only: there is no entry 'ng'; there are B, C, nq"):
        configs_of(path, ["only=[ng]"])


def test_overrides_of_an_entry_hold_for_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SUITE)
    first, second = configs_of(path, ["evaluation.num_tasks=7", "environment.max_turns=2"])
    assert (first.evaluation.num_tasks, second.evaluation.num_tasks, second.evaluation.split) == (7, 7, "dev")
    assert (first.environment.max_turns, second.environment.max_turns) == (2, 2)
    with pytest.raises(ConfigError, match=r"command line: unknown key 'entries.0.evaluation.num_task'"):
        configs_of(path, ["evaluation.num_task=7"])


def test_two_entries_of_one_environment_need_names(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(SUITE.replace("a/C-v0", "b/B-v1"))
    with pytest.raises(ConfigError, match="two entries are called 'B'; give each a `name` of its own"):
        configs_of(path)


def test_what_a_suite_says_for_all_its_entries_is_below_what_an_entry_says(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        SUITE
        + """\
defaults:
  environment: {max_turns: 5, max_tokens_per_turn: 9}
  evaluation: {temperature: 0.5, num_tasks: 3}
  success_score: 0.8
  budget: {max_cost: 2.5}
"""
    )
    suite = load_evaluation(path, ["entries.C.evaluation.temperature=0", "entries.B.budget.max_tokens=100"])
    first, second = suite.entries
    assert (suite.name, first.name, second.name) == ("two", "B", "C")
    assert (first.config.environment.max_turns, second.config.environment.max_turns) == (5, 3)
    assert first.config.environment.max_tokens_per_turn == second.config.environment.max_tokens_per_turn == 9
    assert (first.config.evaluation.num_tasks, second.config.evaluation.num_tasks) == (3, 4)
    assert (first.config.evaluation.temperature, second.config.evaluation.temperature) == (0.5, 0.0)
    assert (first.success_score, second.success_score) == (0.8, 0.8)
    assert first.budget == Budget(max_cost=2.5, max_tokens=100) and second.budget == Budget(max_cost=2.5)


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        (
            "defaults: {budget: {max_cos: 1}}\n",
            [],
            "s.yaml:7: unknown key 'defaults.budget.max_cos', did you mean 'defaults.budget.max_cost'?",
        ),
        (
            "defaults: {evaluation: {num_tasks: none}}\n",
            [],
            "s.yaml:7: 'entries.0.evaluation.num_tasks' must be an integer, got 'none'",
        ),
        (
            "",
            ["entries.BB.success_score=1"],
            "command line: there is no entry 'BB', did you mean 'B'?; there are B, C",
        ),
        (
            "",
            ["budget.max_tokens=0"],
            "command line: 'entries.0.budget.max_tokens' must be a value greater than 0",
        ),
        (
            "",
            ["entries.B.evaluation.num_tasks=[]"],
            "command line: 'entries.0.evaluation.num_tasks' must be an integer, got a list",
        ),
    ],
)
def test_mistakes_in_defaults_and_overrides_are_told_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, overrides: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(SUITE + text)
    with pytest.raises(ConfigError) as caught:
        load_evaluation("s.yaml", overrides)
    assert str(caught.value).startswith(complaint)


def test_the_held_out_tasks_of_a_recipe_are_a_suite_of_one_entry() -> None:
    suite = load_evaluation("quickstart", ["evaluation.num_tasks=5"])
    [entry] = suite.entries
    assert (suite.name, entry.name, entry.success_score) == ("quickstart", "TwoHopSearch", 1.0)
    assert entry.config == load_config("quickstart", ["evaluation.num_tasks=5"])
