"""Make the base model: lay down its first weights, then train it stage by stage with the Megatron trainer.

    python -m polyturn.trainer.base_model.recipe --output DIR

writes a Hugging Face directory with `recipe.json`: every stage with its last loss, and the checksum of the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from polyturn.configs.models import resolve_model_path
from polyturn.envs.search.styles import SEARCH_R1
from polyturn.trainer.base_model.initial import train_tokenizer, training_texts, write_initial_model
from polyturn.trainer.base_model.streams import (
    EpisodeStream,
    Example,
    played_episodes,
    readings,
    repeated_sequences,
)
from polyturn.trainer.base_model.tagged import tagged_episodes, tagged_readings

Report = Callable[[str], None]


class Stage(BaseModel):
    """One run of supervised training over one stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["repeated_sequences", "readings", "episodes", "tagged_episodes", "tagged_readings"]
    skill: float = Field(default=1.0, ge=0.0, le=1.0)
    """Of the demonstrator, for episodes."""
    observation_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """How many of the tokens of observations are taught too, for episodes."""
    top_k: PositiveInt | None = None
    """Passages per search. None: as many as the environment shows."""
    num_updates: PositiveInt
    tokens_per_update: PositiveInt
    learning_rate: PositiveFloat
    warmup_updates: int = Field(default=20, ge=0)
    final_fraction: float = Field(default=0.1, ge=0.0, le=1.0)
    """Where the cosine ends, as a fraction of the learning rate."""


class Recipe(BaseModel):
    """All that a base model follows from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: PositiveInt
    start_from: str | None = None
    """`builtin:NAME`: whose tokenizer and weights the first stage begins with. None: a tokenizer that is trained, and
    first weights."""
    renamed_tokens: dict[str, str] = {}
    """Other texts for some of the added tokens of the model that is started from: what was learned of a token stays,
    under another name."""
    seed: int = 0
    stages: tuple[Stage, ...]

    def shortened(self, factor: int) -> Recipe:
        """The same recipe with 1/factor of the updates of each stage: enough to see that it runs and that it learns."""
        stages = tuple(
            stage.model_copy(
                update={
                    "num_updates": max(2, stage.num_updates // factor),
                    "warmup_updates": max(1, stage.warmup_updates // factor),
                }
            )
            for stage in self.stages
        )
        return self.model_copy(update={"stages": stages})


def recipe_path(name: str = "tiny_searcher") -> Path:
    """The recipe of a shipped model."""
    return Path(str(files("polyturn.configs"))) / "base_models" / f"{name}.yaml"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises `ValueError` where it does not hold what a recipe holds."""
    # YAML 1.1 takes 1e-3 for a text; pydantic takes the text for a number.
    return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def make_base_model(recipe: Recipe, output: Path, *, report: Report = print) -> dict[str, list[float]]:
    """Make the model, write it to `output` and return each stage's losses by update."""
    from polyturn.trainer.base_model.supervised import SupervisedConfig, train_supervised

    started = time.perf_counter()
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "initial"
        tokenizer = _start(recipe, model)
        for number, stage in enumerate(recipe.stages):
            config = SupervisedConfig(
                num_updates=stage.num_updates,
                tokens_per_update=stage.tokens_per_update,
                learning_rate=stage.learning_rate,
                warmup_updates=stage.warmup_updates,
                final_fraction=stage.final_fraction,
            )
            trained = Path(scratch) / stage.name
            examples = make_stream(stage, tokenizer, seed=recipe.seed + number)
            losses[stage.name] = train_supervised(
                model, examples, trained, config, seed=recipe.seed, progress=_progress(stage, report)
            )
            model = trained
        (model / "recipe.json").write_text(
            json.dumps(_card(recipe, losses, model, time.perf_counter() - started), indent=2) + "\n",
            encoding="utf-8",
        )
        if output.exists():
            shutil.rmtree(output)
        # Contents without permissions: the trainer's weights are readable by their owner alone.
        shutil.copytree(model, output, copy_function=shutil.copyfile)
    return losses


def _start(recipe: Recipe, directory: Path) -> Any:
    """Write the model before the first stage; returns its tokenizer."""
    if recipe.start_from is None:
        tokenizer = train_tokenizer(training_texts(), vocab_size=recipe.vocab_size)
        write_initial_model(tokenizer, directory, seed=recipe.seed)
        return tokenizer
    from transformers import AutoTokenizer

    model = resolve_model_path(recipe.start_from, key="start_from")
    shutil.copytree(
        model, directory, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns("recipe.json")
    )
    rename_tokens(directory / "tokenizer.json", recipe.renamed_tokens)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if len(tokenizer) != recipe.vocab_size:
        raise ValueError(
            f"vocab_size: {recipe.start_from} has {len(tokenizer)} tokens, not {recipe.vocab_size}"
        )
    return tokenizer


def rename_tokens(path: Path, names: Mapping[str, str]) -> None:
    """Give added tokens of a tokenizer.json other texts, in place; their ids stay.

    Raises:
        ValueError: one of them is not there.
    """
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    if missing := sorted(set(names) - set(added)):
        raise ValueError(f"renamed_tokens: {path} has no added token {missing[0]!r}, only {', '.join(added)}")
    for old, new in names.items():
        added[old]["content"] = new
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_stream(stage: Stage, tokenizer: Any, *, seed: int) -> Iterator[Example]:
    """The endless examples of a stage."""
    if stage.kind == "repeated_sequences":
        return repeated_sequences(vocab_size=len(tokenizer), seed=seed)
    is_tagged = stage.kind in ("tagged_readings", "tagged_episodes")
    stream = EpisodeStream(skill=stage.skill, observation_share=stage.observation_share)
    if is_tagged:
        num_turns = SEARCH_R1.max_searches + SEARCH_R1.final_answer_turn
        stream = replace(stream, top_k=SEARCH_R1.top_k, num_turns=num_turns)
    if stage.top_k is not None:
        stream = replace(stream, top_k=stage.top_k)
    if stage.kind in ("readings", "tagged_readings"):
        return (tagged_readings if is_tagged else readings)(tokenizer, stream, seed=seed)
    return (tagged_episodes if is_tagged else played_episodes)(tokenizer, stream, seed=seed)


def checksum(directory: Path) -> str:
    """SHA-256 of a model directory's weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def _card(recipe: Recipe, losses: dict[str, list[float]], model: Path, seconds: float) -> dict[str, Any]:
    return {
        "made_by": "python -m polyturn.trainer.base_model.recipe",
        "recipe": recipe.model_dump(mode="json"),
        "last_losses": {
            name: round(sum(values[-10:]) / len(values[-10:]), 4) for name, values in losses.items()
        },
        "seconds": round(seconds),
        "sha256": {"model.safetensors": checksum(model)},
    }


def _progress(stage: Stage, report: Report) -> Callable[[int, dict[str, float]], None]:
    def progress(update: int, metrics: dict[str, float]) -> None:
        if update % 20 == 0 or update == stage.num_updates:
            report(f"{stage.name}: update {update} of {stage.num_updates}, loss {metrics['loss']:.4f}")

    return progress


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the base model of the quickstart.")
    parser.add_argument(
        "--recipe", type=Path, default=None, help="a recipe file; default: the shipped model's"
    )
    parser.add_argument("--output", type=Path, required=True, help="the model directory to write")
    parser.add_argument("--shorten", type=int, default=1, metavar="N", help="run 1/N of the updates")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe or recipe_path())
    make_base_model(
        recipe.shortened(args.shorten) if args.shorten > 1 else recipe,
        args.output,
        report=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
