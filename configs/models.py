"""Where a policy's weights lie, and what its config.json says of their shape. Nothing here needs torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from polyturn.configs.errors import ConfigError, did_you_mean

BUILTIN = "builtin:"
MODELS_DIRECTORY = Path(__file__).parent / "models"
FAMILIES = ("llama", "qwen2", "qwen3")
"""The `model_type`s that the trainer can load."""


def builtin_models() -> list[str]:
    """The names of the models that the package ships."""
    return sorted(path.parent.name for path in MODELS_DIRECTORY.glob("*/config.json"))


def resolve_model_path(path: str) -> Path:
    """The directory of `builtin:NAME`, or of a path. Raises ConfigError where there is none."""
    if path.startswith(BUILTIN):
        name = path.removeprefix(BUILTIN)
        names = builtin_models()
        if name in names:
            return MODELS_DIRECTORY / name
        hint = did_you_mean(name, names, BUILTIN) or f"; shipped: {', '.join(names) or 'none'}"
        raise ConfigError(f"model.path: there is no shipped model '{name}'{hint}")
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ConfigError(f"model.path: '{path}' is a file; it must be a Hugging Face model directory")
    near = did_you_mean(path, [BUILTIN + name for name in builtin_models()])
    advice = near or "; download the model there first, or name another directory"
    raise ConfigError(f"model.path: there is no directory '{path}'{advice}")


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
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: expected a JSON object")
    return data


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer that decide its memory."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    tied_embeddings: bool

    @classmethod
    def read(cls, directory: Path) -> Self:
        """From config.json. Raises ConfigError for a family or a file that the trainer cannot use."""
        path = directory / "config.json"
        data = read_json(path)
        model_type = data.get("model_type")
        if model_type not in FAMILIES:
            raise ConfigError(
                f"{path}: model_type {model_type!r} is not supported; one of {', '.join(FAMILIES)} is"
            )

        def size(key: str, default: int | None = None) -> int:
            value = data.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{path}: '{key}' must be a positive integer, got {value!r}")
            return value

        num_heads = size("num_attention_heads")
        return cls(
            model_type=model_type,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=size("num_key_value_heads", num_heads),
            head_dim=size("head_dim", size("hidden_size") // num_heads),
            ffn_size=size("intermediate_size"),
            max_positions=size("max_position_embeddings"),
            tied_embeddings=bool(data.get("tie_word_embeddings", False)),
        )

    @property
    def num_parameters(self) -> int:
        """All parameters, tied embeddings counted once."""
        return self.parameters_per_rank(tensor_parallel=1)

    def parameters_per_rank(self, *, tensor_parallel: int) -> int:
        """Parameters on one tensor-parallel rank, with t ranks.

        Split over the ranks: embeddings V·H (twice when untied, V padded to a multiple of t), and in each of
        L layers the projections q and o (2·H·A·D), k and v (2·H·K·D), the MLP's three (3·H·F), and Qwen2's
        biases ((A + 2K)·D). Whole on each rank: the norms, 2H a layer and H at the end, and Qwen3's on q and
        k (2D a layer).
        """
        hidden, layers, dim = self.hidden_size, self.num_layers, self.head_dim
        padded_vocab = -(-self.vocab_size // tensor_parallel) * tensor_parallel
        embeddings = padded_vocab * hidden * (1 if self.tied_embeddings else 2)
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * dim * hidden
        biases = (self.num_heads + 2 * self.num_kv_heads) * dim if self.model_type == "qwen2" else 0
        split = embeddings + layers * (heads + biases + 3 * hidden * self.ffn_size)
        norms = 2 * hidden + (2 * dim if self.model_type == "qwen3" else 0)
        return split // tensor_parallel + layers * norms + hidden
