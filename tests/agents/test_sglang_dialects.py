"""SGLang's parsers as dialects: all of them, what they lose, and where they and ours disagree."""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.parser.reasoning_parser import ReasoningParser

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import HermesDialect, SGLangDialect, make_dialect
from polyturn.agents.dialects.families import MODEL_TYPES, TEMPLATES, dialect_of_model
from polyturn.agents.dialects.sglang_formats import FORMATS
from polyturn.agents.dialects.sglang_parsers import MAX_MARKS
from polyturn.configs.dialects import NOT_SERVED, check_dialect, sglang_names
from polyturn.tools.types import ToolSpec
from tests.support.chat_families import FAMILIES
from tests.support.published_outputs import OUTPUTS

SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string"}, "k": {"type": "integer"}},
    "required": ["query"],
}
TOOLS = tuple(ToolSpec(name=name, description="d", parameters=SCHEMA) for name in ("search", "get_page"))
PARSERS = [name for name in sglang_names("function_call") if name not in NOT_SERVED]
REASONING = {"beam": "beam", "gpt-oss": "gpt-oss", "kimi_k3": "kimi_k3", "muse": "muse"}
"""Families whose calls stand in channels, which their reasoning parsers take apart."""
ONE_FRAME = {"cohere_command4", "gigachat3", "gigachat35", "k2_horizon", "kimi_k3", "mistral", "step3"}
"""Of those SGLang reads the calls of the first frame only: further calls belong into it."""
X = ("search", {"query": "x"})
dialects = {}


def dialect_of(parser):
    name, _, reasoning = parser.partition("/")
    if parser not in dialects:
        dialects[parser] = SGLangDialect(name, reasoning or REASONING.get(name))
    return dialects[parser]


def read(parser, text, **how):
    """Content, reasoning, and for each call its name and arguments, or its error."""
    message = dialect_of(parser).parse(text, tools=TOOLS, **how)
    assert message.raw_text == text
    return (
        message.content,
        message.reasoning,
        [c.error or (c.name, dict(c.arguments)) for c in message.tool_calls],
    )


def example(parser, name="search", value="x"):
    written = FORMATS[parser].example
    return written.replace("NAME", name).replace("KEY", "query").replace("VALUE", value)


def test_the_names_are_those_of_the_installed_package():
    assert set(sglang_names("function_call")) == set(FunctionCallParser.ToolCallParserEnum)
    assert set(sglang_names("reasoning")) == set(ReasoningParser.DetectorMap)
    assert set(FORMATS) == set(PARSERS)
    for dialect in (*(dialect for _, dialect in TEMPLATES), *MODEL_TYPES.values()):
        check_dialect(dialect)


@pytest.mark.parametrize("parser", PARSERS)
def test_every_parser_serves(parser):
    assert read(parser, example(parser))[2] == [X]
    # A tool that was not offered is called all the same: the environment says that there is none.
    assert read(parser, example(parser, "no_such_tool"))[2] == [("no_such_tool", {"query": "x"})]
    assert dialect_of(parser).parse(example(parser)).tool_calls[0].name == "search"
    content, _, calls = read(parser, "Ashford is it.")
    assert (content, calls) == ("Ashford is it.", []) or parser == "kimi_k3"
    *read_calls, last = read(parser, f"{example(parser)}\n{example(parser, 'get_page')}")[2]
    if parser not in ONE_FRAME:
        assert (read_calls, last) == ([X], ("get_page", {"query": "x"}))
    else:
        assert "calls were begun" in last or "no whole call" in last


