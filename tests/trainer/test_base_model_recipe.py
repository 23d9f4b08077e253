"""The recipe of the base model in a short form, and the model that ships."""

import json

import pytest

from polyturn.configs.models import resolve_model_path
from polyturn.trainer.base_model.initial import train_tokenizer, training_texts
from polyturn.trainer.base_model.recipe import Recipe, checksum, load_recipe, make_base_model, recipe_path


@pytest.fixture(scope="module")
def shipped():
    return resolve_model_path("builtin:tiny-searcher")


def test_the_shipped_model_is_small_and_is_what_its_recipe_says(shipped):
    card = json.loads((shipped / "recipe.json").read_text())
    assert card["sha256"]["model.safetensors"] == checksum(shipped)
    assert Recipe.model_validate(card["recipe"]) == load_recipe(recipe_path())
    assert (shipped / "model.safetensors").stat().st_size <= 4_000_000


def test_the_shipped_tokenizer_is_the_one_that_is_built_and_fits_the_model(shipped, tmp_path):
    recipe = load_recipe(recipe_path())
    train_tokenizer(training_texts(), vocab_size=recipe.vocab_size).save_pretrained(tmp_path)
    built, kept = (json.loads((path / "tokenizer.json").read_text()) for path in (tmp_path, shipped))
    assert built == kept
    assert json.loads((shipped / "config.json").read_text())["vocab_size"] == recipe.vocab_size
    assert (tmp_path / "chat_template.jinja").read_text() == (shipped / "chat_template.jinja").read_text()


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("vocab_size: 1280\nstages: []\nsed: 1\n")
    with pytest.raises(ValueError, match="sed"):
        load_recipe(path)


@pytest.mark.stack
def test_the_short_form_of_the_recipe_learns_and_writes_a_model_that_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = load_recipe(recipe_path()).shortened(20)
    losses = make_base_model(recipe, tmp_path / "model", report=lambda _: None)
    for stage in ("copy", "right"):
        assert losses[stage][-1] < losses[stage][0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (
        model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model")) == recipe.vocab_size
    )
    assert json.loads((tmp_path / "model" / "recipe.json").read_text())["sha256"] == {
        "model.safetensors": checksum(tmp_path / "model")
    }
