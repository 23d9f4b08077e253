"""What is told about a model's chat template before a run, and what its directory names."""

import json
from datetime import date

import pytest
from tokenizers.processors import TemplateProcessing

from polyturn.agents.chat import ChatRenderer, asks_for_date, load_tokenizer
from polyturn.agents.dialects import make_dialect
from polyturn.agents.template_check import check_template
from polyturn.configs.loading.loader import load_config
from polyturn.rollout.checks import check_chat_template
from polyturn.rollout.factory import dialect_of, renderer_of
from tests.support.chat_families import FAMILIES, build, ends


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


@pytest.mark.parametrize(("choice", "is_made"), [("recover", True), ("explain", False)])
def test_what_becomes_of_malformed_calls_is_the_configs_choice(choice, is_made, tmp_path):
    model = config_of(malformed_calls=choice).model
    text = '<tool_call>{"name": "search", "arguments": {},}</tool_call>'
    (call,) = dialect_of(model, tmp_path).parse(text).tool_calls
    assert (call.error is None) == is_made


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


CUTS = "{{ m.content if loop.last else m.content[:20] }}"
"""A template that cuts long messages once they are no longer the last: nothing in it looks for a text."""


def cutting(tmp_path):
    own = tmp_path / "cutting.jinja"
    body = "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}\n"
    said = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>"
    template = FAMILIES["qwen2.5"].template
    assert body + said in template
    own.write_text(
        template.replace(
            body + said, body + said.replace("{{ message.content }}", CUTS.replace("m.", "message."))
        )
    )
    return own


def test_a_template_that_differs_silently_is_refused_with_the_place(tmp_path):
    directory, own = saved("qwen2.5", tmp_path / "model"), cutting(tmp_path)
    with pytest.raises(ValueError, match=r"whole otherwise than turn by turn: behind .*Wfollow0x"):
        check_chat_template(config_of(template=own), directory)
    assert check_chat_template(config_of(template=own, history="sampled"), directory) == []


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss", "mistral-nemo", "llava", "falcon", "smollm3"])
def test_what_is_said_of_a_template_is_so(name):
    renderer = ChatRenderer(FAMILIES[name].tokenizer)
    report = check_template(renderer)
    assert report.fault is None and report.num_conversations > 5
    facts = dict(report.facts)
    assert facts["contents"] == ("lists of parts" if name == "llava" else "text")
    assert facts["system message"].startswith(
        "has a place" if name != "mistral-nemo" else "none, or it gets lost"
    )
    assert ("date" in facts) is (name == "smollm3")
    assert all(repr(end) in facts["a turn ends with"] for end in ends(name))
    by_what = {case.what: case.difference for case in report.cases}
    behind_answer = by_what["a user's message behind an answer"]
    if name == "falcon":
        assert "<|endoftext|>" in behind_answer.turn_by_turn + behind_answer.before
        assert "<|endoftext|>" not in behind_answer.template
    if name == "gpt-oss":
        assert "<|return|>" in behind_answer.turn_by_turn and "<|end|>" in behind_answer.template
    assert (by_what["a result behind a call"] is None) is (name != "falcon")


@pytest.mark.parametrize(
    ("written", "adds", "says"),
    [
        ("", False, "writes no '<s>'"),
        ("", True, "writes no '<s>'; the tokenizer would, and is not let"),
        ("<s>", True, "writes '<s>', once; the tokenizer would add another, and is not let"),
        ("<s><s>", False, "writes '<s>' TWICE"),
    ],
)
def test_a_text_begins_once(written, adds, says):
    tokenizer = build(FAMILIES["llama2"])
    tokenizer.chat_template = written + FAMILIES["phi-3"].template.replace("<|end|>", "</s>")
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    renderer = ChatRenderer(tokenizer)
    assert says in dict(check_template(renderer).facts)["beginning of text"]
    begins = renderer.start([{"role": "user", "content": "q"}])
    assert begins.count(tokenizer.bos_token_id) == written.count("<s>")


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
