"""A training step of GRPO beside TRL's and a plain transformers loop: the same model, batch and machine.

Each contestant is a process of its own with one thread, and they take turns, one step each. Seconds are those of the
process's CPU, which other work on the machine does not lengthen; memory is the peak of resident memory above what the
imports took. All three start with the same weights, so their first gradient norms must agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyturn.configs.models import resolve_model_path
from polyturn.trainer.batch import TrainSample, pack

LEARNING_RATE = 1e-4
CLIP_GRAD = 1.0
SIZES = {
    "1M": {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 384},
    "50M": {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1536},
}
NUM_EPISODES = {"1M": 32, "50M": 8}
MAX_TOKENS = 4096


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: train_step.py --steps 8 --sizes 1M 50M"
    )
    parser.add_argument(
        "--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="parameters of the model"
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each contestant")
    parser.add_argument("--episodes", type=int, help=f"episodes in the batch; by default {NUM_EPISODES}")
    parser.add_argument("--micro-batch", type=int, default=4, help="episodes that TRL and plain pad together")
    parser.add_argument("--short", action="store_true", help="1M alone, 8 episodes, 2 steps")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every contestant is given."""

    model_path: Path
    num_episodes: int
    vocab_size: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    cpu_s: float
    grad_norm: float
    parts: dict[str, float]
    """CPU seconds by part, where they are taken."""


def make_batch(job: Job) -> list[TrainSample]:
    """Multi-turn episodes: lengths are log-normal, about a third of the tokens are the policy's."""
    rng = np.random.default_rng(0)
    samples = []
    for index in range(job.num_episodes):
        length = int(np.clip(rng.lognormal(6.0, 0.5), 64, 1024))
        turns = np.arange(length) // 60
        sampled = (np.arange(length) % 60 >= 40) & (turns > 0)
        sampled[-1] = True
        samples.append(
            TrainSample(
                sample_id=f"s{index}",
                group_id=f"g{index // 8}",
                sequence_id=f"s{index}",
                token_ids=rng.integers(3, job.vocab_size, length),
                sampled=sampled,
                behavior_logprobs=np.zeros(length, dtype=np.float32),
                policy_versions=np.zeros(length, dtype=np.int32),
                turns=turns.astype(np.int32),
                advantages=np.full(length, rng.normal(), dtype=np.float32),
            )
        )
    return samples


def padded(samples: list[TrainSample]) -> dict[str, torch.Tensor]:
    """Right-padded to the longest. The first token is the prompt, all others the completion with its mask."""
    longest = max(map(len, samples))

    def rows(column: Callable[[TrainSample], np.ndarray]) -> torch.Tensor:
        table = np.zeros((len(samples), longest), dtype=column(samples[0]).dtype)
        for row, sample in zip(table, samples, strict=True):
            row[: len(sample)] = column(sample)
        return torch.from_numpy(table)

    return {
        "token_ids": rows(lambda sample: sample.token_ids),
        "real": rows(lambda sample: np.ones(len(sample), dtype=np.int64)),
        "sampled": rows(lambda sample: sample.sampled.astype(np.int64)),
        "advantages": torch.tensor([float(sample.advantages[0]) for sample in samples]),
    }


class Polyturn:
    """`MegatronPolicy.train` on one rank."""

    def __init__(self, job: Job) -> None:
        from polyturn.configs.optimizer import OptimizerConfig
        from polyturn.trainer.algorithms.objective import Objective
        from polyturn.trainer.megatron.policy import MegatronPolicy
        from polyturn.trainer.updates import count_samples

        self._policy = MegatronPolicy(
            job.model_path,
            optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, clip_grad=CLIP_GRAD),
            max_tokens_per_gpu=MAX_TOKENS,
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


class Plain:
    """transformers and torch: padded micro-batches, log-softmax, clipped loss, AdamW."""

    def __init__(self, job: Job) -> None:
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(job.model_path, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
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
            values = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
            ((values * batch["sampled"][:, 1:]).sum() / self._num_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), CLIP_GRAD)
        self._optimizer.step()
        return StepResult(cpu_s=time.process_time() - started, grad_norm=float(norm), parts={})


class Trl:
    """TRL's GRPOTrainer, its generation replaced by the batch. A generator: each `next` is an optimizer step."""

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
            adam_beta2=0.98,
            max_grad_norm=CLIP_GRAD,
            epsilon=0.2,
            epsilon_high=0.28,
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


