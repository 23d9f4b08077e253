"""How the models write calls that SGLang's parsers read: by the parser's name, what begins a call and how one looks.

SGLang's parsers tell nobody what they lost. What begins a call tells that one was meant, and the example what the model
is told to write. A parser that is not here is served too, with the marks that it names itself.
"""

# ruff: noqa: RUF001 - the bars of DeepSeek's tokens are what they are
from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFormat:
    """One way to write a call."""

    begins: tuple[str, ...]
    """What begins a call: each of these, once a call, or once for several in one frame."""
    example: str
    """A call of the tool NAME with KEY set to VALUE."""
    frames: tuple[str, ...] = ()
    """Other marks that stand nowhere but around calls."""
    ends: tuple[str, ...] = ()
    """What ends a call, any of these, where the parser takes a call that was cut off for a whole one."""
    argument: str = ""
    """What begins each argument, where arguments have marks: an argument can be lost alone."""
    head: str = ""
    """What the prompt ends with that belongs to the format: the parser is given it before the sampled text."""
    tail: str = ""
    """The token that ends a call and the turn with it: the parser is given it again."""
    spellings: tuple[tuple[str, str], ...] = ()
    """Regular expressions of other ways in which models write marks, and what the parser knows in place of them."""
    names: str = ""
    """A regular expression of a call's name, where the parser loses calls of tools that it was not given."""
    scanned: tuple[str, ...] = ()
    """Other texts each of which makes the parser look at all that follows."""


_QWEN = CallFormat(
    begins=("<tool_call>",),
    example='<tool_call>\n{"name": "NAME", "arguments": {"KEY": "VALUE"}}\n</tool_call>',
)
_FUNCTION_TAGS = CallFormat(
    begins=("<tool_call>",),
    frames=("<function=", "</tool_call>"),
    ends=("</function>", "</tool_call>"),
    argument="<parameter=",
    example="<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>",
)
_KEYS = "<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n"
_GLM45 = CallFormat(
    begins=("<tool_call>",),
    frames=("</tool_call>",),
    argument="<arg_key>",
    example=f"<tool_call>NAME\n{_KEYS}</tool_call>",
)
_DEEPSEEK_FRAMES = ("<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>")


def _dsml(block: str, invoke: str, parameter: str) -> CallFormat:
    bar = "｜DSML｜"
    return CallFormat(
        begins=(f"<{bar}{invoke}",),
        frames=(f"<{bar}{block}>", f"</{bar}{block}>"),
        argument=f"<{bar}{parameter}",
        example=(
            f'<{bar}{block}>\n<{bar}{invoke} name="NAME">\n<{bar}{parameter} name="KEY" string="true">VALUE'
            f"</{bar}{parameter}>\n</{bar}{invoke}>\n</{bar}{block}>"
        ),
    )


