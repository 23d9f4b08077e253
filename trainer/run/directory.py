"""The run directory: everything that a run leaves behind, and what it needs to go on.

config.yaml                     the resolved config
identity.json                   what the run is of, for a resume to compare with
metrics.jsonl                   one line per step
tensorboard/, wandb/, sinks/    the same for dashboards, as `metrics.sinks` says
timeline/, profile/             traces, where the config asks for them
trajectories/step_000001.parquet
token_credit/                   what each step made of its tokens, where logging.token_credit is on
journal/                        episodes of the step under way, and of those that no checkpoint has yet
failed/                         attempts that failed, by step, for people to look at
draws.jsonl                     with a curriculum that draws by results: what it has drawn
set_aside/                      episodes of steps that failed a check, and were or will be played anew
evaluation/                     trajectories of the held-out evaluations, and results.jsonl with those between steps
checkpoints/step_000001/        one file per rank, trainer.json with their checksums, and state.json
best.json                       which of them is the best, where the config says by which metric
engine_model/                   where the model is in FP8 and its weights are synced otherwise, or the
                                other way round: what the engines are started from
evaluated/                      with evaluation.engines, while the run goes on: the policy that they load
policy/                         the final policy as a Hugging Face directory
rollout.json                    of one that only plays: where it stands
logs/                           engines and router
summary.json                    how it went
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from polyturn.configs.loading.loader import dump_config, load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.whole_file import sync_directory, whole_file
from polyturn.trainer.checkpoints.manifest import read_sealed, write_sealed

STEP_NAME = re.compile(r"step_(\d+)$")
RUN_NAME = re.compile(r"(?P<name>.*)-(?P<stamp>\d{8}-\d{6})(-(?P<number>\d+))?$")
STATE = "state.json"
LEFT_BY_A_RUN = (
    "identity.json",
    "metrics.jsonl",
    "trajectories",
    "journal",
    "checkpoints",
    "best.json",
    "evaluation",
    "policy",
    "summary.json",
)
"""What only a run can have left in a directory, whether or not its config.yaml is still there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a checkpoint says beside the weights. The presence of this file makes a checkpoint complete."""

    step: int
    """Finished steps."""
    policy_version: int
    """Finished weight updates."""
    prompt_position: int
    """All prompts before this one are done with: trained on, filtered or dropped."""
    prompts_ahead: tuple[int, ...] = ()
    """Positions behind it that are done with, too."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase, over all sessions of the run."""
    maxima: Mapping[str, float] = field(default_factory=dict)
    """The largest value of each in-run check so far."""
    curriculum: Mapping[str, Any] | None = None
    """The state of a curriculum that draws by results."""
    heldout_before: Mapping[str, Any] | None = None
    suites_before: Mapping[str, Any] = field(default_factory=dict)
    """The same of `evaluation.suites`, by name."""
    stopped_by: Mapping[str, Any] | None = None
    """The section `trainer.stop_at` that has ended the run before its last step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts_ahead", tuple(self.prompts_ahead))


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedStep:
    """A step that ended the run because of what was played in it."""

    step: int
    count: int
    """How many sessions in a row."""
    sentence: str
    checks: Mapping[str, Any]
    """The config's section then."""

    @classmethod
    def read(cls, path: Path) -> FailedStep | None:
        """What the run directory says; None where it says nothing that can be read."""
        try:
            found = cls(**orjson.loads(path.read_bytes()))
        except (OSError, orjson.JSONDecodeError, TypeError):
            return None
        return found if isinstance(found.step, int) and isinstance(found.count, int) else None


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Make the directory of a new run. Raises `ValueError` when `run_dir` already holds a run."""
        if config.run_dir is not None:
            path = config.run_dir
            check_unused(path)
        else:
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            path = config.output_dir / f"{config.name}-{stamp}"
            suffix = 1
            while path.exists():
                suffix += 1
                path = config.output_dir / f"{config.name}-{stamp}-{suffix}"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run_dir: {path} cannot be made: {error.strerror}; name a directory that can be written to"
            ) from error
        return cls(path.resolve())

    @classmethod
    def to_resume(cls, config: RunConfig) -> RunDirectory:
        """The run that `resume: true` means: `run_dir`, or the newest of this name in `output_dir`.

        Raises `ValueError` when there is none.
        """
        if config.run_dir is not None:
            candidates = [config.run_dir]
        else:
            candidates = runs_of(config.name, config.output_dir)
        for path in candidates:
            if (path / "config.yaml").exists():
                return cls(path.resolve())
        where = config.run_dir or config.output_dir
        raise ValueError(
            f"resume: true, but there is no run of {config.name!r} in {where}; start it without resume"
        )

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def identity(self) -> Path:
        return self.path / "identity.json"

    @property
    def failure(self) -> Path:
        return self.path / "failed_check.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def best(self) -> Path:
        return self.path / "best.json"

    @property
    def rollout(self) -> Path:
        return self.path / "rollout.json"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def evaluated(self) -> Path:
        return self.path / "evaluated" / "policy"

    @property
    def engine_model(self) -> Path:
        return self.path / "engine_model"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def begin_checkpoint(self, step: int) -> Path:
        """Where the ranks write a checkpoint before it is complete; what a crash left of others goes."""
        for left in self.checkpoints.glob("step_*.partial"):
            shutil.rmtree(left)
        return self._partial_checkpoint(step)

    def _partial_checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}.partial"

    def commit_checkpoint(self, state: RunState, *, keep_last: int, kept: Set[int] = frozenset()) -> Path:
        """Complete the checkpoint that the ranks wrote, and drop those beyond `keep_last`, but for steps `kept`."""
        partial = self._partial_checkpoint(state.step)
        write_sealed(partial / STATE, asdict(state))
        target = self.checkpoints / f"step_{state.step:06d}"
        if target.exists():
            # Out of the way in one step, so that a crash leaves one of the two under its name or as this.
            old = target.with_name(f"{target.name}.old.partial")
            os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
        sync_directory(self.checkpoints)
        for old in self._complete_checkpoints()[:-keep_last]:
            if _step_of(old) not in kept:
                shutil.rmtree(old)
        return target

    def complete_steps(self) -> list[int]:
        """The steps that have a complete checkpoint, in order."""
        return [_step_of(path) for path in self._complete_checkpoints()]

    def record(self, config: RunConfig, identity: Mapping[str, Any]) -> None:
        """Write what the run is of, for people as `config.yaml` and for a resume to compare with."""
        write_json(self.identity, identity)
        with whole_file(self.config) as file:
            file.write(dump_config(config.model_copy(update={"run_dir": self.path})).encode())

    def recorded(self) -> dict[str, Any]:
        """What the run is of, as `record` wrote it; of a run of an earlier release its config alone.

        Raises:
            ValueError: neither file can be read.
        """
        if not self.identity.exists():
            return {"config": load_config(self.config).model_dump(mode="json")}
        try:
            found = json.loads(self.identity.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.identity} cannot be read ({error}); delete it to resume by {self.config.name} alone"
            ) from error
        if not isinstance(found, dict) or not all(
            isinstance(found.get(name, {}), dict) for name in ("config", "versions")
        ):
            raise ValueError(
                f"{self.identity} does not hold what a run is of; delete it to resume by {self.config.name} alone"
            )
        return found

    def sound_checkpoint(
        self, find_faults: Callable[[Path], Sequence[str]], warn: Callable[[str], None]
    ) -> tuple[Path, RunState] | None:
        """The newest checkpoint that nothing is wrong with, and its state; None when there is none at all.

        Args:
            find_faults: what is wrong with the ranks' files of a checkpoint.
            warn: is told of each checkpoint that is passed over, why, and what is used instead.

        Raises:
            ValueError: there are checkpoints, but not a sound one: to begin anew is for the user to decide.
        """
        passed_over: list[tuple[Path, str]] = []
        for path in reversed(self._complete_checkpoints()):
            try:
                state = RunState(**read_sealed(path / STATE))
                faults = find_faults(path)
            except ValueError as error:
                faults = [str(error)]
            if not faults:
                for damaged, fault in passed_over:
                    warn(f"the checkpoint {damaged} cannot be used: {fault}; going on from {path} instead")
                return path, state
            passed_over.append((path, faults[0]))
        if passed_over:
            raise ValueError(
                f"none of the checkpoints in {self.checkpoints} can be used: "
                f"{'; '.join(fault for _, fault in passed_over)}. Delete them to begin anew"
            )
        return None

    def _complete_checkpoints(self) -> list[Path]:
        if not self.checkpoints.is_dir():
            return []
        found = (p for p in self.checkpoints.iterdir() if STEP_NAME.match(p.name) and (p / STATE).exists())
        return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def runs_of(name: str, output_dir: Path) -> list[Path]:
    """The run directories of that name, the newest first: by their stamps, and of one second by their numbers."""

    def age(path: Path) -> tuple[str, int]:
        found = RUN_NAME.match(path.name)
        assert found is not None
        return found["stamp"], int(found["number"] or 1)

    found = output_dir.iterdir() if output_dir.is_dir() else ()
    of_name = [path for path in found if (match := RUN_NAME.match(path.name)) and match["name"] == name]
    return sorted(of_name, key=age, reverse=True)


def check_unused(path: Path) -> None:
    """Raise `ValueError` where a directory that a new run is to be made in holds one, or what one left."""
    if (path / "config.yaml").exists():
        raise ValueError(
            f"run_dir: {path} already holds a run; set resume=true to go on with it, or name another directory"
        )
    left = [name for name in LEFT_BY_A_RUN if (path / name).exists()]
    if left:
        raise ValueError(
            f"run_dir: {path} holds {left[0]} of a run whose config.yaml is gone: a new run would take over its "
            "episodes; name another directory, or delete what is in this one"
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    with whole_file(path) as file:
        # The standard library takes numbers of any size, which a user's options may hold.
        file.write(json.dumps(value, indent=2, sort_keys=True).encode())