CONTESTANTS: dict[str, Any] = {"polyturn": Polyturn, "trl": Trl, "transformers": Plain}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def import_all(name: str) -> None:
    """So that the imports are in the baseline, not in the measurement."""
    if name == "polyturn":
        from polyturn.trainer.megatron.cpu import install_cpu_compatibility

        install_cpu_compatibility("cpu")
        import polyturn.trainer.megatron.engine  # noqa: F401
    else:
        import transformers.models.qwen3.modeling_qwen3  # noqa: F401

        torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
    if name == "trl":
        import datasets  # noqa: F401
        import trl

        assert trl.GRPOTrainer


def contest(name: str, job: Job, pipe: Connection) -> None:
    torch.set_num_threads(1)
    import_all(name)
    baseline = peak_bytes()
    contestant = CONTESTANTS[name](job)
    if isinstance(contestant, Trl):
        contestant.run(pipe, baseline)
        return
    pipe.send("ready")
    while pipe.recv() is not None:
        pipe.send((contestant.step(), peak_bytes() - baseline))


def make_model(size: str, directory: Path) -> int:
    """A random Qwen3 of that size; the number of its parameters."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **SIZES[size],
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=SIZES[size]["hidden_size"] // 8,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    return sum(param.numel() for param in model.parameters())


def measure(size: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    num_parameters = make_model(size, directory)
    job = Job(
        model_path=directory,
        num_episodes=arguments.episodes or NUM_EPISODES[size],
        vocab_size=SIZES[size]["vocab_size"],
        micro_batch=arguments.micro_batch,
    )
    names = [name for name in CONTESTANTS if name != "trl" or importlib.util.find_spec("trl")]
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=contest, args=(name, job, theirs), daemon=True)
        process.start()
        processes.append(process)
    for name in names:
        assert pipes[name].recv() == "ready"
    results: dict[str, list[StepResult]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for _ in range(arguments.steps + 1):
        for name in names:
            pipes[name].send(True)
            result, peaks[name] = pipes[name].recv()
            results[name].append(result)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(None)
        process.join(timeout=20)
    samples = make_batch(job)
    num_tokens = sum(map(len, samples))
    micro_batches = [samples[i : i + job.micro_batch] for i in range(0, len(samples), job.micro_batch)]
    longest = max(map(len, samples))
    figures: dict[str, Any] = {
        "parameters": num_parameters,
        "tokens": num_tokens,
        "trainable_tokens": sum(sample.num_trainable for sample in samples),
        "share_of_real_tokens": {
            "polyturn": 1.0,
            "trl": num_tokens / (longest * len(samples)),
            "transformers": num_tokens / sum(max(map(len, part)) * len(part) for part in micro_batches),
        },
        "micro_batches": {"polyturn": len(pack(samples, MAX_TOKENS)), "padded": len(micro_batches)},
    }
    for name in names:
        steps = results[name][1:]  # the first is a warm-up
        seconds = statistics.median(step.cpu_s for step in steps)
        figures[name] = {
            "tokens_per_cpu_second": num_tokens / seconds,
            "peak_mb": peaks[name] / 2**20,
            "first_grad_norm": results[name][0].grad_norm,
            "speedup_of_polyturn": statistics.median(
                theirs.cpu_s / ours.cpu_s for theirs, ours in zip(steps, results["polyturn"][1:], strict=True)
            ),
        }
    ours = results["polyturn"][1:]
    figures["polyturn"]["share_by_part"] = {
        part: statistics.median(step.parts[part] / step.cpu_s for step in ours)
        for part in ("forward", "backward", "optimizer")
    }
    figures["polyturn"]["share_outside_passes"] = statistics.median(
        1 - (step.parts["forward"] + step.parts["backward"]) / step.cpu_s for step in ours
    )
    return figures


def main() -> None:
    arguments = parse_arguments()
    if arguments.short:
        arguments.sizes, arguments.episodes, arguments.steps = ["1M"], 8, 2
    torch.set_num_threads(1)
    sizes = {}
    print(f"{'size':>5} {'':>14} {'tokens/CPU s':>13} {'peak MB':>9} {'polyturn is':>12} {'real tokens':>12}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as directory:
            figures = sizes[size] = measure(size, arguments, Path(directory))
        for name in CONTESTANTS:
            if name not in figures:
                print(f"{size:>5} {name:>14} not installed")
                continue
            row = figures[name]
            print(
                f"{size:>5} {name:>14} {row['tokens_per_cpu_second']:>13.0f} {row['peak_mb']:>9.0f} "
                f"{row['speedup_of_polyturn']:>11.2f}x {figures['share_of_real_tokens'][name]:>12.2f}"
            )
        ours = figures["polyturn"]
        print(
            f"{size:>5} outside forward and backward: {ours['share_outside_passes']:.1%} of polyturn's step"
        )
    print(json.dumps({"benchmark": "train_step", "steps": arguments.steps, "sizes": sizes}))


if __name__ == "__main__":
    main()
