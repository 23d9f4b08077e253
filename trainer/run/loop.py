"""The training loop: episodes, updates, weight sync, checkpoint; step after step.

A step is finished when its checkpoint is complete. What was generated in an unfinished step stands in the journal, and
a resumed run plays only what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from polyturn.agents.chat import read_template
from polyturn.agents.episode import Episode
from polyturn.configs.errors import Interrupted
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.engines.keeper import EngineKeeper
from polyturn.rollout.groups import Group, journal_of
from polyturn.rollout.scheduler import Frontier, StepGroups
from polyturn.rollout.source import RolloutStart, StepSource
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.token_credit import token_credit_path
from polyturn.tools.interruption import InterruptGuard
from polyturn.trainer.credit.estimates import StepCredit, assign_credit, make_samples
from polyturn.trainer.credit.off_policy import largest_logprob_difference
from polyturn.trainer.data.balance import cut_into_updates
from polyturn.trainer.data.samples import UpdateReport
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.alarms import LONGEST_PAUSE, AlarmMonitor, StallWatch
from polyturn.trainer.run.best import reached
from polyturn.trainer.run.checks import CheckFailure, RunChecks
from polyturn.trainer.run.directory import RunDirectory, RunState, write_json
from polyturn.trainer.run.evaluation_engines import EvaluationEngines
from polyturn.trainer.run.failures import StepFailure, sentence_of
from polyturn.trainer.run.health import HealthMonitor
from polyturn.trainer.run.heldout import HeldOut, Results
from polyturn.trainer.run.heldout_loss import HeldOutLoss
from polyturn.trainer.run.metrics import step_metrics
from polyturn.trainer.run.progress import HELDOUT_LOSS, ProgressDisplay
from polyturn.trainer.run.resume import forget_failure, installed_versions, note_failure
from polyturn.trainer.run.served_weights import ServedWeights
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.run.supervised import figures_of_supervised
from polyturn.trainer.run.timeline import Timeline
from polyturn.trainer.run.token_credit import keep_token_credit
from polyturn.trainer.run.turns import Turns
from polyturn.trainer.sinks.factory import RunSinks
from polyturn.trainer.sinks.json_lines import JsonLinesSink, finite_rows
from polyturn.trainer.sinks.protocol import SinkStart


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """What a run consists of, once everything is up."""

    config: RunConfig
    directory: RunDirectory
    trainer: Trainer
    keeper: EngineKeeper | None
    """Of the policy's engines; None where the steps are replayed."""
    turns: Turns | None
    """Where engines and trainer share GPUs."""
    worker: StepSource
    evaluation: EvaluationEngines | None
    """Of the engines that are for evaluations alone."""
    progress: ProgressDisplay
    guard: InterruptGuard
    stopwatch: Stopwatch