@pytest.mark.parametrize("parser", [name for name in PARSERS if name not in ("beam", "llama3")])
def test_a_call_that_was_cut_off_is_told_of(parser):
    whole = example(parser)
    (told,) = read(parser, whole[: len(whole) * 4 // 5])[2]
    assert "could not be read" in str(told) and FORMATS[parser].example in told, told


def test_what_a_parser_would_lose_without_a_word_is_told():
    """Each of these gives no call, or another one than was written, and no error, where SGLang alone reads it."""
    qwen = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call>'
    broken = qwen.replace('"x"', '"say "x""')
    assert read("qwen25", qwen)[2] == [X]
    assert read("qwen25", qwen.replace("}\n</tool_call>", "}"))[2][0].startswith(
        "The tool call could not be read"
    )
    first, second = read("qwen25", qwen + "\n" + broken)[2]
    assert first == X and "2 calls were begun, and 1 could be read" in second
    (told,) = read("hermes", qwen + broken)[2]
    assert "is no whole call" in told
    (told,) = read("glm47", "<tool_call>search<arg_key>query</arg_key>how many days</arg_value></tool_call>")[
        2
    ]
    assert "an argument could not be read" in told
    (told,) = read("step3", example("step3", value="a < b"))[2]
    assert "an argument could not be read" in told
    (told,) = read("kimi_k2", example("kimi_k2").replace('"x"', "x"))[2]
    assert "its arguments are not valid JSON" in told


def test_marks_within_arguments_are_no_calls():
    text = "say <tool_call> {x} [TOOL_CALLS]"
    for parser in ("qwen25", "hermes", "qwen3_coder", "glm45", "kimi_k2", "mistral", "deepseekv31"):
        assert read(parser, example(parser, value=text))[2] == [("search", {"query": text})]


def test_types_come_from_the_tools():
    text = example("qwen3_coder").replace("<parameter=query>\nx", "<parameter=k>\n3")
    assert read("qwen3_coder", text)[2] == [("search", {"k": 3})]
    assert dialect_of("qwen3_coder").parse(text).tool_calls[0].arguments == {"k": "3"}


def test_thoughts_stand_apart():
    call = example("qwen3_coder")
    assert read("qwen3_coder", f"<think>perhaps {call}</think>So.\n{call}") == ("So.", f"perhaps {call}", [X])
    assert read("qwen3_coder", f"perhaps {call}</think>{call}", in_thought=True)[1:] == (
        f"perhaps {call}",
        [X],
    )
    assert read("qwen3_coder/qwen3", f"<think>perhaps {call}</think>{call}")[1:] == (f"perhaps {call}", [X])
    # Its own default takes a text without marks for a thought; whether the prompt opened one is known here.
    assert read("qwen3_coder/deepseek-r1", "Ashford.") == ("Ashford.", None, [])
    assert read("qwen3_coder/deepseek-r1", "hm</think>Ashford.", in_thought=True) == ("Ashford.", "hm", [])
    harmony = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    assert read("gpt-oss", f"{harmony}<|channel|>final<|message|>Ashford.") == ("Ashford.", "hm", [])
    assert read("gpt-oss", harmony + example("gpt-oss").removesuffix("<|call|>"))[1:] == ("hm", [X])


@pytest.mark.parametrize("parser", PARSERS)
def test_whatever_a_parser_does_there_is_a_message(parser):
    whole = example(parser)
    for text in (
        "",
        "\ud800",
        "\x00",
        whole[::-1],
        whole.replace("search", ""),
        whole.replace("{", "[" * 3000),
    ):
        read(parser, text)
    many = read(parser, (FORMATS[parser].begins[0] + "x") * (MAX_MARKS + 1))[2]
    assert "too many marks of calls" in many[0]


PIECES = {
    parser: [piece for piece in re.split(r"(<[^<>]*>|\[[A-Z_]+\]|[{}\[\]\",:()])", example(parser)) if piece]
    for parser in PARSERS
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(PARSERS), st.booleans())
def test_any_text_of_a_formats_pieces_has_a_message_that_can_be_written_down(data, parser, in_thought):
    pieces = st.sampled_from(PIECES[parser]) | st.sampled_from(
        ["<think>", "</think>", "\ud800", "\\", "0" * 5000]
    )
    text = data.draw(st.lists(pieces | st.text(max_size=4), max_size=20).map("".join))
    message = dialect_of(parser).parse(text, in_thought=in_thought, tools=TOOLS)
    assert message.raw_text == text
    for call in message.tool_calls:
        assert (call.error is None) or call.arguments == {}
    json.dumps(message.to_message(), ensure_ascii=False, allow_nan=False).encode()


def test_what_a_parser_raises_is_told_and_the_environment_is_as_before():
    deep = '{"name": "search", "parameters": {"query": ' + "[" * 5000
    (told,) = read("llama3", deep)[2]
    assert "its parser failed with" in told or "is no whole call" in told
    assert "SGLANG_FORWARD_UNKNOWN_TOOLS" not in os.environ


def test_names_are_checked_without_sglang_and_its_absence_is_one_sentence(tmp_path):
    with pytest.raises(
        ValueError, match="no tool-call parser 'qwen3_codr', did you mean 'sglang:qwen3_coder'"
    ):
        check_dialect("sglang:qwen3_codr")
    with pytest.raises(ValueError, match="did you mean 'sglang:kimi_k2'"):
        check_dialect("kimi_k2")
    with pytest.raises(ValueError, match="did you mean 'sglang:kimi_k2/kimi_k3'"):
        check_dialect("sglang:kimi_k2/kimi_k33")
    with pytest.raises(
        ValueError, match=r"exponential in the arguments of a call; use model\.dialect: pythonic"
    ):
        check_dialect("sglang:pythonic")
    code = (
        "import sys; from importlib.machinery import PathFinder;"
        "find = PathFinder.find_spec;"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'sglang' else find(name, *rest);"
        "from polyturn.agents.dialects import make_dialect;"
        "make_dialect('hermes');"
        "print('torch' in sys.modules);"
        "make_dialect('sglang:kimi_k2')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("ValueError: model.dialect: sglang:... needs SGLang, which is not installed")
    )


def test_auto_reads_what_a_familys_own_template_writes(tmp_path):
    told = {}
    for name, family in FAMILIES.items():
        (tmp_path / "chat_template.jinja").write_text(family.tokenizer.chat_template)
        try:
            told[name] = dialect_of_model(tmp_path)
        except ValueError as error:
            assert "tells how the model writes calls; name a dialect" in str(error)
            continue
        renderer = ChatRenderer(family.tokenizer)
        assert not renderer.form.calls_as_text, name
        # As tokens that a policy would sample, the one that ends its turn included.
        sampled = family.tokenizer.encode(renderer.written_call(), add_special_tokens=False)
        text = renderer.decode([*sampled, renderer.stop_token_ids[0]])
        message = make_dialect("auto", directory=tmp_path).parse(text, tools=TOOLS)
        assert [(call.name, *call.arguments) for call in message.tool_calls] == [("search", "query")], name
    assert told == {
        **dict.fromkeys(("qwen2.5", "qwen3", "qwen3-thinking"), "hermes"),
        "llama3.1": "json",
        "glm-4.5": "sglang:glm45",
        "deepseek-v3": "sglang:deepseekv3",
        "deepseek-r1": "sglang:deepseekv3",
        "kimi-k2": "sglang:kimi_k2",
        "mistral": "sglang:mistral",
        "gemma-4": "sglang:gemma4",
        "gpt-oss": "sglang:gpt-oss/gpt-oss",
        "cohere": "sglang:cohere_command4",
        "hermes-2-pro": "hermes",
        "mistral-nemo": "sglang:mistral",
        "llama3.2": "json",
        "minimax-m2": "sglang:minimax-m2",
        "qwen3-coder": "sglang:qwen3_coder",
        "gemma-4-thoughts": "sglang:gemma4",
        "deepseek-v3.1": "sglang:deepseekv3",
        "llama4": "json",
        "granite-4": "hermes",
        "command-r7b": "sglang:cohere_command4",
    }


def test_auto_looks_into_all_templates_and_then_into_the_config(tmp_path):
    with pytest.raises(ValueError, match="tells how the model writes calls; name a dialect"):
        make_dialect("auto", directory=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "kimi_k3"}')
    assert dialect_of_model(tmp_path) == "sglang:kimi_k3/kimi_k3"
    templates = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "<tool_call>"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert dialect_of_model(tmp_path) == "hermes"
    (tmp_path / "own.jinja").write_text("{{ '<function=f><parameter=p>' }}")
    assert dialect_of_model(tmp_path, tmp_path / "own.jinja") == "sglang:qwen3_coder"


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.source.replace("/", "-"))
def test_what_models_were_seen_to_write(output):
    for name, expected in output.read_as.items():
        if name.startswith("sglang:"):
            content, _, calls = read(name.removeprefix("sglang:"), output.text)
        else:
            message = make_dialect(name).parse(output.text, tools=TOOLS)
            content = message.content
            calls = [call.error or (call.name, dict(call.arguments)) for call in message.tool_calls]
        if expected == "content":
            assert (content, calls) == (output.text.strip(), []), name
        elif expected == "told":
            assert len(calls) == 1 and "The tool call could not be read" in calls[0], (name, calls)
        else:
            assert calls == expected, name


def theirs(parser, text):
    """The calls that SGLang's parser finds by itself."""
    _, items = dialect_of(parser).bare_parser(TOOLS)(text)
    return [(item.name, json.loads(item.parameters)) for item in items]


THOUGHTS = ("<think>", "</think>")


def kind_of_disagreement(parser, text):
    """What kind of disagreement there is between our Hermes dialect and one of SGLang's; None: there is none."""
    message = HermesDialect().parse(text)
    ours = [(call.name, dict(call.arguments)) for call in message.tool_calls if call.error is None]
    told = any(call.error is not None for call in message.tool_calls)
    found = theirs(parser, text)
    if any(mark in text for mark in THOUGHTS):
        return "thoughts call nothing in ours"
    if ours == found:
        return "told in ours, lost in theirs" if told else None
    strict = HermesDialect(recovers=False).parse(text).tool_calls
    read = [(call.name, dict(call.arguments)) for call in strict if call.error is None]
    if read == found:
        return "what is plain is read in ours"
    if parser == "qwen25" and text.count("<tool_call>\n") + text.count("\n</tool_call>") != text.count(
        "tool_call>"
    ):
        return "theirs wants a line feed at every mark"
    if not found and len(strict) > len(read):
        return "one broken call loses all in theirs"
    if any('"arguments"' not in part or '"arguments": [' in part for part in text.split("<tool_call>")[1:]):
        return "theirs takes calls without an object of arguments"
    return f"unknown: {ours} {found}"


names = st.sampled_from(["search", "get_page", "no_such_tool"])
texts = st.text(alphabet="ab \n\"\\'{}[]é", max_size=6)
simple_arguments = st.dictionaries(
    st.sampled_from(["query", "k"]), texts | st.integers() | st.booleans(), max_size=2
)
calls = st.builds(lambda name, args: json.dumps({"name": name, "arguments": args}), names, simple_arguments)
prose = st.text(alphabet="ab .,{}\"'", max_size=8)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(prose, calls), max_size=4), prose, st.sampled_from(["qwen25", "hermes"]))
def test_both_read_every_well_formed_call(parts, last, parser):
    text = "".join(f"{before}\n<tool_call>\n{call}\n</tool_call>\n" for before, call in parts) + last
    assert kind_of_disagreement(parser, text) is None
    assert len(theirs(parser, text)) == len(parts)


