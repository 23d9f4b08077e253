"""Where a policy's weights lie, and the shapes of published models that need none. Nothing here needs torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from polyturn.configs.errors import ConfigError, did_you_mean

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`owner/name`, as models are called on the Hugging Face hub."""
BUILTIN = "builtin:"
PRESET = "preset:"
MODELS_DIRECTORY = Path(__file__).parent / "models"
PRESETS_DIRECTORY = MODELS_DIRECTORY / "presets"
LAYOUT_NAME = "layout.yaml"
"""Of a preset: the layer that `extends: preset:NAME` puts under a recipe."""


def builtin_models() -> list[str]:
    """The names of the models that the package ships."""
    return sorted(path.parent.name for path in MODELS_DIRECTORY.glob("*/config.json"))


def preset_names() -> list[str]:
    """The published models whose shapes the package ships."""
    return sorted(path.parent.name for path in PRESETS_DIRECTORY.glob("*/config.json"))


def preset_directory(preset: str) -> Path:
    """The directory of `preset:NAME`: a config.json and a layout, no weights. Raises ConfigError."""
    name, names = preset.removeprefix(PRESET), preset_names()
    if name in names:
        return PRESETS_DIRECTORY / name
    hint = did_you_mean(name, names, PRESET) or f"; there are {', '.join(names)}"
    raise ConfigError(f"there is no preset '{name}'{hint}")


def resolve_model_path(path: str, *, key: str = "model.path", needs_weights: bool = True) -> Path:
    """The directory of `builtin:NAME`, of `preset:NAME`, or of a path.

    Args:
        key: of the option that holds it, for messages.
        needs_weights: refuse a preset, which has none.

    Raises:
        ConfigError: there is no such directory.
    """
    if path.startswith(PRESET):
        directory = preset_directory(path)
        if needs_weights:
            raise ConfigError(
                f"{key}: '{path}' is the shape of a published model, without its weights: enough for --dry-run "
                f"alone; to run, download the model and set {key} to its directory"
            )
        return directory
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        names = builtin_models()
        if name in names:
            return MODELS_DIRECTORY / name
        hint = did_you_mean(name, names, BUILTIN) or f"; shipped: {', '.join(names) or 'none'}"
        raise ConfigError(f"{key}: there is no shipped model '{name}'{hint}")
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ConfigError(f"{key}: '{path}' is a file; it must be a Hugging Face model directory")
    near = did_you_mean(path, [BUILTIN + name for name in builtin_models()])
    advice = near or "; download the model there first, or name another directory"
    if not near and directory.parent == Path("models"):
        advice = f"; `polyturn models get {directory.name}` brings it there, if `polyturn models list` has it"
    elif not near and HUB_NAME.fullmatch(path):
        advice = (
            f"; if it is a model of the hub, `hf download {path} --local-dir models/{directory.name}` brings it here, "
            f"and {key}=models/{directory.name} names it"
        )
    raise ConfigError(f"{key}: there is no directory '{path}'{advice}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model directory. Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"model.path: {path.parent} has no {path.name}; is it a Hugging Face model?"
        ) from None
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        # An integer of thousands of digits, or objects thousands deep in one another.
        raise ConfigError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected a JSON object")
    return data
