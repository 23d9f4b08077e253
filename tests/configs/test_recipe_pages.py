"""Each recipe is a folder that says how to run it: its README has all sections, its commands load, the rows that it
names are read as they are published, its plan is printed, and it has a twin for CPUs that does the same in small."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyturn.cli.train import print_plan
from polyturn.configs.loading.loader import CONFIGS_DIRECTORY, load_config, shipped_names
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.factory import tasks_of
from polyturn.trainer.run.preflight import preflight

FOLDER = CONFIGS_DIRECTORY / "recipes"
READMES = {path.parent.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*/README.md"))}
SECTIONS = ["Command", "Hardware", "Data", "Expected", "A healthy run after 20 steps", "CPU twin"]
TABLE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
ITSELF = "itself"
TWINS = {
    name: name if twin == ITSELF else twin.strip("`")
    for name, twin in re.findall(r"^\| `(\w+)` \|.*\| (itself|`\w+`) \|$", TABLE, re.MULTILINE)
}
TEACHER = ["teachers=[{name: trained, path: builtin:tiny-searcher, engines: {device: cpu}}]"]
"""In place of the one that a run has to make first."""
NOT_TRAINED = {"evaluation", "search_r1_evaluation"}
SAME_ENVIRONMENT = {"search_r1", "retool_cpu", "gsm8k_cpu", "customer_service_cpu", "multi_agent_cpu"}
"""Twins in the environment of their recipe; the others are in the quickstart's."""


@pytest.mark.parametrize("folder", sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))
def test_a_readme_has_all_sections_and_names_all_of_its_folder(folder: str) -> None:
    text = READMES[folder]
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [section for section in sections if section in SECTIONS] == SECTIONS
    for path in (FOLDER / folder).glob("*.yaml"):
        assert f"`{path.stem}`" in text or f" {path.stem}" in text, f"{folder} does not speak of {path.name}"
        assert f"(../configs/recipes/{folder}/README.md)" in TABLE
    twin = text.rpartition("## CPU twin")[2]
    if not {"quickstart", "evaluation"} & {folder}:
        assert any(name in twin for name in set(TWINS.values())), f"{folder}: no twin is named"


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """The folder, the recipe and the options of each `polyturn train` and `polyturn sft` in the READMEs."""
    for folder, text in READMES.items():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            for line in () if language else block.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                if words[:2] in (["polyturn", "train"], ["polyturn", "sft"]):
                    options = [word for word in words[3:] if "=" in word]
                    if words[1] == "sft":
                        options.append(f"supervised.data=[{words[words.index('--data') + 1]}]")
                    yield folder, words[2], options


@pytest.mark.parametrize(("folder", "name", "options"), list(commands()))
def test_a_command_of_a_readme_loads(folder: str, name: str, options: list[str]) -> None:
    assert name in READMES[folder]
    assert load_config(name, options).name == load_config(name).name


def test_every_folder_has_a_command() -> None:
    assert {folder for folder, _, _ in commands()} == READMES.keys() - {"evaluation"}


PLANNED = [
    name
    for name in sorted(set(shipped_names("recipe")) - NOT_TRAINED)
    if load_config(name).model.path.startswith(("preset:", "builtin:"))
]
"""Recipes whose model's shape ships; the others have to get theirs first."""


@pytest.mark.parametrize("name", PLANNED)
def test_a_dry_run_plans_every_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(name, TEACHER if name == "distillation_cpu" else [])
    if "fine_tuning" not in name:
        preflight(config, dry_run=True)
    print_plan(config)
    plan = capsys.readouterr().out
    rollout, trainer = config.rollout, config.trainer
    assert rollout.prompts_per_step * rollout.samples_per_prompt == (
        trainer.global_batch_size * trainer.updates_per_step
    )
    assert f"= {trainer.global_batch_size} global batch x {trainer.updates_per_step} update(s)" in plan
    assert "# placement" in plan and "# memory, estimated from" in plan


