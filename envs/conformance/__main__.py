"""The process that `isolated.py` starts: `python -m polyturn.envs.conformance REQUEST`, answers as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from typing import IO, Any

from polyturn.envs.conformance.findings import Subject, Unavailable
from polyturn.envs.conformance.runner import is_unavailable, run_check
from polyturn.envs.registry import make


def main() -> None:
    """Run the checks of the request on the command line."""
    # Whatever an environment prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request: dict[str, Any] = json.loads(sys.argv[1])
    subject = Subject(
        name=request["env_id"],
        make=lambda: make(request["env_id"], **request["options"]),
        num_tasks=request["num_tasks"],
        num_episodes=request["num_episodes"],
        budget_s=request["budget_s"],
    )
    _serve(subject, request, answers)
    print(json.dumps({"end": True}), file=answers, flush=True)
    os._exit(0)  # threads and exit handlers of an environment are not waited for


def _serve(subject: Subject, request: dict[str, Any], answers: IO[str]) -> None:
    try:
        with subject.open():
            pass
    except ValueError as error:
        kind = "unavailable" if is_unavailable(error) else "refused"
        print(json.dumps({kind: str(error)}), file=answers)
        return
    except Exception as error:
        if not is_unavailable(error):
            raise
        print(json.dumps({"unavailable": str(error)}), file=answers)
        return
    for name in request["checks"]:
        print(json.dumps({"begin": name}), file=answers)
        try:
            finding = run_check(name, subject, deadline_s=request["deadline_s"])
        except Unavailable as reason:
            print(json.dumps({"unavailable": str(reason)}), file=answers)
            return
        print(json.dumps({"finding": dataclasses.asdict(finding)}), file=answers)
        if any(thread.name == "conformance check" for thread in threading.enumerate()):
            return  # something still hangs; the next check gets a process without it


if __name__ == "__main__":
    main()
