"""`MegatronPolicy.train` on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from contestants.job import CLIP_GRAD, LEARNING_RATE, Job, StepResult, make_batch

MAX_TOKENS = 4096


def import_all() -> None:
    import polyturn.trainer.megatron.engine  # noqa: F401


class Polyturn:
    def __init__(self, job: Job) -> None:
        from polyturn.configs.schema.trainer import OptimizerConfig
        from polyturn.trainer.algorithms.objective import Objective
        from polyturn.trainer.base_model.supervised import one_rank
        from polyturn.trainer.data.samples import count_samples
        from polyturn.trainer.megatron.policy import MegatronPolicy

        optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, clip_grad=CLIP_GRAD)
        self._policy = MegatronPolicy(
            one_rank(job.model_path, optimizer=optimizer, max_tokens_per_gpu=MAX_TOKENS)
        )
        samples = make_batch(job)
        columns = self._policy.logprobs(samples)
        self._samples = [
            replace(sample, proximal_logprobs=column) for sample, column in zip(samples, columns, strict=True)
        ]
        self._objective = Objective()
        self._counts = count_samples(samples)

    def step(self) -> StepResult:
        parts: dict[str, float] = {}
        with measured(self._policy, parts):
            started = time.process_time()
            metrics = self._policy.train(self._samples, objective=self._objective, global_counts=self._counts)
            seconds = time.process_time() - started
        return StepResult(cpu_s=seconds, grad_norm=metrics["grad_norm"], parts=parts)


@contextmanager
def measured(policy: Any, parts: dict[str, float]) -> Iterator[None]:
    """Add up the CPU seconds of a policy's forward and backward passes and of its optimizer."""
    import megatron.core.pipeline_parallel.schedules as schedules

    from polyturn.trainer.megatron import engine as engine_module

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            result = function(*args, **kwargs)
            parts[part] = parts.get(part, 0.0) + time.process_time() - started
            return result

        return call

    engine = policy._engine
    forward, backward, optimize = engine._run, schedules.backward_step, engine_module.step
    engine._run = timed("forward", forward)
    schedules.backward_step = timed("backward", backward)
    engine_module.step = timed("optimizer", optimize)
    try:
        yield
    finally:
        del engine._run
        schedules.backward_step, engine_module.step = backward, optimize
