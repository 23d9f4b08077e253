"""From what a launch script of slime starts to a recipe, and what of it was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyturn.configs.loading import upstream
from polyturn.configs.loading.yaml_tree import read_scalar
from polyturn.configs.slime.counterparts import COPIED, DERIVED, LEFT_OUT, MODEL_OPTIONS
from polyturn.configs.slime.hooks import RULES, hooks_of
from polyturn.configs.slime.script import Launch

ALGORITHMS: Mapping[str, str] = {
    "grpo": "grpo",
    "gspo": "gspo",
    "ppo": "ppo",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
}
PROMPT_TOKENS = 4096
SFT_FUNCTION = "sft_rollout.generate_rollout"
SFT_LOSS = "sft_loss"
ASYNC_FUNCTION = "fully_async_rollout.generate_rollout_fully_async"


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """A recipe, as a mapping to be written as YAML."""

    recipe: dict[str, Any]
    left_out: tuple[tuple[str, str], ...]
    """Options, each with the reason."""
    command: str = "train"
    """Which of ours runs it: `train`, or `sft`."""


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
        self._hooks()
        command = "train"
        if (
            self._text("--rollout-function-path").endswith(SFT_FUNCTION)
            or self._text("--loss-type") == SFT_LOSS
        ):
            command = "sft"
            self._supervise()
        self._rest()
        return Imported(recipe=self._recipe, left_out=tuple(self._left_out), command=command)

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
        elif kind and "--custom-rm-path" not in self._given:
            self._left_out.append(
                ("--rm-type", f"there is no rule {kind!r}: name a reward of your own (docs/rewards.md)")
            )

    def _sizes(self) -> None:
        if "--rollout-max-response-len" in self._given:
            answer = self._number("--rollout-max-response-len")
            prompt = self._number("--rollout-max-prompt-len", PROMPT_TOKENS)
            self._set("environment.max_tokens_per_turn", answer)
            whole = self._number("--rollout-max-context-len", answer + prompt)
            self._set("environment.max_tokens_per_episode", whole)
        prompts = self._number("--rollout-batch-size", 0)
        episodes = prompts * self._number("--n-samples-per-prompt", 1)
        if "--over-sampling-batch-size" in self._given and prompts:
            self._set("rollout.oversample", self._number("--over-sampling-batch-size") / prompts)
            self._set("rollout.on_stale", "drop")
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
            schedule: dict[str, Any] = {"kind": self._text("--lr-decay-style")}
            if "--min-lr" in self._given and "--lr" in self._given and schedule["kind"] != "constant":
                schedule["final_fraction"] = self._number("--min-lr") / self._number("--lr")
            self._set("trainer.optimizer.schedule", schedule)

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
        ahead = self._launch.is_async or self._text("--rollout-function-path").endswith(ASYNC_FUNCTION)
        staleness = max(int(ahead), interval - 1)
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

    def _hooks(self) -> None:
        hooks = hooks_of(self._launch)
        for key, value in hooks.keys.items():
            if key != "environment.max_turns" or "--max-turns" not in self._given:
                self._set(key, value)
        self._left_out += hooks.left_out

    def _supervise(self) -> None:
        """A recipe for `polyturn sft`. What it has of playing is required of every recipe, and not read there."""
        tasks = self._recipe["environment"].pop("tasks", None)
        if tasks is not None:
            self._set("supervised.data", [tasks["path"]])
        self._set("supervised.epochs", self._number("--num-epoch", 1))
        self._set("rollout.samples_per_prompt", 1)
        self._set("trainer.num_steps", 1)
        self._set("trainer.algorithm.loss", {"kind": "supervised"})
        del self._recipe["extends"]

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
