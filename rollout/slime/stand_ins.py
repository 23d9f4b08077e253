"""The modules of slime that hooks import, where slime is not installed, and those that must be ours in any case.

A hook asks an engine by `post(url, payload)` of slime's; here that is answered by the session of the episode that the
hook plays, so that what was sampled is recorded as it was.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from polyturn.agents.agent_play import AgentEpisode
from polyturn.agents.chat import load_tokenizer
from polyturn.agents.sessions.requests import RequestRefused
from polyturn.configs.slime.hooks import RULES
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task, as_score
from polyturn.envs.plugins import load_object
from polyturn.envs.rewards.math.extract import extract
from polyturn.envs.rewards.rules import make_rule
from polyturn.rollout.slime.samples import ENGINE_HOST, Sample


@dataclass(kw_only=True, slots=True, eq=False)
class Playing:
    """The episode that a hook plays, and the texts that its engine has answered."""

    episode: AgentEpisode
    num_sampled: int = 0
    """Tokens."""
    texts: dict[str, list[int]] = field(default_factory=dict)
    """By a prompt with its answer, their tokens: a prompt that goes on from one as text has these tokens."""


_PLAYING: contextvars.ContextVar[Playing] = contextvars.ContextVar("playing")


@contextmanager
def playing(episode: AgentEpisode) -> Iterator[Playing]:
    """What is posted to the engines within, also by tasks that are begun there, is sampled in this episode."""
    now = Playing(episode=episode)
    token = _PLAYING.set(now)
    try:
        yield now
    finally:
        _PLAYING.reset(token)


async def post(
    url: str, payload: Mapping[str, Any], max_retries: int = 60, headers: Mapping[str, str] | None = None
) -> Any:
    """What an engine answers to `/generate`, in SGLang's form; any other address is posted to over HTTP."""
    if f"//{ENGINE_HOST}" in url:
        if not url.endswith("/generate"):
            raise ValueError(f"of the engines a hook may ask /generate alone, not {url}")
        return await _generate(_PLAYING.get(), payload)
    import httpx

    transport = httpx.AsyncHTTPTransport(retries=max_retries)
    async with httpx.AsyncClient(transport=transport, timeout=None) as client:
        answer = await client.post(url, json=dict(payload), headers=headers)
        answer.raise_for_status()
        return answer.json()


