"""Ask a machine with one GPU what no other can answer: one JSON line for each part, in eight minutes at most.

Each part is a process of its own with a time limit. One whose packages are missing is skipped and says which. The exit
code is 1 where a part failed, and 0 where all passed or were skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.parts import PARTS, TOTAL_S, Device, Failure, Part, Skip

INSIDE = "--inside"


def parse_arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{part.name:<20} {part.asks} ({part.limit_s} s at most)" for part in PARTS),
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="these parts")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the same at tiny sizes, without a GPU"
    )
    parser.add_argument(INSIDE, choices=names, help=argparse.SUPPRESS)
    return parser.parse_args()


def answer(part: Part, device: Device) -> dict[str, Any]:
    """What a part says, in this process."""
    try:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise Skip("torch finds no GPU; --device cpu runs the same at tiny sizes")
        torch.set_num_threads(1 if device == "cpu" else torch.get_num_threads())
        where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        return {"state": "passed", "device": where, **part.run(device)}
    except Skip as skip:
        return {"state": "skipped", "reason": str(skip), **skip.figures}
    except Failure as failure:
        return {"state": "failed", "reason": str(failure), **failure.figures}
    except ModuleNotFoundError as error:
        return {"state": "skipped", "reason": f"{error.name} is not installed"}


def ask(part: Part, device: Device, *, limit_s: float) -> dict[str, Any]:
    """What a part says, in a process of its own, which is ended with all that it started when its time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", INSIDE, part.name, "--device", device]
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=told, stderr=errors, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return {"state": "failed", "reason": f"it took longer than {limit_s:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = _lines(told)
        if code == 0 and lines:
            found: dict[str, Any] = json.loads(lines[-1])
            return found
        reason = (_lines(errors) or [f"its process ended with {code}"])[-1]
        return {"state": "failed", "reason": reason}


def _lines(file: Any) -> list[str]:
    file.seek(0)
    return file.read().decode(errors="replace").strip().splitlines()


def ask_all(names: list[str], device: Device) -> Iterator[dict[str, Any]]:
    """What each part says, within the time that all of them have together."""
    deadline = time.monotonic() + TOTAL_S
    for part in PARTS:
        if part.name not in names:
            continue
        started = time.monotonic()
        left = deadline - started
        if left < 1:
            found = {"state": "skipped", "reason": f"the {TOTAL_S} s are over"}
        else:
            found = ask(part, device, limit_s=min(part.limit_s, left))
        yield {"gpu_check": part.name, "seconds": round(time.monotonic() - started, 1), **found}


def main() -> None:
    arguments = parse_arguments()
    if arguments.inside is not None:
        (part,) = (part for part in PARTS if part.name == arguments.inside)
        print(json.dumps(answer(part, arguments.device)), flush=True)
        return
    failed = False
    for line in ask_all(arguments.only, arguments.device):
        failed |= line["state"] == "failed"
        print(json.dumps(line), flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
