"""How a run that cannot go on says so: one line, whatever it was and wherever it was raised."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from polyturn.configs.errors import ConfigError, Interrupted, RunFailure
from polyturn.rollout.engines.process import EngineError
from polyturn.trainer.run.checks import CheckFailure
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.failures import as_run_failure, sentence_of

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nKeyError: 1\n'


def remote(cause: Exception) -> Exception:
    """An exception of a rank, as the driver gets it."""
    return RayTaskError("update", TRACE, cause).as_instanceof_cause()


FULL = OSError(errno.ENOSPC, "No space left on device", "runs/a/metrics.jsonl")


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (CheckFailure("step 3: group 7 has 5 episodes"), "step 3: group 7 has 5 episodes"),
        (
            remote(FloatingPointError("sample a: a logprob is not finite")),
            "sample a: a logprob is not finite",
        ),
        (remote(KeyError("rope_theta")), "KeyError: 'rope_theta'"),
        (remote(ValueError("the layout\ndoes not fit")), "the layout does not fit"),
        (FULL, "runs/a/metrics.jsonl: No space left on device; make room there"),
        (remote(FULL), "runs/a/metrics.jsonl: No space left on device; make room there"),
        (
            EngineError(
                "engine 0 ended; its log runs/e.log:\nTraceback\n  File\nRuntimeError: CUDA out of memory"
            ),
            "engine 0 ended; its log runs/e.log: RuntimeError: CUDA out of memory",
        ),
        (MemoryError(), "MemoryError"),
        (ActorDiedError(), "a process of the run was killed or crashed: by the kernel, where memory ran out"),
        (
            OverflowError(34, "Numerical result out of range"),
            "OverflowError: (34, 'Numerical result out of range')",
        ),
    ],
)
def test_one_line(failure: Exception, sentence: str) -> None:
    assert sentence_of(failure) == sentence


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    "failure", [FULL, remote(KeyError("a")), TypeError("a plug-in's"), CheckFailure("no")]
)
def test_a_run_ends_with_a_sentence_and_keeps_the_trace(
    tmp_path: Path, failure: Exception, begun: bool
) -> None:
    directory = RunDirectory(tmp_path)
    if begun:
        directory.config.touch()
    with pytest.raises(RunFailure) as ended, as_run_failure(directory):
        raise failure
    message = str(ended.value)
    assert message.startswith(sentence_of(failure)) and "\n" not in message
    assert ("resume=true" in message) == begun, "what has not begun cannot go on"
    log = directory.logs / "failure.log"
    assert str(log) in message and "Traceback" in log.read_text()


@pytest.mark.parametrize(
    "outcome", [ConfigError("no such key"), Interrupted(Path("runs/a"), 3), KeyboardInterrupt()]
)
def test_bad_input_and_interrupts_are_no_failures(tmp_path: Path, outcome: BaseException) -> None:
    with pytest.raises(type(outcome)), as_run_failure(RunDirectory(tmp_path)):
        raise outcome
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(RunFailure, match=r"make room there$"), as_run_failure(RunDirectory(tmp_path)):
        raise FULL
