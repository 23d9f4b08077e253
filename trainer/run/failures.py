"""How a run ends before its last step: by Ctrl-C, or by a failure, told in one sentence, with the rest in its logs."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from ray.exceptions import ActorDiedError, RayError
from ray.exceptions import OutOfMemoryError as RayOutOfMemory

from polyturn.configs.errors import ConfigError, Interrupted, RunFailure, machine_fault
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.player import RolloutError
from polyturn.tools.secrets import blank_credentials
from polyturn.trainer.checkpoints.manifest import CheckpointError
from polyturn.trainer.run.checks import CheckFailure
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.weight_sync import WeightSyncError


class StepFailure(RunFailure):
    """What was played in a step cannot be trained on, or a check failed."""


OURS = (CheckFailure, CheckpointError, EngineError, RolloutError, RunFailure, WeightSyncError)
SAY_IT_ALL = (*OURS, FloatingPointError, ValueError)
"""What we raise ourselves: the whole message is for people."""
FAILURES = (*OURS, ArithmeticError, MemoryError, OSError, RayError)
"""What a run ends with, outside the border of one."""


@contextlib.contextmanager
def as_run_failure(directory: RunDirectory) -> Iterator[None]:
    """Turn what ends a run into a sentence with the way on, and write all that is known of it into the run's logs.

    This is the border of a run: whatever went wrong in it, a user's plug-in or a fault of ours, is told in the same
    way, and nothing of it is lost.

    Raises:
        RunFailure: in place of any other exception but bad input and an interrupt.
    """
    killed_before = num_oom_kills()
    try:
        yield
    except (ConfigError, Interrupted):
        raise
    except Exception as failure:
        where = _keep(failure, directory.logs / "failure.log")
        again = f"; resume=true run_dir={directory.path} goes on" if directory.config.exists() else ""
        killed = num_oom_kills() - killed_before
        memory = (
            f"; the kernel killed {killed} process(es) of this machine for want of memory: {LESS_HOST_MEMORY}"
            if killed > 0
            else ""
        )
        raise RunFailure(f"{sentence_of(failure)}{memory}{where}{again}") from failure


def sentence_of(failure: BaseException) -> str:
    """One line for people: what a rank or an actor raised as it raised it, without the trace that came with it."""
    cause = getattr(failure, "cause", None)
    if isinstance(failure, RayError) and isinstance(cause, BaseException):
        return sentence_of(cause)
    if isinstance(failure, ActorDiedError):
        return _death_of(failure)
    if isinstance(failure, OSError) and failure.strerror:
        return machine_fault(failure)
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    if not lines:
        return f"{type(failure).__name__}{_way_out(failure)}"
    if isinstance(failure, EngineError):
        return failure.sentence
    if isinstance(failure, SAY_IT_ALL):
        return " ".join(lines)
    return f"{type(failure).__name__}: {lines[0]}{_way_out(failure)}"


ACTORS = {
    "PolicyRank": "a rank of the policy",
    "CriticRank": "a rank of the critic",
    "EngineActor": "the process that holds an engine",
    "PlayerActor": "a rollout worker",
}


def _death_of(failure: ActorDiedError) -> str:
    """Which process died, as far as Ray tells. What killed it leaves no word of why."""
    said = dict(re.findall(r"^\s*(class_name|pid|ip): (\S+)$", str(failure), flags=re.MULTILINE))
    who = ACTORS.get(said.get("class_name", ""), "a process of the run")
    where = f" (process {said['pid']} on {said['ip']})" if {"pid", "ip"} <= said.keys() else ""
    return f"{who}{where} was killed or crashed"


LESS_HOST_MEMORY = (
    "lower sglang.max_total_tokens, trainer.max_tokens_per_gpu or engines.num_engines, or end what else runs "
    "there"
)
LESS_GPU_MEMORY = (
    "lower trainer.max_tokens_per_gpu, or sglang.mem_fraction_static where engines share the GPU; `polyturn train "
    "RECIPE --dry-run` prints what each rank needs"
)


def _way_out(failure: BaseException) -> str:
    """What can be done about a want of memory; empty for anything else. Torch's error is known by its name alone."""
    if isinstance(failure, MemoryError | RayOutOfMemory):
        return f"; {LESS_HOST_MEMORY}"
    return f"; {LESS_GPU_MEMORY}" if type(failure).__name__ == "OutOfMemoryError" else ""


VMSTAT = Path("/proc/vmstat")


def num_oom_kills() -> int:
    """Processes that the kernel of this machine has killed for want of memory so far; 0 where it does not tell."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def _keep(failure: BaseException, log: Path) -> str:
    """Write the trace; where to look. A disk that is full does not take it."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(traceback.format_exception(failure))
        log.write_text(blank_credentials(text), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""
    return f" (more in {log})"
