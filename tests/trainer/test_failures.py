"""How a run that cannot go on says so: one line, whatever it was and wherever it was raised."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayTaskError

from polyturn.configs.errors import ConfigError, Interrupted, RunFailure
from polyturn.rollout.engines.launch import Engines
from polyturn.rollout.engines.process import EngineError
from polyturn.rollout.player import RolloutError
from polyturn.trainer.run import failures
from polyturn.trainer.run.checks import CheckFailure
from polyturn.trainer.run.directory import RunDirectory
from polyturn.trainer.run.failures import as_run_failure, sentence_of
from polyturn.trainer.run.parts import naming_what_ended

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nKeyError: 1\n'


def remote(cause: Exception) -> Exception:
    """An exception of a rank, as the driver gets it."""
    return RayTaskError("update", TRACE, cause).as_instanceof_cause()


def died(class_name: str) -> ActorDiedError:
    """As Ray tells of an actor whose process is gone, its own guesses included."""
    context = ActorDiedErrorContext(
        class_name=class_name,
        actor_id=bytes(16),
        pid=41,
        node_ip_address="10.0.0.7",
        error_message="Some common causes include: (1) the process was killed by the OOM killer",
    )
    return ActorDiedError(context)


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
        (MemoryError(), f"MemoryError; {failures.LESS_HOST_MEMORY}"),
        (ActorDiedError(), "a process of the run was killed or crashed"),
        (died("PolicyRank"), "a rank of the policy (process 41 on 10.0.0.7) was killed or crashed"),
        (died("Stranger"), "a process of the run (process 41 on 10.0.0.7) was killed or crashed"),
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


@pytest.mark.parametrize("num_kills", [0, 2])
def test_memory_is_named_where_the_kernel_says_that_it_was_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_kills: int
) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 100\noom_kill 7\n")
    monkeypatch.setattr(failures, "VMSTAT", counters)
    with pytest.raises(RunFailure) as ended, as_run_failure(RunDirectory(tmp_path)):
        counters.write_text(f"pgfault 200\noom_kill {7 + num_kills}\n")
        raise died("PolicyRank")
    told = "; the kernel killed 2 process(es) of this machine for want of memory" in str(ended.value)
    assert told == bool(num_kills)


def test_a_want_of_memory_is_told_with_what_takes_less() -> None:
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert sentence_of(on_gpu).startswith(
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.; lower trainer.max_tokens_per_gpu"
    )
    assert sentence_of(MemoryError()).startswith("MemoryError; lower sglang.max_total_tokens")
    assert "lower" not in sentence_of(RuntimeError("an index is out of range"))


class Ended(Engines):
    """Engines of which one process has ended."""

    def __init__(self, *sentences: str) -> None:
        self.sentences = sentences

    def ended(self) -> list[str]:
        return list(self.sentences)


def test_what_has_ended_is_named_before_what_follows_from_it() -> None:
    cause = RolloutError("7 attempts in a row had no answer of any engine")
    with (
        pytest.raises(EngineError) as named,
        naming_what_ended(Ended("sglang-router was killed by SIGKILL")),
    ):
        raise cause
    assert sentence_of(named.value) == f"sglang-router was killed by SIGKILL: {cause}"
    for engines in (Ended(), None):
        with pytest.raises(RolloutError, match=r"^7 attempts"), naming_what_ended(engines):
            raise cause
    with pytest.raises(CheckFailure, match=r"^no$"), naming_what_ended(Ended("sglang-router ended")):
        raise CheckFailure("no")


def test_a_log_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(RunFailure, match=r"make room there$"), as_run_failure(RunDirectory(tmp_path)):
        raise FULL
