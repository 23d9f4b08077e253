"""A plug-in that cannot work is refused in one sentence, which shows what would."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import ClipLoss
from polyturn.configs.schema.section import Plugin
from polyturn.envs.plugins import load_plugin
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
    Registry,
    bind,
)
from polyturn.trainer.battery.kit import REGISTRIES
from polyturn.trainer.run.preflight import preflight

RIGHT = """
def loss(batch, *, beta=0.1):
    return batch, beta

def advantage(step):
    return step

def correction(behavior, proximal, mask, sequence_index, advantages):
    return behavior

def reduction(mask, batch, counts):
    return mask

def estimator(logprobs, other, mask):
    return other

class Reward:
    def __init__(self, *, scale):
        self.scale = scale

    def __call__(self, rewards, parts):
        return [self.scale * reward for reward in rewards]

class Uncallable:
    pass

NUMBER = 3

def too_many(batch, counts):
    return batch

def swapped(batch, mask, counts):
    return mask

def a_number(batch) -> float:
    return 0.0

def nothing(batch) -> None:
    return None
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(RIGHT, "utf-8")
    return path


@pytest.mark.parametrize(
    ("registry", "name", "options"),
    [
        (POLICY_LOSSES, "loss", {}),
        (POLICY_LOSSES, "loss", {"beta": 3}),
        (ADVANTAGES, "advantage", {}),
        (CORRECTIONS, "correction", {}),
        (REDUCERS, "reduction", {}),
        (KL_ESTIMATORS, "estimator", {}),
        (REWARD_POSTPROCESSORS, "Reward", {"scale": 2}),
    ],
)
def test_right_ones_are_taken(
    registry: Registry[Any], name: str, options: dict[str, Any], module: Path
) -> None:
    loaded: Any = load_plugin(registry.signature, f"{module}:{name}", options)
    if name == "loss":
        assert loaded("batch") == ("batch", options.get("beta", 0.1))
    if name == "Reward":
        assert loaded([1.0, 2.0], []) == [2.0, 4.0]


@pytest.mark.parametrize(
    ("registry", "target", "options", "told"),
    [
        (POLICY_LOSSES, "{module}:los", {}, "has no 'los', did you mean 'loss'?"),
        (POLICY_LOSSES, "{module}:loss", {"bta": 1}, "got an unexpected keyword argument 'bta'"),
        (POLICY_LOSSES, "{module}:too_many", {}, "missing a required argument: 'counts'"),
        (POLICY_LOSSES, "{module}:NUMBER", {}, "is of type int, not a function or a class"),
        (POLICY_LOSSES, "{module}:Uncallable", {}, "its objects cannot be called"),
        (POLICY_LOSSES, "{module}:a_number", {}, "returns float, which is no policy loss"),
        (POLICY_LOSSES, "{module}:nothing", {}, "returns None, which is no policy loss"),
        (POLICY_LOSSES, "no_such_module_of_mine:loss", {}, "cannot import 'no_such_module_of_mine'"),
        (POLICY_LOSSES, "{module}x.py:loss", {}, "no such file"),
        (POLICY_LOSSES, "loss", {}, "is not of the form module:name or path/to/file.py:name"),
        (REDUCERS, "{module}:swapped", {}, "'batch' stands where 'mask' is passed"),
        (ADVANTAGES, "{module}:correction", {}, "missing a required argument: 'proximal'"),
        (CORRECTIONS, "{module}:loss", {}, "too many positional arguments"),
        (REWARD_POSTPROCESSORS, "{module}:Reward", {}, "missing a required argument: 'scale'"),
    ],
)
def test_wrong_ones_are_refused(
    registry: Registry[Any], target: str, options: dict[str, Any], told: str, module: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        load_plugin(registry.signature, target.format(module=module), options)
    sentence = str(caught.value)
    assert told in sentence and "\n" not in sentence
    assert f"{registry.signature.article} {registry.what} is `{registry.signature.text}`" in sentence


def test_a_class_is_told_its_method(module: Path) -> None:
    with pytest.raises(ValueError, match=r"as the method __call__\(self, rewards, parts\)"):
        load_plugin(REWARD_POSTPROCESSORS.signature, f"{module}:Reward", {"scal": 1})


def test_a_section_is_bound_to_what_it_names(module: Path) -> None:
    bound: Any = bind(POLICY_LOSSES, ClipLoss(clip_low=0.1))
    assert isinstance(bound, functools.partial) and bound.keywords["config"].clip_low == 0.1
    own: Any = bind(POLICY_LOSSES, Plugin(kind="plugin", target=f"{module}:loss", options={"beta": 9}))
    assert own("batch") == ("batch", 9)


def test_an_object_of_a_class_is_made_once(module: Path) -> None:
    section = Plugin(kind="plugin", target=f"{module}:Reward", options={"scale": 2})
    first: Any = bind(REWARD_POSTPROCESSORS, section)
    assert bind(REWARD_POSTPROCESSORS, section.model_copy()) is first
    assert bind(REWARD_POSTPROCESSORS, section.model_copy(update={"options": {"scale": 3}})) is not first


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="there is no policy loss 'clp', did you mean 'clip'"):
        POLICY_LOSSES["clp"]
    with pytest.raises(ValueError, match=r"there are .*grpo"):
        ADVANTAGES["zzzzzz"]


def test_every_entry_says_what_it_is() -> None:
    for registry in REGISTRIES:
        assert len(registry)
        for entry in registry:
            assert entry.formula and entry.paper and entry.function.__doc__, entry.name
            if entry.config is not None:
                assert entry.config.model_validate({"kind": entry.name, **entry.example})
    for entry in KL_ESTIMATORS:
        assert set(entry.gradients) == {"loss", "loss_times_detached_ratio", "loss_times_ratio", "reward"}


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("loss", {"loss": {"kind": "plugin", "target": "{module}:los"}}),
        ("advantage", {"advantage": {"kind": "plugin", "target": "{module}:loss", "options": {"step": 1}}}),
        ("reduction", {"reduction": {"kind": "plugin", "target": "{module}:swapped"}}),
        ("reward_shaping", {"reward_shaping": {"kind": "plugin", "target": "{module}:Reward"}}),
        (
            "corrections.1",
            {"corrections": [{"kind": "veto"}, {"kind": "plugin", "target": "{module}:nothing"}]},
        ),
    ],
)
def test_a_wrong_plugin_ends_preflight(key: str, section: dict[str, Any], module: Path) -> None:
    written = json.loads(json.dumps(section).replace("{module}", str(module)))
    algorithm = AlgorithmConfig.model_validate(written)
    config = load_config("quickstart")
    config = config.model_copy(update={"trainer": config.trainer.model_copy(update={"algorithm": algorithm})})
    with pytest.raises(ConfigError, match=rf"^trainer\.algorithm\.{key}: .*; an? .* is `def ") as caught:
        preflight(config)
    assert "\n" not in str(caught.value)
