"""Runs the checks of the conformance kit on an environment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from polyturn.envs.conformance.concurrency import check_concurrency
from polyturn.envs.conformance.deadline import within
from polyturn.envs.conformance.determinism import check_append_only, check_global_random_state, check_seeds
from polyturn.envs.conformance.findings import Finding, Nonconforming, Subject, Unavailable
from polyturn.envs.conformance.grading import check_faults, check_oracle, check_random
from polyturn.envs.conformance.hacks import check_hard_answers, check_reward_hacks
from polyturn.envs.conformance.interface import (
    check_end,
    check_gymnasium,
    check_spaces,
    check_splits,
    check_vector,
)
from polyturn.envs.conformance.resources import check_close, check_leaks, check_speed

Check = Callable[[Subject], str]

CHECKS: Mapping[str, Check] = {
    "gymnasium": check_gymnasium,
    "splits": check_splits,
    "spaces": check_spaces,
    "oracle": check_oracle,
    "random": check_random,
    "seeds": check_seeds,
    "global_random_state": check_global_random_state,
    "append_only": check_append_only,
    "end": check_end,
    "faults": check_faults,
    "reward_hacks": check_reward_hacks,
    "hard_answers": check_hard_answers,
    "vector": check_vector,
    "concurrency": check_concurrency,
    "close": check_close,
    "leaks": check_leaks,
    "speed": check_speed,
}
"""Every check by name, in the order in which they run. A check returns what it saw, or raises `Nonconforming`."""

DEADLINE_S = 120.0


def run_check(name: str, subject: Subject, *, deadline_s: float = DEADLINE_S) -> Finding:
    """Run one check.

    Raises:
        Unavailable: what the environment runs on is not there.
    """
    started = time.perf_counter()
    hung = f"the check did not end within {deadline_s:g} s: something in the environment hangs"
    try:
        ok, message = True, within(deadline_s, lambda: CHECKS[name](subject), hung)
    except Nonconforming as found:
        _reraise_if_unavailable(found)
        ok, message = False, str(found)
    except Exception as error:  # noqa: BLE001  an environment under test may fail in any way
        _reraise_if_unavailable(error)
        ok, message = False, f"{type(error).__name__}: {error}{_where(error)}"
    return Finding(check=name, ok=ok, message=message, seconds=time.perf_counter() - started)


def check_environment(
    subject: Subject, *, checks: Iterable[str] | None = None, deadline_s: float = DEADLINE_S
) -> Iterator[Finding]:
    """Run the checks of those names, or all, one after the other.

    Raises:
        Unavailable: what the environment runs on is not there.
    """
    for name in CHECKS if checks is None else checks:
        yield run_check(name, subject, deadline_s=deadline_s)


def is_unavailable(error: BaseException) -> bool:
    """Whether an error says that a sandbox cannot run here, or that an optional package is to be installed."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    # By name: this module imports no sandbox.
    if any(type(cause).__name__ == "SandboxUnavailable" for cause in causes):
        return True
    told = any("pip install" in str(cause) for cause in causes)
    return told and any(isinstance(cause, ImportError) for cause in causes)


def _reraise_if_unavailable(error: BaseException) -> None:
    if is_unavailable(error):
        raise Unavailable(str(error)) from error


def _where(error: BaseException) -> str:
    """The innermost place outside of this kit."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if Path(code.co_filename).parent != Path(__file__).parent:
            place = f" (in {code.co_name}, {code.co_filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
