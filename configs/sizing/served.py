"""What the models beside the policy take, where the run serves them: a teacher's or a judge's engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.engines import ServedModel
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.memory import engine_memory
from polyturn.configs.sizing.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedMemory:
    """Bytes by part of one tensor-parallel rank of a model's engines."""

    model: ServedModel
    shape: ModelShape
    parts: Mapping[str, int]

    @property
    def num_ranks(self) -> int:
        """Of all its engines."""
        return self.model.engines.num_engines * self.model.engines.tensor_parallel

    @property
    def total(self) -> int:
        """Of one rank."""
        return sum(self.parts.values())


def managed_models(config: RunConfig) -> list[ServedModel]:
    """Those for which the run starts engines."""
    return [model for model in config.served_models if model.is_managed]


def served_memory(config: RunConfig) -> list[ServedMemory]:
    """Of each model for which the run starts engines. Raises ConfigError where there is no such directory."""
    found = []
    for model in managed_models(config):
        assert model.path is not None
        shape = ModelShape.read(resolve_model_path(model.path, key=f"{model.name}.path", needs_weights=False))
        parts = engine_memory(shape, servers=model.engines, dtype=model.dtype, sglang=model.sglang)
        found.append(ServedMemory(model=model, shape=shape, parts=parts))
    return found