class TrainingLoop:
    """The steps of one run, from the state of its newest checkpoint to the end, with the evaluations around them."""

    def __init__(self, parts: RunParts, state: RunState, *, num_restarts: int = 0) -> None:
        """Rows of metrics beyond the state are dropped. `num_restarts`: of the trainer, in this session."""
        config, directory = parts.config, parts.directory
        self._config = config
        self._directory = directory
        self._trainer = parts.trainer
        self._worker = parts.worker
        self._progress = parts.progress
        self._guard = parts.guard
        self._stopwatch = parts.stopwatch
        file = JsonLinesSink(directory.metrics, last_step=state.step)
        start = SinkStart(
            run_dir=directory.path,
            config=config.model_dump(mode="json"),
            last_step=state.step,
            history=partial(finite_rows, directory.metrics, last_step=state.step),
            tell=self._progress.message,
        )
        self._sinks = RunSinks(config.metrics, start, file)
        self._timeline = Timeline(config.metrics.timeline, directory.timeline, self._progress.message)
        self._stopwatch.on_span = self._timeline.phase
        self._store = TrajectoryStore(directory.path)
        self._checks = RunChecks(config.checks, maxima=state.maxima)
        frontier = Frontier(position=state.prompt_position, ahead=tuple(state.prompts_ahead))
        self._worker.begin(
            RolloutStart(
                step=state.step,
                version=state.policy_version,
                frontier=frontier,
                curriculum=state.curriculum,
            ),
            self._store,
        )
        self._alarms = AlarmMonitor(config.alarms, self._progress.message)
        self._health = HealthMonitor(config.alarms)
        self._evaluation = parts.evaluation
        self._heldout = HeldOut(
            config,
            worker=parts.evaluation or parts.worker,
            directory=directory,
            progress=self._progress,
            stopwatch=self._stopwatch,
        )
        self._served = ServedWeights(
            config,
            keeper=parts.keeper,
            turns=parts.turns,
            trainer=self._trainer,
            worker=self._worker,
            heldout=self._heldout,
            checks=self._checks,
            progress=self._progress,
            step=state.step,
            version=state.policy_version,
        )
        self._heldout_loss = HeldOutLoss(config, parts.trainer, parts.worker)
        self._keeper = parts.keeper
        self._heldout.meanwhile = self._served.tend
        self._saving: RunState | None = None
        self._num_restarts = num_restarts
        self._snapshot_of: int | None = None
        """The step whose state is being written, before it is known what else of it is to be kept."""
        self._state = state

    def run(self) -> None:
        """Evaluate, train, evaluate, save.

        Raises:
            Interrupted: the guard asked to stop; what is finished is saved.
            StepFailure: what was played in a step cannot be trained on, or a check failed. Its episodes are set aside.
        """
        config = self._config.evaluation
        if self._config.shares_gpus and config.before and self._state.heldout_before is None:
            self._snapshot(self._state.step, self._stopwatch)
        self._served.begin(self._stopwatch)
        if config.before and self._state.heldout_before is None:
            before = self._evaluate_all("before")
            if before is not None:
                others = {name: found for name, found in before.items() if name}
                self._state = replace(self._state, heldout_before=before[""], suites_before=others)
                self._save()
        self._measure_before()
        try:
            self._take_steps()
        finally:
            # Whatever ended the steps, what they saved is to be complete.
            self._complete_checkpoint(wait=True)
        self._stop_if_asked()
        self._heldout.wait()
        self._heldout.tell(self._state.step)
        after = None
        if config.after:
            after = self._evaluate_all("after")
        with self._served.trainer_at_work(self._stopwatch):
            self._save_policy()
        if self._config.supervised is not None and not self._heldout_loss.newest:
            self._heldout_loss.measure()
        self._summarise("finished", after)
        self._stop_if_asked()

    def _measure_before(self) -> None:
        """The loss on held-out rows before the first step, where a run is fine-tuned on rows."""
        if self._state.step == 0 and self._state.heldout_before is None:
            found = self._heldout_loss.measure()
            if found:
                self._progress.message(f"loss on held-out rows before training: {found[HELDOUT_LOSS]:.4f}")
                self._state = replace(self._state, heldout_before=found)

    def _save_policy(self) -> None:
        self._trainer.save_hf(self._directory.policy)
        template = self._config.model.template
        if template is not None:
            # The policy has learnt to answer to that one, and is served with the one in its directory.
            text = read_template(template)
            (self._directory.policy / "chat_template.jinja").write_text(text, encoding="utf-8")

    def _take_steps(self) -> None:
        """Play and train until the last step, or until the guard or a metric says to stop."""
        num_steps = self._config.trainer.num_steps
        while self._state.step < num_steps and not self._guard.requested and not self._is_stopped:
            step = self._state.step + 1
            watch = Stopwatch(on_span=self._timeline.phase)
            self._served.engines_at_work(watch)
            with StallWatch(self._config.alarms, self._progress.message) as stall:
                with self._timeline.measure("trainer", "episodes awaited"):
                    taken = self._take(step, watch, stall)
            self._complete_checkpoint(wait=False)
            if taken is None:
                return
            version = self._state.policy_version + self._config.trainer.updates_per_step
            with self._setting_aside(step, taken.groups), self._served.resting(watch):
                with self._trainer.profiled(step, self._directory.profile):
                    credit, reports = self._learn(step, taken.groups, watch)
                if self._config.shares_gpus and self._saves_after(step):
                    # While the state is where it can be copied from.
                    self._snapshot(step, watch)
                sync = self._served.sync_if_due(step, version, watch)
                if sync is not None:
                    self._timeline.note_pause(sync.pause_seconds)
            row = self._engine_figures() | step_metrics(
                taken=taken,
                credit=credit,
                reports=reports,
                seconds=watch.seconds,
                total_seconds=watch.total,
                version=version,
                sync=sync,
                overlaps=self._config.rollout.max_staleness > 0,
            )
            served = self._served
            self._worker.advance(version=version, engine_step=served.step, engine_version=served.version)
            self._finish(
                step,
                version,
                {**row, LONGEST_PAUSE: stall.longest_pause_s, "trainer/restarts": float(self._num_restarts)},
                watch,
            )

    def _engine_figures(self) -> dict[str, float]:
        """What the engines were answered, and what became of them, since the step before."""
        kept = {} if self._keeper is None else self._keeper.take_figures()
        return self._worker.engine_figures() | self._served.figures | kept

    def _evaluate_all(self, when: str) -> Results | None:
        """Play all evaluations `before` or `after` training; None where that was interrupted."""
        if self._evaluation is None:
            self._served.engines_at_work(self._stopwatch)
        else:
            self._hand_over(self._evaluation, self._state.policy_version)
        return self._heldout.play(when, self._state.step)

    def _evaluate_between(self, step: int, version: int) -> dict[str, float]:
        """Begin the evaluations that are due after a step; the figures of those that have ended.

        With the last step all that is under way ends, and its own is that after training.
        """
        config = self._config.evaluation
        is_last = step == self._config.trainer.num_steps
        if not (is_last and config.after):
            self._begin_evaluations(step, version)
        if is_last or config.waits == "until_done":
            self._heldout.wait()
        return self._heldout.tell(step)

    def _begin_evaluations(self, step: int, version: int) -> None:
        if self._evaluation is None:
            self._served.engines_at_work(self._stopwatch)
            self._heldout.begin(step, engine_step=self._served.step, version=self._served.version)
        elif self._heldout.is_playing:
            self._heldout.skip(step)
        elif self._heldout.is_due(step):
            self._hand_over(self._evaluation, version)
            self._heldout.begin(step, engine_step=step, version=version)

    def _hand_over(self, evaluation: EvaluationEngines, version: int) -> None:
        """Give the trainer's weights to the engines that are for evaluations alone."""
        with self._stopwatch.measure("evaluate"), self._served.trainer_at_work(self._stopwatch):
            evaluation.take(self._trainer, self._directory.evaluated, version=version)

    def _learn(
        self, step: int, groups: Sequence[Group], watch: Stopwatch
    ) -> tuple[StepCredit, list[UpdateReport]]:
        """Score the step's samples on the ranks, say what they are worth, keep the episodes, and train."""
        trainer = self._config.trainer
        episodes = [episode for group in groups for episode in group.episodes]
        self._progress.phase(f"step {step}: scoring")
        with watch.measure("train", span="score"):
            own_algorithms = self._config.own_algorithms
            scored = self._trainer.score(make_samples(episodes, environments=own_algorithms))
            try:
                credit = assign_credit(
                    episodes,
                    scored,
                    self._config.algorithm,
                    version=self._state.policy_version,
                    own_algorithms=own_algorithms,
                )
            except ValueError as fault:
                # What a plug-in gave: the episodes are as good as they were, and a resume begins with them.
                raise StepFailure(f"step {step}: {fault}") from fault
            except ArithmeticError as fault:
                raise FloatingPointError(f"step {step}: rewards cannot be compared: {fault}") from fault
        self._store.write_step(step, episodes, advantages=credit.advantages)
        if self._config.logging.token_credit:
            keep_token_credit(token_credit_path(self._directory.path, step), episodes, credit)
        self._progress.phase(f"step {step}: training")
        with watch.measure("train", span="update"):
            self._timeline.note_update(step, episodes)
            reports = self._trainer.update(cut_into_updates(credit.samples, trainer.updates_per_step))
        self._check_step(step, groups, credit, reports)
        return credit, reports

    @contextmanager
    def _setting_aside(self, step: int, groups: Sequence[Group]) -> Iterator[None]:
        """Where a step fails by what was played in it, see to it that a resume does not meet the same again."""
        try:
            yield
        except (CheckFailure, ArithmeticError) as failure:
            sentence = note_failure(
                self._directory,
                self._store,
                step=step,
                journals={
                    journal_of(group.prompt.position, prompts_per_step=self._config.rollout.prompts_per_step)
                    for group in groups
                },
                sentence=sentence_of(failure),
                checks=self._config.checks,
            )
            raise StepFailure(sentence) from failure

    def abandon(self) -> None:
        """End what is under way, so that another loop can go on from a checkpoint. What was played is kept."""
        self._worker.halt(wait=self._served.can_answer)
        if self._evaluation is not None:
            self._evaluation.halt()
        self._store.close()

    def close(self) -> None:
        self._served.close()
        self._sinks.close()
        self._stopwatch.on_span = None
        self._timeline.close()

    def _take(self, step: int, watch: Stopwatch, stall: StallWatch) -> StepGroups | None:
        """The step's groups; None when the guard asked to stop."""
        rollout = self._config.rollout
        self._progress.phase(
            f"step {step}: episodes", total=rollout.prompts_per_step * rollout.samples_per_prompt
        )

        def note(episode: Episode) -> None:
            stall.tick()
            self._progress.advance()
            self._timeline.note_episode(episode)

        self._served.tend()
        taken = self._worker.take(on_episode=note, meanwhile=self._served.tend)
        if taken is None or self._guard.requested:
            self._worker.drain()
            return None
        if taken.gave_up:
            self._progress.message(
                f"step {step}: rollout.filter took {sum(taken.num_filtered.values())} groups, and the step makes do "
                f"with {len(taken.groups)} of {rollout.prompts_per_step}"
            )
        # Episodes overlap, so the wall time is shared out as their own seconds are.
        episodes = [episode for group in taken.groups for episode in group.episodes]
        tools = sum(episode.timings.tools_s for episode in episodes)
        generate = sum(episode.timings.generate_s for episode in episodes)
        share = tools / (tools + generate) if tools + generate > 0 else 0.0
        watch.add("tools", taken.wait_s * share)
        watch.add("generate", taken.wait_s * (1 - share))
        return taken

    def _check_step(
        self, step: int, groups: Sequence[Group], credit: StepCredit, reports: Sequence[UpdateReport]
    ) -> None:
        if self._config.trainer.algorithm.proximal == "scored":
            self._checks.initial_kl(reports[0].initial_kl, step=step)
            difference, where = largest_logprob_difference(credit.samples, version=self._state.policy_version)
            self._checks.logprob_difference(difference, step=step, where=f"sample {where}")
        self._checks.groups(
            {group.group_id: len(group.episodes) for group in groups},
            expected=self._config.rollout.samples_per_prompt,
            dropped={group.group_id: group.num_dropped for group in groups},
            step=step,
        )
        self._checks.trained_once(
            {sample.sample_id: sample.num_trainable for sample in credit.samples},
            [report.trained_tokens for report in reports],
            step=step,
        )

    def _finish(self, step: int, version: int, row: Mapping[str, float], watch: Stopwatch) -> None:
        """Write the step's metrics and its checkpoint, which is what makes it finished."""
        for phase, seconds in watch.seconds.items():
            self._stopwatch.add(phase, seconds)
        is_last = step == self._config.trainer.num_steps or self._guard.requested
        saves = step % self._config.checkpoint.every_steps == 0
        if saves:
            self._heldout.best.report(step, row)
        standing = self._worker.standing()
        if self._config.supervised is not None:
            row = figures_of_supervised(row) | self._heldout_loss.after_step(step)
        row = {**row, **standing.figures, **self._evaluate_between(step, version)}
        row = {**row, **self._alarms.watch(step, row)}
        stopped = reached(self._config.trainer.stop_at, row)
        if stopped is not None:
            self._progress.message(f"stopping after step {step}: {stopped}")
        self._state = RunState(
            step=step,
            policy_version=version,
            prompt_position=standing.frontier.position,
            prompts_ahead=standing.frontier.ahead,
            curriculum=standing.curriculum,
            seconds=dict(self._stopwatch.seconds),
            maxima=dict(self._checks.maxima),
            heldout_before=self._state.heldout_before,
            suites_before=self._state.suites_before,
            stopped_by=None if stopped is None else self._stop_at,
        )
        self._sinks.write(step, row)
        self._progress.step(step, row)
        self._progress.health(step, self._health.watch(row))
        if is_last or saves or stopped is not None:
            with self._stopwatch.measure("checkpoint"):
                self._save()
        if self._timeline.is_on:
            self._timeline.note_loads(self._worker.engine_loads())
            self._timeline.end_step(step, is_last=is_last or stopped is not None)

    def _save(self) -> None:
        """Begin a checkpoint of the state as it is; unless it is to be written meanwhile, finish it, too."""
        self._snapshot(self._state.step, self._stopwatch)
        self._saving, self._snapshot_of = self._state, None
        if not self._config.checkpoint.asynchronous:
            self._complete_checkpoint(wait=True)

    def _saves_after(self, step: int) -> bool:
        """Whether it is known beforehand that there is a checkpoint after a step."""
        return step % self._config.checkpoint.every_steps == 0 or step == self._config.trainer.num_steps

    def _snapshot(self, step: int, watch: Stopwatch) -> None:
        """Copy the trainer's state as it is after a step, if that has not been done; the ranks begin to write it."""
        if self._snapshot_of == step:
            return
        self._complete_checkpoint(wait=True)
        with self._served.trainer_at_work(watch):
            self._trainer.begin_checkpoint(self._directory.begin_checkpoint(step))
        self._snapshot_of = step

    def _complete_checkpoint(self, *, wait: bool) -> None:
        """Complete the checkpoint that was begun, once it is written; until then the one before is the newest.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._saving is None or not (wait or self._trainer.checkpoint_written()):
            return
        state, self._saving = self._saving, None
        self._trainer.finish_checkpoint()
        keep_last, kept = self._config.checkpoint.keep_last, self._heldout.best.kept()
        self._directory.commit_checkpoint(state, keep_last=keep_last, kept=kept)
        self._heldout.note_best()
        forget_failure(self._directory, state.step)
        first = journal_of(state.prompt_position, prompts_per_step=self._config.rollout.prompts_per_step)
        self._store.forget(first - 1)

    def _stop_if_asked(self) -> None:
        if self._guard.requested:
            self._summarise("interrupted", None)
            raise Interrupted(self._directory.path, self._state.step)

    @property
    def _stop_at(self) -> Mapping[str, Any] | None:
        config = self._config.trainer.stop_at
        return None if config is None else config.model_dump(mode="json")

    @property
    def _is_stopped(self) -> bool:
        """Whether a metric has ended the run; another `trainer.stop_at` lets it go on."""
        return self._state.stopped_by is not None and self._state.stopped_by == self._stop_at

    def _summarise(self, status: str, after: Results | None) -> None:
        found, before = after or {}, self._state.heldout_before
        is_taught = self._config.supervised is not None
        summary = {
            "status": status,
            "name": self._config.name,
            "seed": self._config.seed,
            "steps": self._state.step,
            "policy_version": self._state.policy_version,
            **(
                self._heldout_loss.summary(before=before)
                if is_taught
                else {"heldout": {"before": before, "after": found.get("")}}
            ),
            **self._heldout.summary(before=self._state.suites_before, after=found),
            "stopped_by": self._state.stopped_by,
            "seconds": {**self._stopwatch.seconds, "total": self._stopwatch.total},
            "checks": dict(self._checks.maxima),
            "versions": installed_versions(),
        }
        write_json(self._directory.summary, summary)
