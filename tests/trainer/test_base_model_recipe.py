"""The recipes of the base models in a short form, and the models that ship."""

import json
import re

import pytest

from polyturn.configs.models import resolve_model_path
from polyturn.envs.search.styles import SEARCH_R1, last_block, parse_turn
from polyturn.trainer.base_model.recipe import (
    Recipe,
    checksum,
    load_recipe,
    make_base_model,
    make_stream,
    recipe_path,
    rename_tokens,
)
from polyturn.trainer.base_model.tagged import TAGS


@pytest.fixture(scope="module")
def shipped():
    return resolve_model_path("builtin:tiny-searcher")


@pytest.fixture(scope="module")
def tagged():
    return resolve_model_path("builtin:tiny-tag-searcher")


@pytest.mark.parametrize("name", ["tiny-searcher", "tiny-tag-searcher"])
def test_a_shipped_model_is_small_and_is_what_its_recipe_says(name):
    directory = resolve_model_path(f"builtin:{name}")
    card = json.loads((directory / "recipe.json").read_text())
    assert card["sha256"]["model.safetensors"] == checksum(directory)
    assert Recipe.model_validate(card["recipe"]) == load_recipe(recipe_path(name.replace("-", "_")))
    assert (directory / "model.safetensors").stat().st_size <= 4_000_000


def test_a_model_that_knows_tags_has_the_tokens_of_the_one_it_starts_from_under_other_names(shipped, tagged):
    recipe = load_recipe(recipe_path("tiny_tag_searcher"))
    before, after = (
        {
            token["content"]: token["id"]
            for token in json.loads((path / "tokenizer.json").read_text())["added_tokens"]
        }
        for path in (shipped, tagged)
    )
    assert after == {recipe.renamed_tokens.get(text, text): number for text, number in before.items()}
    assert {"<search>", "</search>", "<answer>", "</answer>"} == set(recipe.renamed_tokens.values())


def test_a_token_that_is_not_there_is_not_renamed(shipped, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((shipped / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="no added token '<call>'"):
        rename_tokens(path, {"<call>": "<search>"})
    assert path.read_bytes() == (shipped / "tokenizer.json").read_bytes()


def test_demonstrations_in_tags_are_read_as_the_environment_reads_them(tagged):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tagged)
    right = load_recipe(recipe_path("tiny_tag_searcher")).stages[1]
    token_ids, taught = next(make_stream(right, tokenizer, seed=0))
    text = tokenizer.decode([token for token, is_taught in zip(token_ids, taught, strict=True) if is_taught])
    turns = [match[0] for match in re.finditer(r"<(search|answer)>[^<]+</\1>", text)]
    assert "".join(turns) == text, "nothing but these is taught"
    *searches, last = (parse_turn(turn, TAGS) for turn in turns)
    assert [call.name for turn in searches for call in turn.tool_calls] == ["search", "search"]
    answer = last_block(last.content, TAGS.answer)
    results = tokenizer.decode(token_ids).rsplit("<information>", 1)[1]
    assert results.count("(Title: ") == SEARCH_R1.top_k
    assert answer and answer in results.split("Doc 2(")[0]


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


@pytest.mark.stack
def test_a_recipe_goes_on_from_a_shipped_model_whose_tokens_get_other_names(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = load_recipe(recipe_path("tiny_tag_searcher"))
    recipe = whole.model_copy(update={"stages": whole.stages[:1]}).shortened(20)
    [first, *_, last] = make_base_model(recipe, tmp_path / "model", report=lambda _: None)["read"]
    assert last < first - 0.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.tokenize("<search></search>") == ["<search>", "</search>"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == recipe.vocab_size
