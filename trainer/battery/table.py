"""The tables of docs/algorithms.md, from the registries and the battery.

`python -m polyturn.trainer.battery.table docs/algorithms.md` renews them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polyturn.configs.loading import yaml_tree
from polyturn.configs.loading.loader import find_shipped, shipped_names
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.objective import KLInLoss, KLInReward
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    ENTROPY_CONTROLS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
    Entry,
    Registry,
)
from polyturn.trainer.battery.kit import checks

REGISTRIES: Mapping[str, Registry[Any]] = {
    "advantages": ADVANTAGES,
    "losses": POLICY_LOSSES,
    "kl": KL_ESTIMATORS,
    "corrections": CORRECTIONS,
    "entropy": ENTROPY_CONTROLS,
    "reductions": REDUCERS,
    "rewards": REWARD_POSTPROCESSORS,
}
"""By the name of their table."""
KEYS = {
    "rewards": "reward_shaping",
    "advantages": "advantage",
    "losses": "loss",
    "corrections": "corrections",
    "entropy": "entropy_control",
    "reductions": "reduction",
}
"""Where a config names a function of each registry, below `trainer.algorithm`."""
NOTHING = "-"
MAX_CONFIGS = 3
CLAIMS = {
    "zero": "zero",
    "policy_gradient": "policy gradient",
    "on_policy_gradient": "policy gradient, on-policy",
    "scaled_policy_gradient": "(G - 1) / G policy gradient",
    "reverse_kl": "KL(policy, other)",
    "forward_kl": "KL(other, policy)",
    "reverse_minus_forward_kl": "KL(policy, other) - KL(other, policy)",
    "biased": "biased",
}
PLACES = {
    "loss": "in the loss",
    "loss_times_detached_ratio": "times the detached ratio",
    "loss_times_ratio": "times the ratio",
    "reward": "in the reward",
}
TEST = "../tests/trainer/algorithms/battery/test_closed_forms.py"


def table(registry: Registry[Any]) -> str:
    """One row for each function: name, formula, gradient, paper, code, test, and the shipped configs that use it."""
    rows = [
        "| name | formula | gradient | paper | code | test | configs |",
        "|---|---|---|---|---|---|---|",
        *("| " + " | ".join(_cells(registry, entry)) + " |" for entry in registry),
    ]
    return "\n".join(rows)


def kinds_table() -> str:
    """One row for each kind of plug-in: where a config has it, and its signature."""
    rows = ["| what | where in `trainer.algorithm` | signature |", "|---|---|---|"]
    for name, registry in REGISTRIES.items():
        if name in KEYS:
            rows.append(f"| {registry.what} | `{KEYS[name]}` | `{registry.signature.text}` |")
    return "\n".join(rows)


def checks_table() -> str:
    """One row for each check of the battery: what it is applied to, and what must hold."""
    rows = ["| of | check | what must hold |", "|---|---|---|"]
    for registry in REGISTRIES.values():
        for name, check in checks(registry).items():
            rows.append(f"| {registry.what} | `{name}` | {' '.join((check.__doc__ or '').split())} |")
    return "\n".join(rows)


def renewed(text: str) -> str:
    """A document with the tables between its marks `<!-- table NAME -->` and `<!-- end -->` made anew."""
    tables = {name: table(registry) for name, registry in REGISTRIES.items()}
    for name, content in {**tables, "kinds": kinds_table(), "checks": checks_table()}.items():
        begin, end = f"<!-- table {name} -->\n", "\n<!-- end -->"
        before, found, rest = text.partition(begin)
        assert found, f"there is no table {name!r}"
        _, found, after = rest.partition(end)
        assert found, f"the table {name!r} has no end"
        text = before + begin + content + end + after
    return text


def used_by(registry: Registry[Any], name: str) -> list[str]:
    """The shipped algorithms that use a function."""
    return [
        shipped
        for shipped in shipped_names("algorithm")
        if name in kinds(registry, read_algorithm(shipped), written=written_keys(shipped))
    ]


@functools.cache
def read_algorithm(name: str) -> AlgorithmConfig:
    """The algorithm of a shipped file."""
    return AlgorithmConfig.model_validate(_written(name))


def written_keys(name: str) -> frozenset[str]:
    """What a shipped file says about the algorithm, the rest being defaults."""
    return frozenset(_written(name))


def kinds(registry: Registry[Any], config: AlgorithmConfig, *, written: frozenset[str]) -> Iterator[str]:
    """The names of the registry's functions that a config uses, as far as it was written and not a default."""
    if registry is KL_ESTIMATORS:
        if isinstance(config.kl, KLInLoss | KLInReward):
            yield config.kl.estimator
        return
    key = next(KEYS[name] for name, known in REGISTRIES.items() if known is registry)
    section = getattr(config, key)
    if key in written:
        yield from (each.kind for each in (section if isinstance(section, list) else [section]))


@functools.cache
def _written(name: str) -> dict[str, Any]:
    tree = yaml_tree.read_file(find_shipped("algorithm", name)).plain()
    algorithm: dict[str, Any] = tree["trainer"]["algorithm"]
    return algorithm


def _cells(registry: Registry[Any], entry: Entry) -> Iterator[str]:
    yield f"`{entry.name}`"
    formula = entry.formula.replace("|", "\\|")
    yield f"`{formula}`"
    claims = [f"{CLAIMS[claim]} {PLACES[place]}" for place, claim in entry.gradients.items()]
    if registry is not KL_ESTIMATORS:
        claims = [CLAIMS[claim] for claim in entry.gradients.values()]
    yield "; ".join(claims) or NOTHING
    yield ", ".join(_paper(source) for source in entry.paper.split(", "))
    yield _code(entry)
    yield f"[closed form]({TEST}), `-k {entry.name}`"
    # The one of its own name first.
    used = sorted(used_by(registry, entry.name), key=lambda name: (name != entry.name, name))
    shown = [f"[{name}](../configs/algorithms/{name}.yaml)" for name in used[:MAX_CONFIGS]]
    yield ", ".join([*shown, "..."] if len(used) > MAX_CONFIGS else shown) or NOTHING


def _paper(source: str) -> str:
    year, dot, number = source.partition(".")
    is_id = dot and year.isdigit() and number.isdigit()
    return f"[{source}](https://arxiv.org/abs/{source})" if is_id else source


def _code(entry: Entry) -> str:
    path = Path(inspect.getfile(entry.function)).resolve()
    relative = path.relative_to(Path(__file__).resolve().parents[1])
    return f"[{entry.function.__name__}](../trainer/{relative.as_posix()})"


def main() -> None:
    """Renew the tables of the file that the command names."""
    (path,) = (Path(argument) for argument in sys.argv[1:])
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
