"""The side that runs reasoning-gym: in a worker process, where its hangs, crashes and random state stay."""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def serve(method: str, *arguments: Any) -> Any:
    """Answer one call of the adapter."""
    methods: Mapping[str, Callable[..., Any]] = {"names": names, "check": check, "item": item, "score": score}
    return methods[method](*arguments)


def names() -> list[str]:
    """All datasets that the package registers."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def check(dataset: str, config: str) -> None:
    """Raises whatever the dataset raises at its options."""
    _dataset(dataset, config, 0)


def item(dataset: str, config: str, seed: int) -> dict[str, Any]:
    """`question` and `answer` (None where the package gives no answer) of the item of that seed."""
    entry = _entry(dataset, config, seed)
    return {"question": entry["question"], "answer": entry["answer"]}


def score(dataset: str, config: str, seed: int, answer: str) -> float:
    """What the dataset's scorer pays for an answer."""
    entry = _entry(dataset, config, seed)
    _reseed(dataset, seed)
    return float(_dataset(dataset, config, seed).score_answer(answer, entry))


@functools.lru_cache(maxsize=64)
def _dataset(name: str, config: str, seed: int) -> Any:
    import reasoning_gym

    _reseed(name, seed)
    # One item each: some datasets make all of theirs at once, and item i of seed s is item 0 of seed s + i in most.
    return reasoning_gym.create_dataset(name, seed=seed, size=1, **json.loads(config))


@functools.lru_cache(maxsize=64)
def _entry(dataset: str, config: str, seed: int) -> dict[str, Any]:
    made = _dataset(dataset, config, seed)
    _reseed(dataset, seed)
    return made[0]


def _reseed(dataset: str, seed: int) -> None:
    """Datasets that draw from the global generators must not depend on what was drawn before."""
    mixed = zlib.crc32(f"{dataset}/{seed}".encode())
    random.seed(mixed)
    np.random.seed(mixed)
