"""An OpenAI-compatible endpoint with fixed answers: so many calls of `lookup`, then an answer.

    python endpoint.py LATENCY_S

Prints its URL, serves until it is killed. It knows by the request alone how far a conversation has come.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

NUM_CALLS = 3
ANSWER = "The register says done."
USAGE = {"prompt_tokens": 120, "completion_tokens": 12, "total_tokens": 132}


def answer_to(messages: list[dict[str, object]]) -> dict[str, object]:
    """The next message of a conversation."""
    number = sum(message["role"] == "tool" for message in messages)
    if number >= NUM_CALLS:
        return {"role": "assistant", "content": ANSWER}
    function = {"name": "lookup", "arguments": json.dumps({"key": f"key-{number}"})}
    call = {"id": f"call_{number}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


async def serve(latency_s: float) -> None:
    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        await asyncio.sleep(latency_s)
        message = answer_to(body["messages"])
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
        }
        return web.json_response(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": body["model"],
                "choices": [choice],
                "usage": USAGE,
            }
        )

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    port = runner.addresses[0][1]
    print(f"http://127.0.0.1:{port}/v1", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
