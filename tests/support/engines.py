"""What tests ask of engines, and of what engines should hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import httpx
from torch import Tensor

from polyturn.rollout.engines.checksums import EngineChecksums, EngineLayout


def engine_checksums(
    named_tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    *,
    tied_embeddings: bool,
    num_experts: int = 0,
) -> dict[str, str]:
    """`EngineChecksums` of an engine of one rank on a CPU."""
    checksums = EngineChecksums(EngineLayout(tied_embeddings=tied_embeddings, num_experts=num_experts))
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    for name, tensor in items:
        checksums.add(name, tensor)
    return checksums.finish()


def weight_version(url: str) -> str:
    """The version that an engine stamps on its tokens."""
    return str(httpx.get(f"{url}/model_info", timeout=60, trust_env=False).json()["weight_version"])
