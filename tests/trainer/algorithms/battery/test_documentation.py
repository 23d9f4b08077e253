"""docs/algorithms.md and the shipped algorithms go by the registries."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config, shipped_names
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.registry import ADVANTAGES, CORRECTIONS, POLICY_LOSSES, REDUCERS, bind
from polyturn.trainer.battery import table
from polyturn.trainer.battery.kit import REGISTRIES

ROOT = Path(__file__).resolve().parents[4]
DOCUMENT = ROOT / "docs" / "algorithms.md"


def test_the_tables_are_those_of_the_registries() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert table.renewed(text) == text, (
        "renew them: python -m polyturn.trainer.battery.table docs/algorithms.md"
    )


def test_every_function_has_a_row_with_its_code_and_test() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip().strip("`"): row for row in text.splitlines() if row.startswith("| `")}
    for registry in REGISTRIES:
        for entry in registry:
            assert f"[{entry.function.__name__}](" in rows[entry.name]
            assert "](../configs/algorithms/" in rows[entry.name], f"no shipped config uses {entry.name!r}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", DOCUMENT.read_text(encoding="utf-8")):
        assert (DOCUMENT.parent / target).exists(), target


def test_the_python_of_the_document_parses() -> None:
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("name", shipped_names("algorithm"))
def test_a_shipped_algorithm_is_a_part_of_a_recipe(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [quickstart, algorithms/{name}]\n", "utf-8")
    config = load_config(recipe)
    algorithm = config.trainer.algorithm
    assert algorithm == table.read_algorithm(name)
    bind(ADVANTAGES, algorithm.advantage)
    bind(POLICY_LOSSES, algorithm.loss)
    bind(REDUCERS, algorithm.reduction)
    for section in algorithm.corrections:
        bind(CORRECTIONS, section)
    assert Objective.from_config(algorithm, temperature=1.0).loss == algorithm.loss


def test_an_unknown_algorithm_is_told_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extends: [quickstart, algorithms/gpso]\n", "utf-8")
    with pytest.raises(ConfigError, match=r"recipe.yaml:1: 'extends': there is no algorithm 'gpso'.*'gspo'"):
        load_config(recipe)


def test_every_shipped_algorithm_says_where_it_is_from() -> None:
    for path in (ROOT / "configs" / "algorithms").glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path.name
