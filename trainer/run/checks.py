"""In-run checks: what must hold in every step. A failing check stops the run with one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from polyturn.configs.schema.run import ChecksConfig


class CheckFailure(RuntimeError):
    """Something that must hold did not."""


class RunChecks:
    """Applies the checks that the config turns on, and remembers the largest value of each."""

    def __init__(self, config: ChecksConfig, *, maxima: Mapping[str, float] | None = None) -> None:
        self._config = config
        self.maxima: dict[str, float] = dict(maxima or {})

    def initial_kl(self, value: float, *, step: int) -> None:
        """|policy KL| between the step's start and its first update: no weight has changed in between."""
        self._limit(
            "initial_kl", abs(value), self._config.max_initial_kl, f"step {step}: policy KL before any update"
        )

    def logprob_difference(self, value: float, *, step: int, where: str) -> None:
        """|trainer - engine| over the sampled tokens of a step that was sampled on-policy."""
        self._limit(
            "logprob_difference",
            value,
            self._config.max_logprob_difference,
            f"step {step}: trainer and engine logprobs differ on {where}",
        )

    def weights_equal(
        self, trainer: Mapping[str, str], engine: Mapping[str, str], *, version: int, url: str
    ) -> None:
        """The checksum of every tensor on both sides after a sync."""
        if not self._config.compares_weights:
            return
        differing = sorted(
            name for name in trainer.keys() | engine.keys() if trainer.get(name) != engine.get(name)
        )
        self.maxima["unequal_tensors"] = max(self.maxima.get("unequal_tensors", 0.0), float(len(differing)))
        if differing:
            raise CheckFailure(
                f"version {version}: {len(differing)} tensors of the engine at {url} differ from the trainer's, "
                f"the first is {differing[0]}"
            )

    def groups(
        self, sizes: Mapping[str, int], *, expected: int, dropped: Mapping[str, int], step: int
    ) -> None:
        """Every group has the size asked for, less what was dropped and counted."""
        if not self._config.enabled:
            return
        for group_id, size in sizes.items():
            if size + dropped.get(group_id, 0) != expected:
                raise CheckFailure(
                    f"step {step}: group {group_id} has {size} episodes and {dropped.get(group_id, 0)} dropped, "
                    f"which is not {expected}"
                )

    def trained_once(
        self, sampled: Mapping[str, int], trained: Sequence[Mapping[str, int]], *, step: int
    ) -> None:
        """Every sampled token is trained exactly once per step: mask and denominators agree.

        `sampled` counts the sampled tokens of each sample as the ledgers have them; `trained` is what each
        data-parallel rank put into its losses.
        """
        if not self._config.enabled:
            return
        seen: Counter[str] = Counter()
        for counts in trained:
            seen.update(counts)
        for sample_id in sampled.keys() | seen.keys():
            if sampled.get(sample_id, 0) != seen[sample_id]:
                raise CheckFailure(
                    f"step {step}: sample {sample_id} has {sampled.get(sample_id, 0)} sampled tokens, "
                    f"but {seen[sample_id]} were trained"
                )

    def _limit(self, name: str, value: float, limit: float | None, sentence: str) -> None:
        if not self._config.enabled:
            return
        self.maxima[name] = max(self.maxima.get(name, 0.0), value)
        # `not <=` so that a NaN fails.
        if limit is not None and not value <= limit:
            raise CheckFailure(f"{sentence} is {value:.3g}, more than {limit:g}")
