"""What an evaluation, a run of training or a file of trajectories holds, one episode after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polyturn.agents.episode import BEST_OF_SAMPLES, Episode, Outcome
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading import yaml_tree
from polyturn.configs.models import resolve_model_path
from polyturn.envs.messages import Message
from polyturn.envs.registry import make
from polyturn.rollout.evaluation.directory import entry_directory, is_evaluation, read_evaluation, read_plan
from polyturn.rollout.evaluation.records import EvaluatedEntry, Failure, ScoredEpisode
from polyturn.rollout.store import TrajectoryStore, stream_sound_episodes
from polyturn.tools.secrets import blank_credentials

RUN_CONFIG = "config.yaml"
Tools = tuple[Mapping[str, Any], ...]
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEpisode:
    """One episode, with what is known of it beside its trajectory."""

    episode: Episode
    """Its messages, task id and error without credentials; without segments where a text of it held one, because they
    would still spell it."""
    tools: Tools
    """What the policy was told of, as the environment says today; empty where that cannot be had."""
    score: float | None
    """None: it has none, and that is never a 0."""
    failure: Failure
    held_credential: bool
    entry: str = ""
    """Of the suite; empty in a run of training."""
    task_index: int | None = None
    sample: int | None = None
    answer: str | None = None
    step: int | None = None
    """Of the run of training."""

    @property
    def is_truncated(self) -> bool:
        """Whether a limit ended it."""
        return self.episode.outcome is Outcome.TRUNCATED

    @property
    def is_of_several(self) -> bool:
        """Whether several agents wrote in it, so that its messages are no one conversation."""
        roles = {segment.role for segment in self.episode.segments} | {
            record.role for record in self.episode.turn_records
        }
        return bool(roles - {""})

    @property
    def is_chosen(self) -> bool:
        """Whether it, or its messages, are the best of several samples."""
        return BEST_OF_SAMPLES in self.episode.metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPart:
    """Episodes that were played alike: an entry of a suite, or a run of training."""

    name: str
    environment: str
    """The id; of a mixture the first."""
    split: str
    policy: str
    """Who played, for people."""
    model_path: Path | None
    """The directory whose tokenizer made the tokens, if it is there."""
    template: Path | None
    """The chat template in place of that directory's own."""
    success_score: float
    created: str
    """When it was begun, as ISO 8601 has it; empty: nobody knows."""
    stream: Callable[[], Iterator[StoredEpisode]]


def open_stored(source: Path, tell: Tell) -> list[StoredPart]:
    """The parts of what was stored.

    Args:
        source: The directory of an evaluation or of a run, or a Parquet file of a step.
        tell: Hears, while episodes are read, of damage and of what could not be found out.

    Raises:
        ConfigError: it is none of these.
    """
    if source.is_file():
        return [_file(source, tell)]
    if is_evaluation(source):
        return _entries(source, tell)
    if (source / RUN_CONFIG).is_file() and (source / "trajectories").is_dir():
        return [_run(source, tell)]
    if not source.exists():
        raise ConfigError(f"{source} is not there")
    raise ConfigError(
        f"{source} is neither an evaluation (evaluation.yaml) nor a run with finished steps ({RUN_CONFIG} and "
        "trajectories/), nor a Parquet file of a step"
    )


class _ToolsOf:
    """The tools of environments, by their ids, as they describe them today."""

    def __init__(self, config: Mapping[str, Any], tell: Tell) -> None:
        environment = config.get("environment") or {}
        self._options = {environment.get("id"): environment.get("options") or {}}
        self._tell = tell
        self._known: dict[str, Tools] = {}

    def __call__(self, env_id: str) -> Tools:
        if env_id not in self._known:
            self._known[env_id] = self._ask(env_id)
        return self._known[env_id]

    def _ask(self, env_id: str) -> Tools:
        try:
            env = make(env_id, **self._options.get(env_id, {}))
        except Exception as fault:  # noqa: BLE001  an environment is anybody's code, and may want what is not here
            self._tell(f"{env_id} cannot be made here, so that its tools are left out: {fault}")
            return ()
        try:
            return tuple(spec.to_openai() for spec in env.tools)
        finally:
            env.close()


def _entries(directory: Path, tell: Tell) -> list[StoredPart]:
    try:
        plan, evaluation = read_plan(directory), read_evaluation(directory)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parts = []
    for planned, entry in zip(plan.entries, evaluation.entries, strict=True):
        tools = _ToolsOf(planned.config, tell)
        parts.append(
            StoredPart(
                name=entry.name,
                environment=entry.environment,
                split=entry.split,
                policy=evaluation.policy,
                model_path=_directory_of(plan.player.model),
                template=_template_of(planned.config),
                success_score=entry.success_score,
                created=plan.created,
                stream=_EntryStream(directory, entry, tools, tell),
            )
        )
    return parts


@dataclass(frozen=True, slots=True)
class _EntryStream:
    """The episodes of an entry that hold, in the order in which they are stored."""

    directory: Path
    entry: EvaluatedEntry
    tools: _ToolsOf
    tell: Tell

    def __call__(self) -> Iterator[StoredEpisode]:
        awaited = {scored.episode_id: scored for scored in self.entry.episodes}
        store = TrajectoryStore(entry_directory(self.directory, self.entry.name))
        try:
            for step in store.begun_after(-1):
                for episode in store.stream(step, self.tell):
                    scored = awaited.pop(episode.episode_id, None)
                    if scored is not None:
                        yield _scored(episode, scored, self.tools)
        finally:
            store.close()
        if awaited:
            self.tell(
                f"{self.entry.name}: {len(awaited):,} episodes have a line and no trajectory, and are left out"
            )


