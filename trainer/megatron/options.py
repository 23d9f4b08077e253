"""The `megatron:` section, taken apart for Megatron-core's config classes.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.transformer.enums import AttnBackend

from polyturn.configs.loading.megatron_options import DTYPES
from polyturn.configs.loading.upstream import find_problems


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronOptions:
    """Further fields of Megatron-core's configs, which win over ours."""

    transformer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, section: Mapping[str, Any], *, device: str) -> Self:
        """Take the section apart.

        Raises:
            ValueError: a field that does not exist, is not the user's to set, or does not go with the device.
        """
        for _, problem in find_problems("megatron", section, device=device):
            raise ValueError(problem)
        optimizer = {
            key: getattr(torch, value) if key in DTYPES else value
            for key, value in section.get("optimizer", {}).items()
        }
        return cls(
            transformer={
                key: AttnBackend[value] if key == "attention_backend" else value
                for key, value in section.items()
                if key not in ("ddp", "optimizer")
            },
            ddp=section.get("ddp", {}),
            optimizer=optimizer,
        )
