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
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from polyturn.trainer.base_model.initial import train_tokenizer, training_texts, write_initial_model
from polyturn.trainer.base_model.streams import (
    EpisodeStream,
    Example,
    played_episodes,
    readings,
    repeated_sequences,
)

Report = Callable[[str], None]


class Stage(BaseModel):
    """One run of supervised training over one stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["repeated_sequences", "readings", "episodes"]
    skill: float = Field(default=1.0, ge=0.0, le=1.0)
    """Of the demonstrator, for episodes."""
    observation_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """How many of the tokens of observations are taught too, for episodes."""
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


def recipe_path() -> Path:
    """The recipe of the shipped model."""
    return Path(str(files("polyturn.configs"))) / "base_models" / "tiny_searcher.yaml"


def load_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises `ValueError` where it does not hold what a recipe holds."""
    # YAML 1.1 takes 1e-3 for a text; pydantic takes the text for a number.
    return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def make_base_model(recipe: Recipe, output: Path, *, report: Report = print) -> dict[str, list[float]]:
    """Make the model, write it to `output` and return each stage's losses by update."""
    from polyturn.trainer.base_model.supervised import SupervisedConfig, train_supervised

    started = time.perf_counter()
    losses: dict[str, list[float]] = {}
    tokenizer = train_tokenizer(training_texts(), vocab_size=recipe.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "initial"
        write_initial_model(tokenizer, model, seed=recipe.seed)
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


def make_stream(stage: Stage, tokenizer: Any, *, seed: int) -> Iterator[Example]:
    """The endless examples of a stage."""
    if stage.kind == "repeated_sequences":
        return repeated_sequences(vocab_size=len(tokenizer), seed=seed)
    stream = EpisodeStream(skill=stage.skill, observation_share=stage.observation_share)
    make = readings if stage.kind == "readings" else played_episodes
    return make(tokenizer, stream, seed=seed)


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
