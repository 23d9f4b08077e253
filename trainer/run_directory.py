"""The run directory: everything that a run leaves behind, and what it needs to go on.

config.yaml                     the resolved config
metrics.jsonl                   one line per step
tensorboard/                    the same, as TensorBoard events
trajectories/step_000001.parquet
journal/                        episodes of the step under way
evaluation/                     trajectories of the held-out evaluations
checkpoints/step_000001/        one file per rank, trainer.json with their checksums, and state.json
engine_model/                   with weights synced in FP8: what the engines are started from
policy/                         the final policy as a Hugging Face directory
logs/                           engines and router
summary.json                    how it went
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from polyturn.configs.schema import RunConfig
from polyturn.trainer.megatron.checkpoints.manifest import read_sealed, sync_directory, write_sealed

STEP_NAME = re.compile(r"step_(\d+)$")
STATE = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a checkpoint says beside the weights. The presence of this file makes a checkpoint complete."""

    step: int
    """Finished steps."""
    policy_version: int
    """Finished weight updates."""
    prompt_position: int
    """Prompts taken from the task source so far."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by part, over all sessions of the run."""
    maxima: Mapping[str, float] = field(default_factory=dict)
    """The largest value of each in-run check so far."""
    heldout_before: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Make the directory of a new run. Raises `ValueError` when `run_dir` already holds a run."""
        if config.run_dir is not None:
            path = config.run_dir
            if (path / "config.yaml").exists():
                raise ValueError(
                    f"run_dir {path} already holds a run; set resume: true to go on with it, or name another"
                )
        else:
            stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
            path = config.output_dir / f"{config.name}-{stamp}"
            suffix = 1
            while path.exists():
                suffix += 1
                path = config.output_dir / f"{config.name}-{stamp}-{suffix}"
        path.mkdir(parents=True, exist_ok=True)
        return cls(path.resolve())

    @classmethod
    def to_resume(cls, config: RunConfig) -> RunDirectory:
        """The run that `resume: true` means: `run_dir`, or the newest of this name in `output_dir`.

        Raises `ValueError` when there is none.
        """
        if config.run_dir is not None:
            candidates = [config.run_dir]
        else:
            stamped = re.compile(re.escape(config.name) + r"-\d{8}-\d{6}(-\d+)?$")
            found = config.output_dir.iterdir() if config.output_dir.is_dir() else ()
            candidates = sorted((p for p in found if stamped.match(p.name)), reverse=True)
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
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

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
    def weights(self) -> Path:
        return self.path / "weights"

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

    def commit_checkpoint(self, state: RunState, *, keep_last: int) -> Path:
        """Complete the checkpoint that the ranks wrote, and drop the oldest beyond `keep_last`."""
        partial = self._partial_checkpoint(state.step)
        write_sealed(partial / STATE, asdict(state))
        target = self.checkpoints / f"step_{state.step:06d}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        sync_directory(self.checkpoints)
        for old in self._complete_checkpoints()[:-keep_last]:
            shutil.rmtree(old)
        return target

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
        return sorted(found)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
