"""Hooks with slime's signatures, called from where ours are: one class for each kind, named in a recipe.

    reward:        async def f(args, sample), or a class with compute_reward(prompts, responses)     -> Reward
                   async def f(args, samples)                                                        -> GroupReward
    generation:    async def f(args, sample, sampling_params), or f(args, samples, evaluation)       -> Generate
    filter:        def f(args, samples, **kwargs) -> bool or DynamicFilterOutput                     -> Filter
    buffer:        def f(args, rollout_id, buffer, num_samples) -> groups                            -> BufferOrder

`path` is what the script says: `package.module.name`, `file.py`, or `file.py:name`. `args` is what it sets.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polyturn.agents.agent_play import AgentEpisode
from polyturn.envs.messages import EpisodeView, Score
from polyturn.envs.plugins import load_module, load_object
from polyturn.rollout.groups import Group
from polyturn.rollout.order import GroupUnderWay
from polyturn.rollout.slime.samples import (
    Arguments,
    Sample,
    Status,
    sample_to_grade,
    sample_to_play,
    samples_of,
    score_of,
    status_of,
    with_parts,
)
from polyturn.rollout.slime.stand_ins import playing, provide, sampling_params

Hook = Callable[..., Any]
REWARD_METHOD = "compute_reward"


class _Adapter:
    """What all have in common: the hook, and `args`."""

    def __init__(
        self, path: str, args: Mapping[str, Any] | None = None, python_path: Sequence[str] = ()
    ) -> None:
        """
        Args:
            path: As the script names the hook.
            args: What the hook reads of `args`.
            python_path: Folders to import from, as in the script's `PYTHONPATH`.

        Raises:
            ValueError: the hook cannot be imported, or takes other arguments.
        """
        self._path = path
        self._given = dict(args or {})
        self._hook = load_hook(path, python_path)
        self._check()

    def _check(self) -> None:
        """Raise `ValueError` for a hook that cannot be called so."""

    @property
    def _args(self) -> Arguments:
        return Arguments(self._given)


class Reward(_Adapter):
    """A reward: `async def f(args, sample)`, or a class with `compute_reward(prompts, responses)`."""

    def _check(self) -> None:
        _check_call(self._hook, self._path, "args", "sample")

    async def __call__(self, episode: EpisodeView) -> Score:
        result = await _call(self._hook, self._args, sample_to_grade(episode))
        return score_of(result, self._args.reward_key, what=self._path)


class GroupReward(_Adapter):
    """A reward of a group (`--group-rm`): `async def f(args, samples)`."""

    def _check(self) -> None:
        _check_call(self._hook, self._path, "args", "samples")

    async def __call__(self, episodes: Sequence[EpisodeView]) -> list[Score]:
        results = await _call(self._hook, self._args, [sample_to_grade(episode) for episode in episodes])
        return [score_of(result, self._args.reward_key, what=self._path) for result in results]


def no_reward(episode: EpisodeView) -> float:
    """Where the group's reward is all that there is."""
    del episode
    return 0.0


class Filter(_Adapter):
    """A dynamic filter: `def f(args, samples, **kwargs)`, which says whether a group is trained on."""

    def _check(self) -> None:
        _check_call(self._hook, self._path, "args", "samples")

    def __call__(self, group: Group) -> str | None:
        args = self._args
        parts = [episode.reward_parts for episode in group.episodes]
        samples = [
            with_parts(sample, args.reward_key, named)
            for sample, named in zip(samples_of(group), parts, strict=True)
        ]
        said = self._hook(args, samples)
        if bool(getattr(said, "keep", said)):
            return None
        return str(getattr(said, "reason", None) or "filtered")


class BufferOrder(_Adapter):
    """A buffer filter: `def f(args, rollout_id, buffer, num_samples)` chooses among the groups that are complete.

    A sample in the buffer has `group_index`, and in its metadata `start_rollout_id`: 0 for a group of this step, -1 for
    one of the step before. As in slime, `rollout_id` is None.
    """

    def _check(self) -> None:
        _check_call(self._hook, self._path, "args", "rollout_id", "buffer", "num_samples")

    def __call__(self, groups: Sequence[GroupUnderWay], num_groups: int) -> list[int] | None:
        args = self._args
        buffer = [
            [
                Sample(
                    group_index=group.position,
                    index=index,
                    status=Status.COMPLETED,
                    metadata={"start_rollout_id": -group.age},
                )
                for index in range(args.n_samples_per_prompt)
            ]
            for group in groups
            if group.is_complete
        ]
        if len(buffer) < num_groups:
            return None
        chosen = [samples[0].group_index for samples in self._hook(args, None, buffer, num_groups)]
        return chosen[:num_groups] if len(chosen) >= num_groups else None


