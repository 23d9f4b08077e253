"""TRL's GRPOTrainer on the tasks of the quickstart, in its own loop of an environment with a tool.

    python -m contestants.trl_quickstart JOB (as JSON, see `TrlJob`)

Its lines are JSON, one for each evaluation: the step, the share of held-out questions answered right, and whether the
time was up. It ends with the first that reaches the target.

What is equal: the model, the prompts to the token, the index that is searched, four turns of 48 tokens, 16 prompts
with 8 episodes a step, one update of all of them, the clipping, the optimizer, the held-out questions. What is TRL's
own: the loop that generates with transformers for the whole batch, reads the calls, calls the tool and goes on; a call
that cannot be read is the last word of its episode, of which Polyturn's policy is told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from typing import Any

import datasets
import torch
import transformers
import trl
from trl.chat_template_utils import qwen3_template

import polyturn
from polyturn.configs.models import resolve_model_path
from polyturn.envs.rewards import exact_match
from polyturn.envs.two_hop.env import build_index
from polyturn.envs.two_hop.world import WorldSize
from polyturn.tools.search.retrieval import SEARCH_SPEC, search_tool

MODEL = "builtin:tiny-searcher"
ENVIRONMENT = "polyturn/TwoHopSearch-v0"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrlJob:
    """What is to be trained, and until when."""

    learning_rate: float
    num_steps: int
    prompts_per_step: int
    samples_per_prompt: int
    micro_batch: int
    every_steps: int
    num_tasks: int
    target: float
    limit_s: float
    seed: int
    max_turns: int = 4
    max_tokens_per_turn: int = 48
    max_tokens_per_episode: int = 640


class Searched:
    """The environment as TRL takes one: its methods are the tools of the model."""

    def __init__(self) -> None:
        self._tool = search_tool(build_index(1, WorldSize()), top_k=2)

    def reset(self, **_: Any) -> None:
        """Nothing of an episode is kept."""

    def search(self, query: str) -> str:
        """Search the knowledge base.

        Args:
            query: What to look for.
        """
        return str(self._tool.function(query=query))


def rows(split: str, number: int | None = None) -> datasets.Dataset:
    """The tasks of a split in their order, the first `number` of them."""
    tasks = polyturn.make(ENVIRONMENT, split=split).tasks(split)
    chosen = [tasks[index] for index in range(number or len(tasks))]
    return datasets.Dataset.from_dict(
        {"prompt": [list(task.messages) for task in chosen], "label": [task.label for task in chosen]}
    )


def is_right(completions: list[list[dict[str, Any]]], label: list[str], **_: Any) -> list[float]:
    """The reward: the last message names the town."""
    return [
        exact_match(messages[-1]["content"], town)
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")
        else 0.0
        for messages, town in zip(completions, label, strict=True)
    ]


def read_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The model's, whose template shows the tool as Polyturn does: TRL would describe its arguments otherwise."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model_path(MODEL), padding_side="left")
    shown = json.dumps(SEARCH_SPEC.to_openai(), ensure_ascii=False)
    assert "{{ tool | tojson }}" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ tool | tojson }}", shown)
    tokenizer.response_template = qwen3_template
    return tokenizer


def tell(**line: Any) -> None:
    print(json.dumps(line), flush=True)


class Watch(transformers.TrainerCallback):
    """Tells each evaluation, and ends the training at the target or when the time is up."""

    def __init__(self, job: TrlJob) -> None:
        self._job = job
        self._began = time.monotonic()
        self._is_late = False

    def on_step_end(self, _arguments: Any, _state: Any, control: Any, **_: Any) -> None:
        self._is_late = time.monotonic() - self._began > self._job.limit_s
        if self._is_late:
            control.should_evaluate = control.should_training_stop = True

    def on_log(self, _arguments: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            print(f"step {state.global_step}: reward {logs['reward']:.3f}", file=sys.stderr, flush=True)
        if "eval_reward" in logs:
            score = logs["eval_reward"]
            failed = logs["eval_tools/failure_frequency"]
            tell(step=state.global_step, score=score, failed_calls=round(failed, 3), is_late=self._is_late)
            if score >= self._job.target:
                control.should_training_stop = True


def make_trainer(job: TrlJob, directory: str) -> trl.GRPOTrainer:
    num_episodes = job.prompts_per_step * job.samples_per_prompt
    tokenizer = read_tokenizer()
    held_out = rows("heldout", job.num_tasks)
    prompt = tokenizer.apply_chat_template(
        held_out[0]["prompt"], tools=[SEARCH_SPEC.to_openai()], add_generation_prompt=True, return_dict=False
    )
    arguments = trl.GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        seed=job.seed,
        max_steps=job.num_steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=num_episodes // job.micro_batch,
        per_device_eval_batch_size=job.num_tasks,
        num_generations=job.samples_per_prompt,
        num_generations_eval=1,
        max_completion_length=job.max_tokens_per_episode - len(prompt),
        generation_kwargs={"max_new_tokens": job.max_tokens_per_turn},
        max_tool_calling_iterations=job.max_turns - 1,
        temperature=1.0,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.98,
        max_grad_norm=1.0,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=job.every_steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            resolve_model_path(MODEL), dtype=torch.float32
        ),
        reward_funcs=is_right,
        args=arguments,
        train_dataset=rows("train"),
        eval_dataset=held_out,
        processing_class=tokenizer,
        environment_factory=Searched,
        callbacks=[Watch(job)],
    )


def main() -> None:
    job = TrlJob(**json.loads(sys.argv[1]))
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(job, directory)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()


if __name__ == "__main__":
    main()