def aspects(config: RunConfig) -> tuple[object, ...]:
    """What makes a recipe the kind that it is."""
    algorithm = config.trainer.algorithm
    return (
        algorithm.advantage.kind,
        algorithm.loss.kind,
        getattr(algorithm.loss, "dual_clip", None),
        algorithm.reduction.kind,
        config.rollout.max_staleness > 0,
        config.trainer.lora is not None,
        bool(config.teachers),
        str(config.weight_sync.dtype).startswith("fp8"),
    )


def test_every_trained_recipe_has_a_twin_that_does_the_same_in_small() -> None:
    assert TWINS.keys() == set(shipped_names("recipe")) - NOT_TRAINED
    for name, twin in TWINS.items():
        full, small = load_config(name), load_config(twin)
        assert aspects(full) == aspects(small), name
        assert small.engines.device == small.trainer.device == "cpu", name
        if twin == name or twin in SAME_ENVIRONMENT:
            assert (full.environment.id, full.model.dialect) == (small.environment.id, small.model.dialect)
        else:
            assert small.environment.id == "polyturn/TwoHopSearch-v0"


CHAT = [
    {"role": "user", "content": "Solve it. The last line is Answer: \\boxed{$Answer}.\n\nWhat is 17 + 17?"}
]
ROWS = {
    "dapo-math-17k.jsonl": {"prompt": CHAT, "label": "34"},
    "aime-2024.jsonl": {"prompt": CHAT, "label": "34"},
    "aime-2025.jsonl": {"prompt": "Solve it with \\boxed{}. What is 17 + 17?", "label": "34"},
    "dapo-math-17k.parquet": {
        "data_source": "math_dapo",
        "prompt": CHAT,
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    },
    "en/train-00000-of-00001.parquet": {
        "prompt": "What is 17 + 17?",
        "solution": "34",
        "data_source": "math_dapo",
        "source_prompt": CHAT,
        "ability": "MATH",
        "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
    },
    "train.jsonl": {"question": "What is 17 + 17?", "answer": "It is <<17+17=34>>34.\n#### 34"},
    "test.jsonl": {"question": "What is 17 + 17?", "answer": "It is <<17+17=34>>34.\n#### 34"},
    "train.parquet": {
        "id": "train_17 + 17",
        "question": "What is 17 + 17?",
        "golden_answers": ["34"],
        "data_source": "nq",
        "prompt": CHAT,
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": ["34"]}, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
        "metadata": None,
    },
}
"""A row of each file that READMEs name, with the keys of the published ones."""
ROWS["test.parquet"] = ROWS["train.parquet"] | {"data_source": "hotpotqa"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 400 rows of each published form."""
    folder = tmp_path_factory.mktemp("published")
    for name, row in ROWS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        rows = [json.loads(json.dumps(row).replace("17 + 17", f"17 + 17 ({n})")) for n in range(400)]
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


WITH_FILES = [
    (name, options) for _, name, options in commands() if any(file in " ".join(options) for file in ROWS)
]
TOLD = re.findall(r"`environment\.tasks='([^']*)'`", READMES["dapo"])
"""Other forms of the same problems, of which the README of DAPO tells in its text."""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *WITH_FILES,
        *(("dapo_math", [f"environment.tasks={tasks}"]) for tasks in TOLD),
    ],
)
def test_rows_are_read_as_they_are_published(
    name: str, options: list[str], published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    config = load_config(name, [option for option in options if "search_url" not in option])
    train, heldout = (tasks_of(config, split) for split in ("train", "heldout"))
    for source in (train, heldout):
        assert len(source) >= 30
        task = source[0]
        assert task.label in ("34", ("34",)) and "17 + 17" in task.messages[-1]["content"]


def test_there_are_commands_with_files() -> None:
    assert len(WITH_FILES) >= 10 and len(TOLD) == 2