FORMATS: dict[str, CallFormat] = {
    "apertus2509": CallFormat(
        begins=("<|tools_prefix|>",), example='<|tools_prefix|>[{"NAME": {"KEY": "VALUE"}}]<|tools_suffix|>'
    ),
    "beam": CallFormat(
        begins=("<|constrain|>xml",),
        argument="<rfl:parameter",
        head="<|start|>assistant",
        example=(
            " to=NAME<|channel|>analysis <|constrain|>xml<|message|>"
            '<rfl:parameter name="KEY">\nVALUE\n</rfl:parameter><|call|>'
        ),
        tail="<|call|>",
    ),
    "cohere_command4": CallFormat(
        begins=("<|START_ACTION|>",),
        ends=("<|END_ACTION|>",),
        example=(
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "NAME", "parameters": {"KEY": "VALUE"}}]'
            "<|END_ACTION|>"
        ),
    ),
    "deepseekv3": CallFormat(
        begins=("<｜tool▁call▁begin｜>",),
        frames=_DEEPSEEK_FRAMES,
        example=(
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{"KEY": "VALUE"}\n```'
            "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        ),
    ),
    "deepseekv31": CallFormat(
        begins=("<｜tool▁call▁begin｜>",),
        frames=_DEEPSEEK_FRAMES,
        example=(
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{"KEY": "VALUE"}<｜tool▁call▁end｜>'
            "<｜tool▁calls▁end｜>"
        ),
    ),
    "deepseekv32": _dsml("function_calls", "invoke", "parameter"),
    "deepseekv4": _dsml("tool_calls", "invoke", "parameter"),
    "deepseekv41": _dsml(" calls", " invoke", " parameter"),
    "dots": CallFormat(
        begins=("<dots_function_call>",),
        frames=("</dots_function_call>",),
        argument="<parameter name=",
        example=(
            '<dots_function_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n'
            "</dots_function_call>"
        ),
    ),
    "glm": _GLM45,
    "glm45": _GLM45,
    "glm47": CallFormat(
        begins=("<tool_call>",),
        frames=("</tool_call>",),
        argument="<arg_key>",
        example="<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>",
    ),
    "gpt-oss": CallFormat(
        begins=("<|channel|>commentary to=",),
        frames=("to=functions.",),
        head="<|start|>assistant",
        tail="<|call|>",
        scanned=("<|",),
        spellings=(
            # As its own template writes calls of earlier turns, and without the word that says that JSON follows.
            (
                r"(?:<\|start\|>assistant)? to=(functions\.[\w.-]+)<\|channel\|>commentary\b[^<]{0,9}"
                r"(?:<\|constrain\|>json)?<\|message\|>",
                r"<|start|>assistant<|channel|>commentary to=\1<|constrain|>json<|message|>",
            ),
            (
                r"<\|channel\|>commentary to=(functions\.[\w.-]+)[^<]{0,9}<\|message\|>",
                r"<|channel|>commentary to=\1<|constrain|>json<|message|>",
            ),
        ),
        example='<|channel|>commentary to=functions.NAME<|constrain|>json<|message|>{"KEY": "VALUE"}<|call|>',
    ),
    "k2_horizon": CallFormat(
        begins=("<ifm|tool_call>",),
        frames=("<ifm|tool_calls>",),
        argument="<ifm|arg_key>",
        example=(
            "<ifm|tool_calls><ifm|tool_call>NAME\n<ifm|arg_key>KEY</ifm|arg_key>\n"
            "<ifm|arg_value>VALUE</ifm|arg_value>\n</ifm|tool_call></ifm|tool_calls>"
        ),
    ),
    "kimi_k2": CallFormat(
        begins=("<|tool_call_begin|>",),
        frames=(
            "<|tool_calls_section_begin|>",
            "<|tool_call_section_begin|>",
            "<|tool_call_argument_begin|>",
        ),
        example=(
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>"
            '{"KEY": "VALUE"}<|tool_call_end|><|tool_calls_section_end|>'
        ),
    ),
    "kimi_k3": CallFormat(
        begins=("<|open|>call",),
        frames=("<|open|>tools<|sep|>",),
        argument="<|open|>argument",
        example=(
            '<|open|>tools<|sep|><|open|>call tool="NAME" index="1"<|sep|><|open|>argument key="KEY" type="string"'
            "<|sep|>VALUE<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>"
        ),
    ),
    "lfm2": CallFormat(
        begins=("<|tool_call_start|>",),
        frames=("<|tool_call_end|>",),
        example='<|tool_call_start|>[NAME(KEY="VALUE")]<|tool_call_end|>',
    ),
    "ling3": _GLM45,
    "llama3": CallFormat(
        begins=('"parameters"', '"arguments"'),
        frames=("<|python_tag|>",),
        scanned=('{"',),
        example='{"name": "NAME", "parameters": {"KEY": "VALUE"}}',
    ),
    "mimo": CallFormat(
        begins=("<tool_call>",),
        frames=("<function=", "</tool_call>"),
        argument="<parameter=",
        example="<tool_call>\n<function=NAME>\n<parameter=KEY>VALUE</parameter>\n</function>\n</tool_call>",
    ),
    "minicpm5": CallFormat(
        begins=("<function name=",),
        frames=("</function>",),
        argument="<param name=",
        names=r'<function name="([^"]+)"',
        example='<function name="NAME"><param name="KEY">VALUE</param></function>',
    ),
    "mistral": CallFormat(
        begins=("[TOOL_CALLS]",),
        frames=("[ARGS]",),
        spellings=((r"\[TOOL_CALLS\]\[", "[TOOL_CALLS] ["),),
        example='[TOOL_CALLS] [{"name": "NAME", "arguments": {"KEY": "VALUE"}}]',
    ),
    "muse": CallFormat(
        begins=("<atem:invoke",),
        frames=("<atem:function_calls>",),
        argument="<atem:parameter",
        example=(
            'to=NAME<|message|><atem:function_calls>\n<atem:invoke name="NAME">\n<atem:parameter name="KEY">VALUE'
            "</atem:parameter>\n</atem:invoke>\n</atem:function_calls>"
        ),
    ),
    "poolside_v1": replace(_GLM45, names=r"<tool_call>\s*([^\s<]+)"),
    "qwen": _QWEN,
    "qwen25": _QWEN,
    "qwen3_coder": _FUNCTION_TAGS,
    "spark25": replace(
        _GLM45, example="<tool_call>NAME\n<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>\n</tool_call>"
    ),
    "step3": CallFormat(
        begins=("<｜tool_call_begin｜>",),
        frames=("<｜tool_calls_begin｜>", "<steptml:invoke"),
        argument="<steptml:parameter",
        example=(
            '<｜tool_calls_begin｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="NAME">\n'
            '<steptml:parameter name="KEY">VALUE</steptml:parameter>\n</steptml:invoke><｜tool_call_end｜>\n'
            "<｜tool_calls_end｜>"
        ),
    ),
    "step3p5": _FUNCTION_TAGS,
    "minimax-m2": CallFormat(
        begins=("<invoke name=",),
        frames=("<minimax:tool_call>", "</minimax:tool_call>"),
        argument="<parameter name=",
        example=(
            '<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n'
            "</minimax:tool_call>"
        ),
    ),
    "minimax-m3": CallFormat(
        begins=("<invoke name=",),
        frames=("]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>"),
        example=(
            ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="NAME">]<]minimax[>[<KEY>VALUE]<]minimax[>[</KEY>'
            "]<]minimax[>[</invoke>]<]minimax[>[</tool_call>"
        ),
    ),
    "nanbeige": _FUNCTION_TAGS,
    "trinity": _QWEN,
    "interns1": CallFormat(
        begins=("<|action_start|>",),
        frames=("<|plugin|>",),
        names=r'"name"\s*:\s*"([^"\\]+)"',
        example='<|action_start|> <|plugin|>\n{"name": "NAME", "parameters": {"KEY": "VALUE"}}<|action_end|>',
    ),
    "hermes": CallFormat(
        begins=("<tool_call>",),
        example='<tool_call>{"name": "NAME", "arguments": {"KEY": "VALUE"}}</tool_call>',
    ),
    "hunyuan": CallFormat(
        begins=("<tool_call>",),
        frames=("<tool_calls>", "<tool_sep>"),
        argument="<arg_key>",
        example=f"<tool_calls>\n<tool_call>NAME<tool_sep>\n{_KEYS}</tool_call>\n</tool_calls>",
    ),
    "gigachat3": CallFormat(
        begins=("<|function_call|>", "function call<|role_sep|>"),
        example='<|function_call|>{"name": "NAME", "arguments": {"KEY": "VALUE"}}',
    ),
    "gigachat35": CallFormat(
        begins=("<｜GCML｜invoke",),
        frames=("<｜GCML｜tool_calls>",),
        argument="<｜GCML｜parameter",
        example=(
            '<｜GCML｜tool_calls>\n<｜GCML｜invoke name="NAME">\n<｜GCML｜parameter name="KEY" string="true">VALUE'
            "</｜GCML｜parameter>\n</｜GCML｜invoke>\n</｜GCML｜tool_calls>"
        ),
    ),
    "gemma4": CallFormat(
        begins=("<|tool_call>",),
        frames=("<tool_call|>",),
        example='<|tool_call>call:NAME{KEY:<|"|>VALUE<|"|>}<tool_call|>',
    ),
    "inkling": CallFormat(
        begins=("<|content_invoke_tool_json|>", "<|content_invoke_tool_text|>"),
        example=(
            '<|message_model|>NAME<|content_invoke_tool_json|>{"name": "NAME", "args": {"KEY": "VALUE"}}<|end_message|>'
        ),
    ),
    "iquest_q1": CallFormat(
        begins=("<iquest_tool_call>",),
        frames=("</iquest_tool_call>",),
        argument="<arg_key>",
        example=f"<iquest_tool_call>NAME\n{_KEYS}</iquest_tool_call>",
    ),
}