async def _generate(playing: Playing, payload: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer, sampling = playing.episode.tokenizer, payload.get("sampling_params", {})
    prompt = payload.get("input_ids")
    token_ids = _ids_of(playing, payload["text"]) if prompt is None else [int(token) for token in prompt]
    stop = sampling.get("stop") or ()
    try:
        sampled = await playing.episode.generate(
            token_ids,
            max_tokens=sampling.get("max_new_tokens"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
    except RequestRefused as refused:
        if "context_length_exceeded" not in str(refused):
            raise
        full = {"finish_reason": {"type": "length"}, "output_token_logprobs": [], "completion_tokens": 0}
        return {"text": "", "meta_info": full}
    ids = sampled.token_ids.tolist()
    playing.num_sampled += len(ids)
    text = tokenizer.decode(ids, skip_special_tokens=bool(sampling.get("skip_special_tokens", False)))
    if prompt is None:
        playing.texts[payload["text"] + text] = [*token_ids, *ids]
    meta = {
        "finish_reason": {"type": sampled.finish_reason},
        "output_token_logprobs": [
            [logprob, token, None] for logprob, token in zip(sampled.logprobs.tolist(), ids, strict=True)
        ],
        "prompt_tokens": len(token_ids),
        "completion_tokens": len(ids),
        "cached_tokens": sampled.num_cached_tokens,
        "weight_version": str(int(np.max(sampled.policy_versions))),
    }
    return {"text": text, "meta_info": meta}


def _ids_of(playing: Playing, text: str) -> list[int]:
    """The tokens of a text: what was sampled stays as it was, and only what stands behind it is tokenised."""
    known = max((old for old in playing.texts if text.startswith(old)), key=len, default="")
    rest = playing.episode.tokenizer(text[len(known) :], add_special_tokens=False)["input_ids"]
    return [*playing.texts.get(known, ()), *rest]


class GenerateState:
    """The state of generation that hooks ask for a tokenizer, and for how to sample."""

    def __init__(self, args: Any) -> None:
        self.args = args
        self.processor = None
        self.sampling_params = sampling_params(args)

    @property
    def tokenizer(self) -> Any:
        return _PLAYING.get().episode.tokenizer


def sampling_params(args: Any) -> dict[str, Any]:
    """How slime would sample. The number of tokens and the stop texts count; all else is for the recipe to say."""
    return {
        "temperature": args.rollout_temperature,
        "top_p": args.rollout_top_p,
        "top_k": args.rollout_top_k,
        "max_new_tokens": args.rollout_max_response_len or 1 << 20,
        "stop": None,
        "stop_token_ids": None,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "spaces_between_special_tokens": False,
    }


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:
    """The address of the engines; there is one model."""
    del args, model_name
    return f"http://{ENGINE_HOST}:80{endpoint}"


def load_function(path: str) -> Any:
    """The function of a dotted path."""
    module, _, name = path.rpartition(".")
    return load_object(f"{module}:{name}")


class SingletonMeta(type):
    """Classes with one object each."""

    _instances: dict[type, Any] = {}  # noqa: RUF012

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls not in SingletonMeta._instances:
            SingletonMeta._instances[cls] = super().__call__(*args, **kwargs)
        return SingletonMeta._instances[cls]


@dataclass
class DynamicFilterOutput:
    """What a dynamic filter says of a group."""

    keep: bool
    reason: str | None = None
    keep_when_insufficient: bool = False


def check_reward_nonzero_std(args: Any, samples: Sequence[Any], **kwargs: Any) -> DynamicFilterOutput:
    """Whether the rewards of a group differ."""
    del kwargs
    rewards = [float(sample.get_reward_value(args)) for sample in samples]
    keep = len(rewards) > 1 and float(np.std(rewards, ddof=1)) > 1e-6
    return DynamicFilterOutput(keep=keep, reason=None if keep else f"zero_std_{round(rewards[0], 1)}")


def grade(rule: str, response: str, label: Any) -> float:
    """What one of our rules says of a text."""
    task = Task.from_prompt("graded", "", label=label)
    message = AssistantMessage(content=response)
    view = EpisodeView(task=task, message=message, messages=(*task.messages, message.to_message()))
    return as_score(make_rule(rule)(view)).value


def compute_score(
    solution_str: str, ground_truth: Any, strict_box_verify: bool = False, pause_tokens_index: Any = None
) -> dict[str, Any]:
    """As DAPO's: 1 for a right answer and -1 for any other."""
    del strict_box_verify, pause_tokens_index
    is_right = grade("math", solution_str[-300:], str(ground_truth)) > 0
    return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": _boxed(solution_str)}


def _boxed(text: str) -> str | None:
    return extract(text, box_only=True)


async def async_rm(args: Any, sample: Any, **kwargs: Any) -> Any:
    """The reward of one sample, by `args.custom_rm_path` or `args.rm_type`."""
    path = sample.custom_rm_path or args.custom_rm_path
    if path is not None:
        return await load_function(path)(args, sample, **kwargs)
    kind = (sample.metadata or {}).get("rm_type") or args.rm_type or ""
    if kind == "dapo":
        return compute_score(sample.response, sample.label)
    if kind not in RULES:
        raise NotImplementedError(f"there is no rule {kind!r} here")
    return grade(RULES[kind], sample.response, sample.label)


async def batched_async_rm(args: Any, samples: Sequence[Any], **kwargs: Any) -> list[Any]:
    """The rewards of several samples."""
    return [await async_rm(args, sample, **kwargs) for sample in samples]


def _tokenizer(path: str, **options: Any) -> Any:
    del options
    return load_tokenizer(Path(path))


ALWAYS_OURS: Mapping[str, Mapping[str, Any]] = {
    "slime.utils.types": {"Sample": Sample},
    "slime.utils.http_utils": {"post": post},
    "slime.rollout.sglang_rollout": {"GenerateState": GenerateState, "get_model_url": get_model_url},
}
"""They reach into a run of slime's."""
WHERE_NOT_THERE: Mapping[str, Mapping[str, Any]] = {
    "slime.utils.misc": {"load_function": load_function, "SingletonMeta": SingletonMeta},
    "slime.utils.processing_utils": {"load_tokenizer": _tokenizer},
    "slime.rollout.filter_hub.base_types": {"DynamicFilterOutput": DynamicFilterOutput},
    "slime.rollout.filter_hub.dynamic_sampling_filters": {
        "check_reward_nonzero_std": check_reward_nonzero_std
    },
    "slime.rollout.rm_hub": {
        "async_rm": async_rm,
        "batched_async_rm": batched_async_rm,
        "grade_answer_verl": functools.partial(grade, "math"),
        "extract_boxed_answer": _boxed,
    },
    "slime.rollout.rm_hub.math_dapo_utils": {"compute_score": compute_score},
    "slime.rollout.rm_hub.math_utils": {
        "extract_answer": _boxed,
        "grade_answer_verl": functools.partial(grade, "math"),
    },
    "slime.rollout.rm_hub.deepscaler": {"get_deepscaler_rule_based_reward": functools.partial(grade, "math")},
    "slime.rollout.rm_hub.f1": {"f1_score": lambda response, label: (grade("f1", response, label),)},
}
"""What is a function of its arguments alone: slime's own is as good, where it can be imported."""


def provide(python_path: Sequence[str] = ()) -> None:
    """Let hooks be imported: from these folders, as in the `PYTHONPATH` of their script, and with what they import."""
    for folder in reversed(python_path):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    for name, contents in ALWAYS_OURS.items():
        _put(name, contents)
    for name, contents in WHERE_NOT_THERE.items():
        if not _is_there(name):
            _put(name, contents)


def _put(name: str, contents: Mapping[str, Callable[..., Any] | Any]) -> None:
    package, _, leaf = name.rpartition(".")
    if package and not _is_there(package):
        _put(package, {})
    module = sys.modules.get(name)
    if module is None or name in ALWAYS_OURS:
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
    vars(module).update(contents)
    if package:
        setattr(importlib.import_module(package), leaf, module)


def _is_there(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
