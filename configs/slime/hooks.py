"""A script's own functions (`--custom-rm-path` and its like) as sections of a recipe that call them as slime does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from polyturn.configs.loading import yaml_tree
from polyturn.configs.slime.counterparts import MODEL_OPTIONS
from polyturn.configs.slime.script import Launch

ADAPTERS = "polyturn.rollout.slime.hooks"
RULES: Mapping[str, str] = {
    "deepscaler": "math",
    "dapo": "math",
    "math": "math",
    "math_utils": "math",
    "math_dapo_utils": "math",
    "f1": "f1",
    "gpqa": "multiple_choice",
}
"""By `--rm-type`, and by the module of `slime.rollout.rm_hub` that grades so, our rule."""
NONZERO = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
RULE_HUB = "slime.rollout.rm_hub."
POP_FIRST = "slime.rollout.data_source.pop_first"
DISTILLATION = "slime.rollout.on_policy_distillation."
GENERATE_TURNS = 64
"""Answers that a generate function may ask for: it counts its turns itself."""


@dataclass(kw_only=True, slots=True)
class Hooks:
    """What they come to in a recipe."""

    keys: dict[str, Any] = field(default_factory=dict)
    """By key of a recipe."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Options, each with the reason or with what is to be known."""


def hooks_of(launch: Launch) -> Hooks:
    """The sections of a launch's own functions; of slime's own functions our counterparts, by name."""
    found = Hooks()
    given = {option: " ".join(values) for option, values in launch.options.items()}
    reward = _reward(given.get("--custom-rm-path", ""), found)
    generate = given.get("--custom-generate-function-path", "")
    if generate:
        options = _options(launch, generate, found) | ({"reward": reward} if reward else {})
        found.keys["agent"] = {"target": f"{ADAPTERS}:Generate", "options": options}
        found.keys.setdefault("environment.max_turns", GENERATE_TURNS)
    elif reward and "--group-rm" in given:
        found.keys["reward"] = {"kind": "function", "target": f"{ADAPTERS}:no_reward"}
        target = {"name": "slime", "target": f"{ADAPTERS}:GroupReward"}
        found.keys["group_rewards"] = [target | {"options": _options(launch, reward, found)}]
    elif reward:
        options = _options(launch, reward, found)
        found.keys["reward"] = {"kind": "function", "target": f"{ADAPTERS}:Reward", "options": options}
    chosen = given.get("--dynamic-sampling-filter-path", "")
    if chosen.startswith(NONZERO):
        found.keys["rollout.filter"] = {"kind": "nonzero_deviation"}
    elif chosen:
        found.keys["rollout.filter"] = _plugin("Filter", _options(launch, chosen, found))
    chosen = given.get("--buffer-filter-path", "")
    if chosen == POP_FIRST:
        found.keys["rollout.order"] = {"kind": "fifo"}
    elif chosen:
        found.keys["rollout.order"] = _plugin("BufferOrder", _options(launch, chosen, found))
    return found


def _reward(path: str, found: Hooks) -> str:
    """The path of a reward of the user's own; empty where there is none, or one of slime's has a counterpart."""
    if path.startswith(RULE_HUB):
        module = path.removeprefix(RULE_HUB).partition(".")[0]
        if module in RULES:
            found.keys["reward"] = {"kind": "rule", "name": RULES[module]}
            return ""
    if path.startswith(DISTILLATION):
        found.left_out.append(("--custom-rm-path", "name the teacher as teachers (docs/distillation.md)"))
        return ""
    return path


def _plugin(adapter: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "plugin", "target": f"{ADAPTERS}:{adapter}", "options": dict(options)}


def _options(launch: Launch, path: str, found: Hooks) -> dict[str, Any]:
    """The options of an adapter: the hook as the script names it, where to import it from, and what it set."""
    folder = _folder_of(path, launch.folder)
    if folder is None:
        hint = f"{path} is not beside the script: write its folder as python_path of its options"
        found.left_out.append(("the script", hint))
    return {"path": path, "python_path": [str(folder or launch.folder)], "args": _arguments(launch)}


def _folder_of(path: str, beside: Path) -> Path | None:
    """The folder to import a hook from: the script's own, or one above it."""
    file = path.partition(":")[0] if ".py" in path else path.rpartition(".")[0].replace(".", "/") + ".py"
    if path.startswith("slime."):
        return beside
    return next((each for each in (beside, *beside.parents) if (each / file).is_file()), None)


def _arguments(launch: Launch) -> dict[str, Any]:
    """`args` as slime's parser would make it of what the script says, and of the file of `--custom-config-path`."""
    made: dict[str, Any] = {}
    for option, values in launch.options.items():
        if option in MODEL_OPTIONS or option.startswith(("--sglang-", "--wandb-")):
            continue
        if any("$" in value for value in values):
            continue
        read = [yaml_tree.read_scalar(value) for value in values]
        made[option.removeprefix("--").replace("-", "_")] = (
            True if not read else read[0] if len(read) == 1 else read
        )
    for value in launch.options.get("--custom-config-path", ()):
        for file in (launch.folder / value, *(above / value for above in launch.folder.parents)):
            if file.is_file():
                made |= _read(file)
                break
    return made


def _read(file: Path) -> dict[str, Any]:
    """A file of options. Raises `ValueError` where it is no mapping."""
    read = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise ValueError(f"{file}: --custom-config-path must be a mapping of options")
    return read
