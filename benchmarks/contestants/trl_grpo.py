"""TRL's GRPOTrainer, its generation replaced by the batch."""

from __future__ import annotations

import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

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
    peak_bytes,
)
from polyturn.configs.models import resolve_model_path


def import_all() -> None:
    import datasets  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    import trl

    assert trl.GRPOTrainer


class Trl:
    def __init__(self, job: Job) -> None:
        import datasets
        import transformers
        import trl

        samples = make_batch(job)
        accumulation = len(samples) // job.micro_batch
        batch = padded(samples)
        completion_mask = batch["real"][:, 1:]
        sampled = batch["sampled"][:, 1:]
        generated = {
            "prompt_ids": batch["token_ids"][:, :1],
            "prompt_mask": batch["real"][:, :1],
            "completion_ids": batch["token_ids"][:, 1:],
            "completion_mask": completion_mask,
            "tool_mask": sampled,
            "advantages": batch["advantages"],
            "num_items_in_batch": sampled.sum(),
        }

        class FixedBatch(trl.GRPOTrainer):
            def _generate_and_score_completions(self, _inputs: Any) -> dict[str, Any]:
                if "old_per_token_logps" not in generated:
                    with torch.no_grad():
                        generated["old_per_token_logps"] = self._get_per_token_logps_and_entropies(
                            self.model,
                            batch["token_ids"],
                            batch["real"],
                            completion_mask.size(1),
                            batch_size=job.micro_batch,
                        )[0]
                return dict(generated)

        self._directory = tempfile.TemporaryDirectory()
        arguments = trl.GRPOConfig(
            output_dir=self._directory.name,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=job.micro_batch,
            gradient_accumulation_steps=accumulation,
            num_generations=8,
            max_completion_length=1024,
            max_steps=10_000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP_GRAD,
            epsilon=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            beta=0.0,
            loss_type="dapo",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model_path("builtin:tiny-searcher"))
        self._trainer = FixedBatch(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["x"] * len(samples)}),
            processing_class=tokenizer,
        )

    def run(self, pipe: Connection, baseline: int) -> None:
        """Answer every request with the result of a step, from inside TRL's loop."""
        import transformers

        class Turns(transformers.TrainerCallback):
            started = 0.0
            seconds = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                if pipe.recv() is None:
                    raise KeyboardInterrupt
                self.started = time.process_time()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.seconds = time.process_time() - self.started

            def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
                result = StepResult(cpu_s=self.seconds, grad_norm=float(logs["grad_norm"]), parts={})
                pipe.send((result, peak_bytes() - baseline))

        from transformers.trainer_callback import PrinterCallback

        self._trainer.remove_callback(PrinterCallback)
        self._trainer.add_callback(Turns())
        pipe.send("ready")
        try:
            self._trainer.train()
        except KeyboardInterrupt:
            self._directory.cleanup()
