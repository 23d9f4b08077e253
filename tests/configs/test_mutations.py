"""Recipes and models' configs with any key left out or given another value: a run, or a sentence; never a traceback."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import dump_config, load_config, shipped_names
from polyturn.configs.models import MODELS_DIRECTORY, preset_names
from polyturn.configs.sizing.arithmetic import check_batch
from polyturn.configs.sizing.memory import check_layout, estimate_memory
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.placement import plan_placement, planned_nodes
from polyturn.configs.sizing.placement_table import placement_lines
from polyturn.trainer.models.families import describe_computation

LEFT_OUT = object()
ODD: tuple[Any, ...] = (
    LEFT_OUT,
    None,
    True,
    0,
    -1,
    1,
    3,
    2**63,
    0.5,
    1e300,
    float("inf"),
    float("nan"),
    "",
    "some text",
    "0",
    [],
    [1],
    ["x"],
    {},
    {"x": 1},
)

Path_ = tuple[str | int, ...]


def keys_of(data: Any, prefix: Path_ = ()) -> Iterator[Path_]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from keys_of(value, (*prefix, key))


def mutated(data: Any, path: Path_, value: Any) -> Any:
    changed = copy.deepcopy(data)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    if value is LEFT_OUT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = copy.deepcopy(value)
    return changed


RECIPES = {name: load_config(name).model_dump(mode="json") for name in shipped_names("recipe")}
RECIPE_KEYS = [(name, path) for name, recipe in RECIPES.items() for path in keys_of(recipe)]


@given(key=st.sampled_from(RECIPE_KEYS), value=st.sampled_from(ODD))
@settings(max_examples=150, deadline=None)
def test_a_recipe_with_one_odd_value(key: tuple[str, Path_], value: Any, tmp_path_factory: Any) -> None:
    name, path = key
    file: Path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    # JSON is YAML.
    text = json.dumps(mutated(RECIPES[name], path, value))
    file.write_text(text.replace("Infinity", ".inf").replace("NaN", ".nan"), encoding="utf-8")
    shape = ModelShape.read(MODELS_DIRECTORY / "tiny-searcher")
    try:
        config = load_config(file)
        check_batch(config)
        check_layout(config, shape)
    except ConfigError as error:
        assert str(error).strip()
        return
    estimate_memory(config, shape)
    dump_config(config)
    try:
        placement = plan_placement(config, planned_nodes(config))
    except ConfigError as error:
        assert str(error).strip()
        return
    placement_lines(config, placement)


def model_configs() -> dict[str, dict[str, Any]]:
    names = ["tiny-searcher", *(f"presets/{name}" for name in preset_names())]
    return {name: json.loads((MODELS_DIRECTORY / name / "config.json").read_text("utf-8")) for name in names}


MODELS = model_configs()
MODEL_KEYS = [(name, path) for name, model in MODELS.items() for path in keys_of(model)]


def test_a_model_with_one_odd_value() -> None:
    for (name, path), value in itertools.product(MODEL_KEYS, ODD):
        try:
            shape = ModelShape.of(mutated(MODELS[name], path, value), source="m/config.json")
        except ConfigError as error:
            assert str(error).startswith("m/config.json: "), (name, path, value)
            assert value is not LEFT_OUT or f"'{path[0]}'" in str(error) or path == ("model_type",), (
                name,
                path,
            )
            continue
        assert shape.num_parameters > 0


def test_the_trainer_reads_or_refuses_a_model_with_one_odd_value() -> None:
    for (name, path), value in itertools.product(MODEL_KEYS, ODD):
        changed = mutated(MODELS[name], path, value)
        try:
            describe_computation(changed)
        except ValueError as error:
            assert str(error).strip(), (name, path, value)


@pytest.mark.parametrize("model_type", ["qwen", "qwen3_5", "llama4", "gemma3", "qwen3_next", None, 3, []])
def test_an_unknown_family_is_told_what_there_is(model_type: Any) -> None:
    with pytest.raises(ConfigError, match=r"model_type .* is not supported; .* deepseek_v3, .*qwen3_moe"):
        ModelShape.of({"model_type": model_type}, source="m/config.json")
