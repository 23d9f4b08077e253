"""A multi-turn `custom_generate` as people write it for slime, with the edit that Polyturn needs.

    async def custom_generate(args, samples, evaluation=False):          async def custom_generate(episode):
        for sample in samples:                                                (one sample: the scheduler has them all)
            conversation = sample.prompt                                      conversation = list(episode.messages)
            for turn in range(args.max_turns):                                for turn in range(max_turns):
                response = await generate_single(conversation)                    response = await episode.reply(...)
                tool_call = extract_tool_call(response)                           tool_call = extract_tool_call(...)
                if tool_call:                                                     if tool_call:
                    result = execute_tool(tool_call)                                  result = execute_tool(tool_call)
                    conversation.append(...)                                          conversation.append(...)
                else:                                                             else:
                    break                                                             break
            sample.response = response                                        return response

Tokens, logprobs and the mask of what was sampled are recorded by Polyturn: nothing of that is filled in here.
"""

import ast
import operator
import re

from polyturn.agents.agent_play import AgentEpisode

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


async def custom_generate(episode: AgentEpisode, max_turns: int = 5) -> str:
    """Answer a question with a calculator: `<calc>2 * 3</calc>`."""
    conversation = list(episode.messages)
    response = ""
    for _ in range(max_turns):
        response = (await episode.reply(conversation, tools=())).content
        tool_call = extract_tool_call(response)
        if tool_call is None:
            break
        conversation.append({"role": "assistant", "content": response})
        conversation.append({"role": "user", "content": f"Result: {execute_tool(tool_call)}"})
    return response


def extract_tool_call(response: str) -> str | None:
    """What stands in the first `<calc>` of a response; None without one."""
    found = re.search(r"<calc>(.*?)</calc>", response, re.DOTALL)
    return found[1] if found else None


def execute_tool(expression: str) -> str:
    """The value of sums and products of small numbers."""
    try:
        return str(_value(ast.parse(expression.strip()[:200], mode="eval").body))
    except (SyntaxError, ValueError, KeyError, RecursionError) as error:
        return f"cannot be calculated: {error}"


def _value(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)) if abs(number) < 10**9:
            return number
        case ast.BinOp(left=left, op=op, right=right):
            value = _OPERATORS[type(op)](_value(left), _value(right))
            if abs(value) < 10**18:
                return int(value)
    raise ValueError(ast.unparse(node))