def _scored(episode: Episode, scored: ScoredEpisode, tools: _ToolsOf) -> StoredEpisode:
    clean, held = without_credentials(episode)
    return StoredEpisode(
        episode=clean,
        tools=tools(episode.env_id),
        score=scored.score,
        failure=scored.failure,
        held_credential=held,
        entry=scored.entry,
        task_index=scored.task_index,
        sample=scored.sample,
        answer=_blanked(scored.answer),
    )


def _run(directory: Path, tell: Tell) -> StoredPart:
    config = yaml_tree.read_file(directory / RUN_CONFIG).plain()
    environment, model = config.get("environment") or {}, config.get("model") or {}
    store = TrajectoryStore(directory)
    steps = [(step, store.path(step)) for step in store.steps()]
    store.close()
    return StoredPart(
        name=str(config.get("name", directory.name)),
        environment=str(environment.get("id", "")),
        split=str(environment.get("train_split", "train")),
        policy=str(model.get("path", "model")),
        model_path=_directory_of(model.get("path")),
        template=_template_of(config),
        success_score=1.0,
        created="",
        stream=_FileStream(steps, _ToolsOf(config, tell), tell),
    )


def _file(path: Path, tell: Tell) -> StoredPart:
    return StoredPart(
        name=path.stem,
        environment="",
        split="",
        policy="unknown",
        model_path=None,
        template=None,
        success_score=1.0,
        created="",
        stream=_FileStream([(None, path)], _ToolsOf({}, tell), tell),
    )


@dataclass(frozen=True, slots=True)
class _FileStream:
    """The episodes of columnar files, each with the step that it is of."""

    files: Sequence[tuple[int | None, Path]]
    tools: _ToolsOf
    tell: Tell

    def __call__(self) -> Iterator[StoredEpisode]:
        for step, path in self.files:
            try:
                for episode in stream_sound_episodes(path, self.tell):
                    clean, held = without_credentials(episode)
                    yield StoredEpisode(
                        episode=clean,
                        tools=self.tools(episode.env_id),
                        score=episode.reward,
                        failure=Failure.NONE if episode.reward is not None else Failure.INFRASTRUCTURE,
                        held_credential=held,
                        answer=clean.answer,
                        step=step,
                    )
            except ValueError as error:
                raise ConfigError(f"{path}: {error}") from error


def without_credentials(episode: Episode) -> tuple[Episode, bool]:
    """The episode with what looks like a credential blanked in its texts, and whether any of them held one.

    Its tokens spell what its messages say, so that they go where a message changed.
    """
    messages = tuple(_blanked(message) for message in episode.messages)
    held = any(new is not old for new, old in zip(messages, episode.messages, strict=True))
    clean = replace(
        episode,
        messages=with_unique_calls(messages),
        segments=() if held else episode.segments,
        error=_blanked(episode.error),
        answer=_blanked(episode.answer),
    )
    return clean, held


def with_unique_calls(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with calls that have ids of their own in the whole conversation, as other programs expect.

    Dialects number the calls of each turn from 0. Where an id comes again, all calls are numbered through, and results
    follow the call of the turn before them.
    """
    ids = [call.get("id") for message in messages for call in message.get("tool_calls", ())]
    if len(set(ids)) == len(ids):
        return tuple(messages)
    numbers = itertools.count()
    renamed: list[Message] = []
    of_turn: dict[Any, str] = {}
    for message in messages:
        if calls := message.get("tool_calls"):
            new = [f"call_{next(numbers)}" for _ in calls]
            of_turn = dict(zip((call.get("id") for call in calls), new, strict=True))
            numbered = [{**call, "id": name} for call, name in zip(calls, new, strict=True)]
            renamed.append({**message, "tool_calls": numbered})
        elif (known := of_turn.get(message.get("tool_call_id"))) is not None:
            renamed.append({**message, "tool_call_id": known})
        else:
            renamed.append(message)
    return tuple(renamed)


def _blanked(value: Any) -> Any:
    """A JSON value without credentials; the very same where it holds none."""
    if isinstance(value, str):
        blanked = blank_credentials(value)
        return value if blanked == value else blanked
    if isinstance(value, Mapping):
        items = {key: _blanked(item) for key, item in value.items()}
        return items if any(items[key] is not value[key] for key in items) else value
    if isinstance(value, list):
        found = [_blanked(item) for item in value]
        return found if any(new is not old for new, old in zip(found, value, strict=True)) else value
    return value


def _directory_of(model: object) -> Path | None:
    """The model's directory, if that is what was named and it is here."""
    if not isinstance(model, str):
        return None
    try:
        return resolve_model_path(model, needs_weights=False)
    except ConfigError:
        return None


def _template_of(config: Mapping[str, Any]) -> Path | None:
    named = (config.get("model") or {}).get("template")
    return Path(named) if named else None


def question_of(messages: Sequence[Message]) -> list[Message]:
    """What stands before the first message of the policy."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            return list(messages[:place])
    return list(messages)
