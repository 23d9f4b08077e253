"""From what a launch script of slime starts to a recipe, and what of it was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyturn.configs.loading import upstream
from polyturn.configs.loading.yaml_tree import read_scalar
from polyturn.configs.slime.counterparts import COPIED, DERIVED, LEFT_OUT, MODEL_OPTIONS
from polyturn.configs.slime.script import Launch

ALGORITHMS: Mapping[str, str] = {
    "grpo": "grpo",
    "gspo": "gspo",
    "ppo": "ppo",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
}
RULES: Mapping[str, str] = {
    "deepscaler": "math",
    "dapo": "math",
    "math": "math",
    "f1": "f1",
    "gpqa": "multiple_choice",
}
NONZERO = "check_reward_nonzero_std"
PROMPT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A recipe, as a mapping to be written as YAML."""

    recipe: dict[str, Any]
    left_out: tuple[tuple[str, str], ...]
    """Options, each with the reason."""


def recipe_of(launch: Launch, *, name: str) -> Imported:
    """The recipe of a launch. Raises `ValueError` for a value that is no number where there must be one."""
    return _Importer(launch, name).run()


class _Importer:
    def __init__(self, launch: Launch, name: str) -> None:
        self._launch = launch
        self._given = launch.options
        self._recipe: dict[str, Any] = {"name": name}
        self._left_out: list[tuple[str, str]] = []
        self._assumed: set[tuple[str, str]] = set()

    def run(self) -> Imported:
        self._data()
        self._sizes()
        self._algorithm()
        for one in COPIED:
            if one.option in self._given:
                self._set(one.keys[0], self._value(one.option))
        self._layout()
        self._engine_options()
        self._rest()
        return Imported(recipe=self._recipe, left_out=tuple(self._left_out))

    def _data(self) -> None:
        self._set("environment.id", "polyturn/SingleTurn-v0")
        keys = {
            key: self._text(option)
            for option, key in (
                ("--input-key", "prompt_key"),
                ("--label-key", "label_key"),
                ("--metadata-key", "metadata_key"),
            )
            if option in self._given
        }
        if "--prompt-data" in self._given:
            self._set(
                "environment.tasks", {"path": self._text("--prompt-data"), **keys, "other_keys": "drop"}
            )
        sets = list(self._given.get("--eval-prompt-data", ()))
        named = [("eval", sets[0])] if len(sets) == 1 else list(zip(sets[::2], sets[1::2], strict=False))
        for index, (name, path) in enumerate(named):
            source = {"path": path, **keys, "other_keys": "drop"}
            if index == 0:
                self._set("evaluation.tasks", source)
            else:
                self._recipe["evaluation"].setdefault("suites", []).append({"name": name, "tasks": source})
        kind = self._text("--rm-type")
        if kind in RULES:
            self._set("reward", {"kind": "rule", "name": RULES[kind]})
        elif kind:
            self._left_out.append(
                ("--rm-type", f"there is no rule {kind!r}: name a reward of your own (docs/rewards.md)")
            )

    def _sizes(self) -> None:
        if "--rollout-max-response-len" in self._given:
            answer = self._number("--rollout-max-response-len")
            prompt = self._number("--rollout-max-prompt-len", PROMPT_TOKENS)
            self._set("environment.max_tokens_per_turn", answer)
            self._set("environment.max_tokens_per_episode", answer + prompt)
        prompts = self._number("--rollout-batch-size", 0)
        episodes = prompts * self._number("--n-samples-per-prompt", 1)
        if "--over-sampling-batch-size" in self._given and prompts:
            self._set("rollout.oversample", self._number("--over-sampling-batch-size") / prompts)
            self._set("rollout.on_stale", "drop")
        chosen = self._text("--dynamic-sampling-filter-path")
        if chosen.endswith(NONZERO):
            self._set("rollout.filter", {"kind": "nonzero_deviation"})
        elif chosen:
            why = "write rollout.filter.kind: success_rate, or a sampler of your own (docs/tasks.md)"
            self._left_out.append(("--dynamic-sampling-filter-path", f"{chosen}: {why}"))
        # One follows from the other: rollout_batch_size x n_samples = global_batch_size x num_steps.
        if "--global-batch-size" in self._given:
            self._set("trainer.updates_per_step", max(1, episodes // self._number("--global-batch-size")))
        elif episodes:
            self._set("trainer.global_batch_size", episodes // self._number("--num-steps-per-rollout", 1))

    def _algorithm(self) -> None:
        estimator = self._text("--advantage-estimator") or "grpo"
        if estimator in ALGORITHMS:
            self._recipe["extends"] = [f"algorithms/{ALGORITHMS[estimator]}"]
        else:
            self._left_out.append(
                ("--advantage-estimator", f"there is no {estimator!r} (docs/algorithms.md)")
            )
        loss = {}
        if "--eps-clip" in self._given:
            loss["clip_low"] = self._number("--eps-clip")
            loss["clip_high"] = self._number("--eps-clip-high", self._number("--eps-clip"))
        if "--eps-clip-c" in self._given:
            loss["dual_clip"] = self._number("--eps-clip-c")
        if loss:
            self._set("trainer.algorithm.loss", loss)
        coefficient = self._number("--kl-loss-coef", 0.0) if "--use-kl-loss" in self._given else 0.0
        if coefficient:
            # As terms of a loss, k1 has no gradient to speak of and k3 that of the other KL (docs/objective.md).
            self._set(
                "trainer.algorithm.kl", {"kind": "in_loss", "estimator": "k2", "coefficient": coefficient}
            )
        elif self._number("--kl-coef", 0.0):
            self._set(
                "trainer.algorithm.kl",
                {"kind": "in_reward", "estimator": "k1", "coefficient": self._number("--kl-coef")},
            )
        else:
            self._set("trainer.algorithm.kl", {"kind": "none"})
        if "--calculate-per-token-loss" in self._given:
            self._set("trainer.algorithm.reduction", {"kind": "token_mean"})
        if "--lr-decay-style" in self._given:
            self._set("trainer.optimizer.schedule", {"kind": self._text("--lr-decay-style")})

    def _layout(self) -> None:
        gpus = self._number("--actor-num-nodes", 1) * self._number("--actor-num-gpus-per-node", 8)
        one = (
            self._number("--tensor-model-parallel-size", 1)
            * self._number("--pipeline-model-parallel-size", 1)
            * self._number("--context-parallel-size", 1)
        )
        self._set("trainer.parallel.data", max(1, gpus // one))
        self._set("cluster.gpus_per_node", self._number("--actor-num-gpus-per-node", 8))
        width = self._number("--rollout-num-gpus-per-engine", 1)
        shared = "--colocate" in self._given
        engines = max(1, (gpus if shared else self._number("--rollout-num-gpus", gpus)) // width)
        self._set("engines.tensor_parallel", width)
        self._set("engines.num_engines", engines)
        if shared:
            # NCCL takes no two ranks of a group on one GPU: weights go through a directory.
            self._set("engines.placement", "shared")
            self._set("weight_sync", {"kind": "disk"})
        interval = self._number("--update-weights-interval", 1)
        staleness = max(int(self._launch.is_async), interval - 1)
        if interval > 1:
            self._set("weight_sync.every_steps", interval)
        if staleness:
            self._set("rollout.max_staleness", staleness)
        if "--sglang-server-concurrency" in self._given:
            self._set(
                "rollout.max_concurrent_requests", self._number("--sglang-server-concurrency") * engines
            )

    def _engine_options(self) -> None:
        taken = {one.option for one in (*DERIVED, *LEFT_OUT)}
        for option in self._given:
            if not option.startswith("--sglang-") or (option in taken and option != "--sglang-dp-size"):
                continue
            key = option.removeprefix("--sglang-").replace("-", "_")
            key = {"dp_size": "attn_dp_size"}.get(key, key)
            value = self._value(option)
            refused = [
                sentence for _, sentence in upstream.find_problems("sglang", {key: value}, device="cuda")
            ]
            if refused:
                self._left_out.append((option, refused[0]))
            else:
                self._set(f"sglang.{key}", value)

    def _rest(self) -> None:
        known = {one.option for one in (*COPIED, *DERIVED)}
        why = {one.option: one.how for one in LEFT_OUT}
        model = [option for option in self._given if option in MODEL_OPTIONS]
        for option in self._given:
            if option in why:
                self._left_out.append((option, why[option]))
            elif option not in known and option not in MODEL_OPTIONS and not option.startswith("--sglang-"):
                self._left_out.append(
                    (option, "there is no counterpart that the importer knows (docs/configuration.md)")
                )
        if model:
            self._left_out.append(
                (f"{len(model)} options of MODEL_ARGS", "they are read from config.json of model.path")
            )
        self._left_out += [("the script", note) for note in self._launch.notes]

    def _set(self, key: str, value: Any) -> None:
        section = self._recipe
        *above, last = key.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value

    def _text(self, option: str) -> str:
        return " ".join(self._given.get(option, ()))

    def _value(self, option: str) -> Any:
        values = self._given[option]
        if not values:
            return True
        read = [read_scalar(value) for value in values]
        return read[0] if len(read) == 1 else read

    def _number(self, option: str, default: Any = None) -> Any:
        text = self._text(option)
        if default is not None and (option not in self._given or "$" in text):
            if "$" in text and (option, text) not in self._assumed:
                self._assumed.add((option, text))
                self._left_out.append((option, f"{text} is not known here; {default} is assumed"))
            return default
        value = self._value(option) if option in self._given else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{option} must be a number, not {text or 'missing'!r}")
        return value