class Generate(_Adapter):
    """A generate function: `async def f(args, sample, sampling_params)`, or `f(args, samples, evaluation)`.

    It plays an episode. What it posts to the engines is sampled and recorded in the episode's session; the sample that
    it returns says what was answered, how it ended, and what it is worth where the hook says so.
    """

    def __init__(
        self,
        path: str,
        args: Mapping[str, Any] | None = None,
        python_path: Sequence[str] = (),
        reward: str | None = None,
    ) -> None:
        """`reward`: the script's `--custom-rm-path`, which is given the very sample that the function returns."""
        super().__init__(path, args, python_path)
        self._reward = None if reward is None else load_hook(reward, python_path)
        self._reward_path = reward or path

    def _check(self) -> None:
        names = list(inspect.signature(self._hook).parameters)
        self._takes_list = len(names) > 1 and names[1] == "samples"
        self._takes_evaluation = "evaluation" in names
        self._takes_sampling = not self._takes_list or "sampling_params" in names
        others = ["sampling_params"] if self._takes_sampling else []
        _check_call(self._hook, self._path, "args", names[1] if len(names) > 1 else "sample", *others)

    async def __call__(self, episode: AgentEpisode) -> str | None:
        args = self._args
        args.hf_checkpoint = getattr(episode.tokenizer, "name_or_path", None)
        sample: Any = sample_to_play(episode.task, _prompt(episode, args), episode.episode_id)
        with playing(episode) as now:
            sample = await self._play(args, sample)
            if sample.remove_sample:
                raise ValueError(f"{self._path}: remove_sample has no counterpart: raise an error instead")
            if status_of(sample) in ("aborted", "failed"):
                raise RuntimeError(f"{self._path} gave a sample that is {status_of(sample)}")
            if sample.reward is None and self._reward is not None:
                sample.reward = await _call(self._reward, args, sample)
        if sample.loss_mask is not None:
            episode.metrics["num_tokens_beside_mask"] = float(now.num_sampled - sum(sample.loss_mask))
        is_truncated = status_of(sample) == "truncated"
        if sample.reward is not None:
            score = score_of(sample.reward, args.reward_key, what=self._reward_path)
            episode.metrics.update({f"reward_{name}": part for name, part in score.parts.items()})
            episode.end(score.value, is_truncated=is_truncated)
            return None
        return _plain(sample.response, episode.tokenizer)

    async def _play(self, args: Arguments, sample: Sample) -> Any:
        given: list[Any] = [args, [sample] if self._takes_list else sample]
        if self._takes_sampling:
            given.append(sampling_params(args))
        named = {"evaluation": False} if self._takes_evaluation else {}
        played = await _call(self._hook, *given, **named)
        if played is None:
            played = sample
        if not isinstance(played, list | tuple):
            return played
        if len(played) != 1:
            raise ValueError(
                f"{self._path} gave {len(played)} samples of one: an episode has one reward here; agents that "
                "are rewarded apart are an environment of several agents (docs/multi_agent.md)"
            )
        return played[0]


def load_hook(path: str, python_path: Sequence[str] = ()) -> Hook:
    """The function that a script of slime names; of a class with `compute_reward` the function of (args, sample).

    Raises `ValueError` where there is none.
    """
    provide(python_path)
    if path.endswith(".py"):
        found = _class_in(path)
    elif ".py:" in path:
        found = load_object(path)
    else:
        module, _, name = path.replace(":", ".").rpartition(".")
        found = load_object(f"{module}:{name}")
    if inspect.isclass(found):
        return _reward_of(found, path)
    if not callable(found):
        raise ValueError(f"{path} is of type {type(found).__name__}, and cannot be called")
    return found  # type: ignore[no-any-return]


def _class_in(path: str) -> type:
    """The one class of a file that has the method of a reward."""
    module = load_module(path)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and hasattr(value, REWARD_METHOD)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{path} has {len(found)} classes with {REWARD_METHOD}(prompts, responses): write {path}:name"
        )
    return found[0]


def _reward_of(made: type, path: str) -> Hook:
    """The reward of one sample, by a class that grades lists of prompts and responses."""
    method = getattr(made, REWARD_METHOD, None)
    if method is None:
        raise ValueError(f"{path} is a class without {REWARD_METHOD}(prompts, responses)")
    _check_call(method, f"{path}.{REWARD_METHOD}", "self", "prompts", "responses")
    takes_args = len(inspect.signature(made).parameters) > 0
    graders: list[Any] = []

    async def reward(args: Arguments, sample: Any) -> Any:
        if not graders:
            graders.append(made(args) if takes_args else made())
        (result,) = await _call(graders[0].compute_reward, [sample.prompt], [sample.response])
        return result

    return reward


async def _call(hook: Hook, *args: Any, **named: Any) -> Any:
    """What a hook returns; one that is not async runs in a thread, and holds up no other episode."""
    if inspect.iscoroutinefunction(hook):
        return await hook(*args, **named)
    result = await asyncio.to_thread(hook, *args, **named)
    return await result if inspect.isawaitable(result) else result


def _check_call(hook: Hook, path: str, *names: str) -> None:
    """Raise `ValueError` unless the hook takes so many arguments in this order."""
    try:
        inspect.signature(hook).bind(*names)
    except TypeError as error:
        raise ValueError(
            f"{path}{inspect.signature(hook)} cannot be called with ({', '.join(names)}): {error}"
        ) from error


def _prompt(episode: AgentEpisode, args: Arguments) -> str | list[dict[str, Any]]:
    """The prompt as slime would have it: rendered with `--apply-chat-template`, else what the data says."""
    messages = [dict(message) for message in episode.messages]
    if args.apply_chat_template:
        rendered: str = episode.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **args.apply_chat_template_kwargs
        )
        return rendered
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return messages


def _plain(text: str, tokenizer: Any) -> str:
    """A response without the marks that end its turns."""
    for mark in tokenizer.all_special_tokens:
        text = text.replace(mark, "")
    return text.strip()