broken = st.sampled_from(
    [
        *(
            '{"name": "search"}',
            '{"name": "search", "arguments": ["x"]}',
            '{"name": "search", "arguments": {}',
            "{",
            "",
        ),
        *(
            "{'name': 'search', 'arguments': {}}",
            '{"name": "search", "arguments": {},}',
            '[{"name": "s", "arguments": {}}]',
        ),
        *(
            '{"name": "search", "parameters": {"query": "x"}}',
            '{"name": "search", "arguments": {"q": "say "hi""}}',
        ),
    ]
)
pieces = st.one_of(
    *(
        st.just(mark)
        for mark in ("<tool_call>\n", "\n</tool_call>", "<tool_call>", "</tool_call>", *THOUGHTS)
    ),
    prose,
    calls.map(lambda call: f"<tool_call>\n{call}\n</tool_call>"),
    broken.map(lambda call: f"<tool_call>\n{call}\n</tool_call>"),
)
KINDS = {
    None,
    "thoughts call nothing in ours",
    "told in ours, lost in theirs",
    "theirs wants a line feed at every mark",
    "one broken call loses all in theirs",
    "theirs takes calls without an object of arguments",
    "what is plain is read in ours",
}


def test_every_disagreement_is_of_a_known_kind():
    seen = set()

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.lists(pieces, max_size=5).map("".join), st.sampled_from(["qwen25", "hermes"]))
    def look(text, parser):
        kind = kind_of_disagreement(parser, text)
        assert kind in KINDS, (text, kind)
        seen.add(kind)

    look()
    assert seen == KINDS
