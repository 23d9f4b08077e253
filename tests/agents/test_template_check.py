"""What is told about a model's chat template before a run, and what its directory names."""

import json
from datetime import date

import pytest

from polyturn.agents.chat import asks_for_date, load_tokenizer
from polyturn.agents.dialects import make_dialect
from polyturn.configs.loading.loader import load_config
from polyturn.rollout.checks import check_chat_template
from polyturn.rollout.factory import renderer_of
from tests.support.chat_families import FAMILIES, build


def config_of(environment="polyturn/TwoHopSearch-v0", **model):
    config = load_config("quickstart", [f"environment.id={environment}", "environment.options={}"])
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


def saved(name, directory):
    family = FAMILIES[name]
    tokenizer = build(family)
    tokenizer.save_pretrained(directory)
    ids = tokenizer.convert_tokens_to_ids(list(family.listed_eos))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return directory


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2.5", []),
        ("qwen3", ["rewrites earlier turns behind a user's message,"]),
        ("gemma-3", ["has no tools: specs and results are written as text"]),
        (
            "deepseek-r1",
            [
                "does not show tools to the model",
                "writes tool calls as ",
                "rewrites earlier turns behind a tool's result and a user's message,",
            ],
        ),
        ("llama3.1", ['"parameters": {"query": ', "rewrites earlier turns behind a tool's result,"]),
    ],
)
def test_what_one_may_not_expect_is_told(name, words, tmp_path):
    notes = check_chat_template(config_of(), saved(name, tmp_path))
    assert len(notes) == len(words), notes
    for note, word in zip(notes, words, strict=True):
        assert word in note


@pytest.mark.parametrize(
    ("name", "dialect", "words"),
    [
        ("qwen2.5", "auto", ["auto reads calls as `hermes` does"]),
        ("llama3.1", "auto", ["auto reads calls as `json` does", "rewrites earlier turns"]),
        ("llama3.1", "json", ["rewrites earlier turns"]),
        ("qwen2.5", "pythonic", ["which model.dialect: pythonic does not read; set model.dialect: auto"]),
        (
            "gemma-3",
            "json",
            ["has no tools", "in the way of model.dialect: hermes, which json does not read"],
        ),
    ],
)
def test_each_dialect_is_tried_on_what_the_template_writes(name, dialect, words, tmp_path):
    notes = check_chat_template(config_of(dialect=dialect), saved(name, tmp_path))
    assert len(notes) == len(words), notes
    for note, word in zip(notes, words, strict=True):
        assert word in note


def test_without_tools_nothing_is_told_of_them(tmp_path):
    assert check_chat_template(config_of("polyturn/Math-v0"), saved("gemma-3", tmp_path)) == []


def test_history_that_is_kept_as_sampled_is_not_told(tmp_path):
    directory = saved("qwen3", tmp_path)
    assert check_chat_template(config_of(history="sampled"), directory) == []
    assert check_chat_template(config_of(dialect="search_r1"), directory) == []


def test_what_cannot_be_used_is_refused(tmp_path):
    directory = saved("gemma-3", tmp_path)
    with pytest.raises(ValueError, match=r"model\.tool_prompt: text has tools written as text"):
        check_chat_template(config_of(tool_prompt="template"), directory)
    with pytest.raises(ValueError, match="reads no option 'enable_thinking'"):
        check_chat_template(config_of(template_options={"enable_thinking": False}), directory)


def test_a_template_of_ones_own_takes_the_place_of_the_models(tmp_path):
    directory, own = saved("qwen2.5", tmp_path / "model"), tmp_path / "own.jinja"
    own.write_text(FAMILIES["qwen3"].template)
    assert check_chat_template(config_of(), directory) == []
    (note,) = check_chat_template(config_of(template=own), directory)
    assert "rewrites earlier turns behind a user's message" in note
    for text, why in (
        ("{% if %}", "refuses a conversation of user"),
        (" ", "is empty"),
        (b"\xff", "is not UTF-8"),
        (None, "cannot be read: No such file"),
    ):
        own.unlink(missing_ok=True)
        if text is not None:
            own.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=why):
            check_chat_template(config_of(template=own), directory)


@pytest.mark.parametrize("dialect", ["hermes", "search_r1"])
def test_what_day_it_is_stays_what_it_was_told_to_be(dialect, tmp_path):
    directory = saved("llama3.2", tmp_path)
    tokenizer = load_tokenizer(directory)
    model = config_of(template_date=date(2026, 1, 31)).model
    renderer = renderer_of(model, directory, make_dialect(dialect))
    assert "Today Date: 31 Jan 2026" in tokenizer.decode(renderer.start([{"role": "user", "content": "q"}]))
    given = config_of(template_options={"date_string": "1 May"}).model
    renderer = renderer_of(given, directory, make_dialect(dialect))
    assert "Today Date: 1 May" in tokenizer.decode(renderer.start([{"role": "user", "content": "q"}]))
    assert asks_for_date(directory)
    assert not asks_for_date(saved("qwen3", tmp_path / "other"))
    with pytest.raises(ValueError, match="'strftime_now' is set by rendering"):
        check_chat_template(config_of(template_options={"strftime_now": 1}), directory)


@pytest.mark.parametrize("dialect", ["hermes", "search_r1"])
def test_options_and_ends_reach_the_runs_renderer(dialect, tmp_path):
    directory = saved("qwen3", tmp_path)
    model = config_of(template_options={"enable_thinking": False}).model
    renderer = renderer_of(model, directory, make_dialect(dialect))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.decode(renderer.start([{"role": "user", "content": "q"}])).endswith(
        "<think>\n\n</think>\n\n"
    )
    assert set(tokenizer.convert_ids_to_tokens(renderer.stop_token_ids)) == {"<|im_end|>", "<|endoftext|>"}
    ended = [*tokenizer.encode("2"), tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    assert renderer.decode(ended) == "2"
