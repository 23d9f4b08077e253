"""What a verifier's reward file, or the summary of its tests, says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from polyturn.tools.plain import shown


class NoVerdict(RuntimeError):
    """The verifier says nothing that can be read: it failed, and nobody knows what the work is worth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the work is worth."""

    reward: float
    further: Mapping[str, float] = field(default_factory=dict)
    """What a reward file says beside the reward, by name."""


def read_reward_text(text: str) -> Verdict:
    """A `reward.txt`: one number. Raises NoVerdict."""
    try:
        return Verdict(reward=_number("reward.txt", float(text)))
    except ValueError:
        raise NoVerdict(f"reward.txt holds {shown(text)}, which is no number") from None


def read_reward_json(text: str) -> Verdict:
    """A `reward.json`: numbers by name. The one called `reward` is the reward, or the only one, or their mean.

    Raises NoVerdict.
    """
    try:
        written = json.loads(text)
    except ValueError as error:
        raise NoVerdict(f"reward.json is no JSON: {error}") from None
    if not isinstance(written, dict) or not written:
        raise NoVerdict(f"reward.json must hold numbers by name, not {shown(written)}")
    numbers = {name: _number(f"reward.json, {name}", value) for name, value in written.items()}
    reward = numbers.pop("reward", None)
    return Verdict(reward=sum(numbers.values()) / len(numbers) if reward is None else reward, further=numbers)


_SUMMARY = re.compile(r"^=+ short test summary info =+\s*$", re.MULTILINE)
_OUTCOME = re.compile(r"^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_CONTROL = re.compile(r"\x1b\[[0-9;]*m")


def read_pytest_summary(output: str) -> Verdict:
    """The summary that `pytest -rA` prints: 1.0 if every test passed, else 0.0; skipped ones do not count.

    Raises NoVerdict where there is none, or no test ran.
    """
    parts = _SUMMARY.split(_CONTROL.sub("", output).replace("\r", ""))
    if len(parts) < 2:
        raise NoVerdict("the tests printed no summary of pytest (`pytest -rA` does)")
    outcomes = _OUTCOME.findall(parts[-1])
    passed = sum(outcome in ("PASSED", "XFAIL") for outcome in outcomes)
    failed = sum(outcome in ("FAILED", "ERROR", "XPASS") for outcome in outcomes)
    if not passed + failed:
        raise NoVerdict("pytest's summary names no test that passed or failed")
    return Verdict(reward=float(failed == 0), further={"tests_passed": passed / (passed + failed)})


_SWEBENCH = re.compile(r"SWEBench results starts here\s*(\S*)\s*SWEBench results ends here")


def read_swebench_result(output: str) -> Verdict:
    """What SWE-bench's harness says between its two marks: 1.0 for PASSED, else 0.0. Raises NoVerdict without marks."""
    found = _SWEBENCH.findall(_CONTROL.sub("", output))
    if not found:
        raise NoVerdict("the tests did not come to SWE-bench's result")
    return Verdict(reward=float(found[-1] == "PASSED"))


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise NoVerdict(f"{where} must be a finite number, not {shown(value)}")
    return float(value)
