"""What Polyturn needs beside its own code, and how to get it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from polyturn.configs.errors import ConfigError

TRAIN_EXTRA = "pip install 'polyturn[train]'  (without a GPU: pip install --no-deps -r requirements/cpu.lock)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A package that some command needs."""

    distribution: str
    module: str
    used_for: str
    install: str
    needed_to_train: bool = True

    def installed_version(self) -> str | None:
        """Its version; None where it is missing. Nothing is imported."""
        try:
            found = version(self.distribution)
        except PackageNotFoundError:
            return None
        return found if importlib.util.find_spec(self.module) is not None else None


def _base(distribution: str, used_for: str, module: str | None = None) -> Package:
    return Package(
        distribution=distribution,
        module=module or distribution,
        used_for=used_for,
        install="pip install polyturn",
    )


def _train(distribution: str, used_for: str, module: str | None = None) -> Package:
    return Package(
        distribution=distribution,
        module=module or distribution.replace("-", "_"),
        used_for=used_for,
        install=TRAIN_EXTRA,
    )


PACKAGES = (
    _base("gymnasium", "environments"),
    _base("pydantic", "configs"),
    _base("tantivy", "the search tool's index"),
    _base("pyarrow", "trajectories"),
    _train("torch", "training and serving"),
    _train("transformers", "tokenizers and chat templates"),
    _train("sglang", "rollout engines"),
    _train("sglang-router", "the router in front of the engines"),
    _train("megatron-core", "the trainer", "megatron"),
    _train("ray", "the processes of a run"),
    _train("tensorboardX", "TensorBoard events"),
    Package(
        distribution="uvicorn",
        module="uvicorn",
        used_for="polyturn serve search",
        install="pip install 'polyturn[search]'",
        needed_to_train=False,
    ),
    Package(
        distribution="faiss-cpu",
        module="faiss",
        used_for="dense search",
        install="pip install 'polyturn[search]'",
        needed_to_train=False,
    ),
    Package(
        distribution="matplotlib",
        module="matplotlib",
        used_for="plots of the benchmarks",
        install="pip install 'polyturn[plot]'",
        needed_to_train=False,
    ),
)
SERVING = ("torch", "transformers", "sglang", "sglang-router")
"""What an evaluation needs, beside the base."""


def require(distributions: Iterable[str] | None = None) -> None:
    """Raise ConfigError naming what is missing of these packages (None: of all that training needs)."""
    wanted = [
        p
        for p in PACKAGES
        if p.needed_to_train and (distributions is None or p.distribution in distributions)
    ]
    missing = [package for package in wanted if package.installed_version() is None]
    if missing:
        names = ", ".join(package.distribution for package in missing)
        raise ConfigError(f"not installed: {names}; install with: {missing[-1].install}")
