"""transformers and torch: padded micro-batches, log-softmax, clipped loss, AdamW."""

from __future__ import annotations

import time

import torch

from contestants.job import (
    BETAS,
    CLIP_GRAD,
    CLIP_HIGH,
    CLIP_LOW,
    LEARNING_RATE,
    Job,
    StepResult,
    make_batch,
    padded,
)


def import_all() -> None:
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)


class Plain:
    def __init__(self, job: Job) -> None:
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0, fused=True
        )
        samples = make_batch(job)
        self._num_tokens = sum(sample.num_trainable for sample in samples)
        self._batches = [
            padded(samples[i : i + job.micro_batch]) for i in range(0, len(samples), job.micro_batch)
        ]
        with torch.no_grad():
            for batch in self._batches:
                batch["old"] = self._logprobs(batch)

    def _logprobs(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self._model(input_ids=batch["token_ids"], attention_mask=batch["real"]).logits[:, :-1]
        targets = batch["token_ids"][:, 1:, None]
        return logits.float().log_softmax(-1).gather(-1, targets).squeeze(-1)

    def step(self) -> StepResult:
        started = time.process_time()
        self._optimizer.zero_grad()
        for batch in self._batches:
            ratio = (self._logprobs(batch) - batch["old"]).exp()
            advantages = batch["advantages"][:, None]
            values = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantages)
            ((values * batch["sampled"][:, 1:]).sum() / self._num_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_GRAD)
        self._optimizer.step()
        return StepResult(cpu_s=time.process_time() - started, grad_norm=float(norm), parts={})
