"""What is to be known about a model's chat template before a run starts."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.dialects import HermesDialect, make_dialect
from polyturn.agents.history import shape_of
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import AssistantMessage, Message
from polyturn.envs.registry import make
from polyturn.rollout.setup import renderer_of
from polyturn.tools.types import ToolCall, ToolSpec

_QUESTION: Message = {"role": "user", "content": "q"}
_CALL = AssistantMessage(
    content="c", reasoning="r", tool_calls=(ToolCall(id="call_0", name="search", arguments={"query": "x"}),)
)
_RESULT: Message = {"role": "tool", "tool_call_id": "call_0", "name": "search", "content": "x"}


def check_chat_template(config: RunConfig, directory: Path) -> list[str]:
    """Try the model's chat template as the run will use it.

    Returns:
        Sentences about what it does that one may not expect.

    Raises:
        ValueError: the run cannot use it.
    """
    dialect = make_dialect(config.model.dialect)
    renderer = renderer_of(config.model, directory, dialect)
    notes: list[str] = []
    if isinstance(dialect, HermesDialect):
        with closing(make(config.environment.id, **config.environment.options)) as env:
            specs = env.toolset.specs
        notes += _tool_notes(renderer, specs) if specs else ()
        if config.model.history == "template":
            notes += _history_notes(renderer, with_tools=bool(specs))
    return notes


def _tool_notes(renderer: ChatRenderer, specs: tuple[ToolSpec, ...]) -> list[str]:
    notes = []
    if renderer.form.results_as_text:
        notes.append(
            "the chat template has no tools: specs and results are written as text (model.tool_prompt)"
        )
    elif not renderer.shows_tools(specs):
        notes.append(
            "the chat template does not show tools to the model: the task's own messages must describe them, or set "
            "model.tool_prompt: text"
        )
    if not renderer.form.calls_as_text and (written := renderer.written_call()) is not None:
        read = HermesDialect().parse(written)
        if not any(call.error is None for call in read.tool_calls):
            notes.append(
                f"the chat template writes tool calls as {written.strip()!r}, which model.dialect: hermes does not "
                "read; set model.tool_prompt: text to have the model told how to call"
            )
    return notes


def _history_notes(renderer: ChatRenderer, *, with_tools: bool) -> list[str]:
    call = _CALL.to_message()
    behind = {
        "a tool's result": shape_of([_QUESTION, call, _RESULT], with_tools=with_tools),
        "a user's message": shape_of(
            [_QUESTION, {"role": "assistant", "content": "c", "reasoning": "r"}, _QUESTION],
            with_tools=with_tools,
        ),
    }
    changed = [what for what, shape in behind.items() if not renderer.continues_shape(shape)]
    if not changed:
        return []
    return [
        f"the chat template rewrites earlier turns behind {' and '.join(changed)}, by dropping thoughts or moving "
        "tools: episodes go on in a new segment there; model.history: sampled keeps turns as they were sampled"
    ]
