"""Beside a program that may reach nothing but one socket: hands connections on to it, and ends the program with all
that it started.

    python3 attend.py --socket PATH --port PORT                       hands on for ever: beside a container
    python3 attend.py [--socket PATH --port PORT] --control FD -- PROGRAM [ARGUMENT ...]

Clients connect to 127.0.0.1:PORT; PATH is a Unix socket. `t` on the control descriptor has the program asked to end by
SIGTERM; its end, or that of the owner, ends everything at once. Runs by its path, without this package, on any Python
from 3.9 on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_CHILD_SUBREAPER = 36
_PIECE = 1 << 16
_LOOK_S = 1.0
_BACKLOG = 512
_NOT_STARTED = 127


async def _hand_on(reader, writer, path):  # type: ignore[no-untyped-def]
    try:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
    except OSError:
        writer.close()
        return
    both = (_pump(reader, inner_writer), _pump(inner_reader, writer))
    try:
        await asyncio.gather(*both)
    finally:
        inner_writer.close()
        writer.close()


async def _pump(reader, writer):  # type: ignore[no-untyped-def]
    with contextlib.suppress(OSError):
        while True:
            data = await reader.read(_PIECE)
            if not data:
                break
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        if writer.can_write_eof():
            writer.write_eof()


async def _attend(options) -> int:  # type: ignore[no-untyped-def]
    if options.socket:

        async def connected(reader, writer):  # type: ignore[no-untyped-def]
            await _hand_on(reader, writer, options.socket)

        await asyncio.start_server(connected, "127.0.0.1", options.port, backlog=_BACKLOG)
    if not options.program:
        print("ready", flush=True)
        await asyncio.Event().wait()
    try:
        program = await asyncio.create_subprocess_exec(*options.program, start_new_session=True)
    except OSError as error:
        print(f"{options.program[0]} cannot be started: {error.strerror}", file=sys.stderr, flush=True)
        return _NOT_STARTED
    is_over = asyncio.Event()

    def told() -> None:
        said = os.read(options.control, 1)
        if said == b"t":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGTERM)
        if not said:
            asyncio.get_running_loop().remove_reader(options.control)
            is_over.set()

    asyncio.get_running_loop().add_reader(options.control, told)
    owner = os.getppid()
    ended, over = asyncio.ensure_future(program.wait()), asyncio.ensure_future(is_over.wait())
    # A process that the owner forked may hold its end of the control open.
    while not ended.done() and not over.done() and os.getppid() == owner:
        await asyncio.wait([ended, over], timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    status = await program.wait()
    return status if status >= 0 else 128 - status


def _end_all() -> None:
    """Kills whatever is left below this process, which adopts what its parents have left."""
    while True:
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    own, found = str(os.getpid()), []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                if file.read().rpartition(")")[2].split()[1] == own:
                    found.append(int(name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--port", type=int)
    parser.add_argument("--control", type=int)
    parser.add_argument("program", nargs="*")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    status = asyncio.run(_attend(options))
    _end_all()
    os._exit(status)


if __name__ == "__main__":
    main()
