"""What slime hands to a hook: its `Sample`, made from what we know of an episode, and `args`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import numpy as np

from polyturn.agents.episode import Episode, Outcome
from polyturn.envs.messages import EpisodeView, Message, Score, Task
from polyturn.rollout.groups import Group

ENGINE_HOST = "engines.invalid"
"""The router's host in `args`: what a hook posts there is sampled in the episode's session."""
DEFAULTS: Mapping[str, Any] = {
    "sglang_router_ip": ENGINE_HOST,
    "sglang_router_port": 80,
    "partial_rollout": False,
    "group_rm": False,
    "custom_rm_path": None,
    "rm_type": None,
    "reward_key": None,
    "apply_chat_template": False,
    "apply_chat_template_kwargs": {},
    "n_samples_per_prompt": 1,
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "rollout_top_k": -1,
    "rollout_max_response_len": None,
    "rollout_max_context_len": None,
    "eval_max_context_len": None,
    "use_rollout_routing_replay": False,
    "ci_test": False,
}
"""What slime's own parser says where a script does not, of what hooks read."""


class Arguments(argparse.Namespace):
    """`args` of one call. What a hook writes into it is not seen by the next call."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(**{**DEFAULTS, **given})

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"args.{name} was not set by the script; write it under options.args in the recipe"
        )


class Status(Enum):
    """How far a sample is."""

    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass
class Sample:
    """A sample as hooks of slime read, fill and copy it. Further attributes may be set, as there."""

    Status: ClassVar[type[Status]] = Status
    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    response: str = ""
    response_length: int = 0
    """Tokens behind the prompt."""
    label: Any = None
    reward: Any = None
    loss_mask: list[int] | None = None
    """[response_length]: 1 where the policy sampled the token."""
    weight_versions: list[str] = field(default_factory=list)
    rollout_log_probs: list[float] | None = None
    """[response_length]."""
    rollout_top_p_token_ids: Any = None
    rollout_top_p_token_offsets: Any = None
    rollout_routed_experts: Any = None
    remove_sample: bool = False
    teacher_log_probs: Any = None
    status: Any = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict[str, Any] | None = None
    session_id: str | None = None
    non_generation_time: float = 0.0

    def get_reward_value(self, args: Any) -> Any:
        """The reward, or the part of it that `args.reward_key` names."""
        return self.reward[args.reward_key] if args.reward_key else self.reward

    @property
    def effective_response_length(self) -> int:
        """Tokens that are trained on."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Sequence[int] | None = None,
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append tokens behind the prompt, with their logprobs where the policy sampled them."""
        del args
        added = list(tokens or ())
        values = [0.0] * len(added) if log_probs is None else list(log_probs)
        if len(values) != len(added):
            raise ValueError(f"log_probs length {len(values)} != tokens length {len(added)}")
        before = self.response_length
        self.response += text or ""
        self.tokens = [*self.tokens, *added]
        self.response_length += len(added)
        mask = [1] * before if self.loss_mask is None else self.loss_mask
        mask += [int(trainable)] * len(added)
        self.loss_mask = mask
        self.rollout_log_probs = [*(self.rollout_log_probs or [0.0] * before), *values]
        finish = (meta_info or {}).get("finish_reason")
        if finish is not None and update_terminal_info:
            ends = {"length": Status.TRUNCATED, "abort": Status.ABORTED, "stop": Status.COMPLETED}
            self.status = ends.get(finish["type"], self.status)


def status_of(sample: Any) -> str:
    """A sample's status: hooks write the member, or its value."""
    return str(getattr(sample.status, "value", sample.status))


def sample_to_play(task: Task | None, prompt: str | list[dict[str, Any]], session_id: str) -> Sample:
    """The sample of an episode that a generate function is to play."""
    return Sample(
        index=0,
        group_index=0,
        prompt=prompt,
        label=None if task is None else task.label,
        metadata={} if task is None else dict(task.metadata),
        session_id=session_id,
    )


def sample_to_grade(view: EpisodeView) -> Sample:
    """The sample of an episode that a reward is to grade. Its tokens are not known there, only its texts."""
    prompt, response = _texts(view.messages, last=view.message.raw_text or view.message.text)
    return Sample(
        prompt=prompt,
        response=response,
        label=view.label,
        reward=view.reward,
        metadata=dict(view.task.metadata),
        status=Status.COMPLETED,
    )


def samples_of(group: Group) -> list[Sample]:
    """The samples of a complete group, each with the tokens of its longest segment."""
    return [
        _finished(episode, position=group.prompt.position, index=index)
        for index, episode in enumerate(group.episodes)
    ]


def _finished(episode: Episode, *, position: int, index: int) -> Sample:
    prompt, response = _texts(episode.messages)
    sample = Sample(
        group_index=position,
        index=index,
        prompt=prompt,
        response=response,
        reward=episode.reward,
        status=Status.TRUNCATED if episode.outcome is Outcome.TRUNCATED else Status.COMPLETED,
        metadata={"task_id": episode.task_id, **episode.metrics},
        session_id=episode.episode_id,
    )
    if episode.segments:
        segment = max(episode.segments, key=len)
        start = int(np.argmax(segment.sampled)) if segment.num_sampled else len(segment)
        sample.tokens = segment.token_ids.tolist()
        sample.response_length = len(segment) - start
        sample.loss_mask = segment.sampled[start:].astype(int).tolist()
        sample.rollout_log_probs = segment.logprobs[start:].tolist()
        versions = segment.policy_versions[segment.sampled]
        sample.weight_versions = [str(version) for version in dict.fromkeys(versions.tolist())]
    return sample


def with_parts(sample: Sample, key: str | None, parts: Mapping[str, float]) -> Sample:
    """The sample with the parts of its reward, where `args.reward_key` names the one that counts."""
    if key is not None:
        sample.reward = {**parts, key: parts.get(key, sample.reward)}
    return sample


def _texts(messages: Sequence[Message], last: str | None = None) -> tuple[str, str]:
    """What stands before the first answer, and all from there on; `last` is the last answer as it was written."""
    texts = [str(message["content"]) for message in messages]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if answers and last is not None:
        texts[answers[-1]] = last
    first = answers[0] if answers else len(texts)
    return "\n".join(texts[:first]), "\n".join(texts[first:])


def score_of(result: Any, key: str | None, *, what: str) -> Score:
    """A reward that a hook gave: a number, or numbers by name of which `key` names the one that counts.

    Raises `ValueError` where it is neither.
    """
    if not isinstance(result, Mapping):
        return Score(value=_number(result, what), parts={"slime": _number(result, what)})
    if key is None or key not in result:
        names = ", ".join(map(str, result))
        raise ValueError(f"{what} gave {names}: name the one that counts as options.args.reward_key")
    numbers = {str(name): float(value) for name, value in result.items() if isinstance(value, int | float)}
    return Score(value=_number(result[key], what), parts=numbers)


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} gave {value!r}, which is no number") from error
