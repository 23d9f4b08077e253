"""Turns on GPUs that engines and trainer share: the order, failures on the way, what goes with them, what fits."""

from __future__ import annotations

from typing import Any

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import preset_directory
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.shared_placement import check_shared_placement
from polyturn.configs.sizing.fit import Capacity, judge
from polyturn.configs.sizing.memory import estimate_memory
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.configs.sizing.turns import turn_memory
from polyturn.rollout.engines.process import EngineError
from polyturn.trainer.run.stopwatch import Stopwatch
from polyturn.trainer.run.turns import Turns

ON_GPUS = (
    "trainer.device=cuda",
    "engines.device=cuda",
    "weight_sync={kind: disk}",
    "model.dtype=bfloat16",
    "trainer.parallel={data: 4, tensor: 2}",
    "sglang.max_total_tokens=null",
)
GIB = 1 << 30
HANDED_OVER = [
    "offload training",
    "prepared",
    "resume_weights",
    "sent",
    "offload weights",
    "resume_cache",
]
EARLY = ["offload training", "prepared", "offload weights", "resume_weights", "sent", "resume_cache"]


class Recorder:
    """Stands for both sides: what they are asked for, in order, and one call that fails once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.away: set[str] = set()
        self.fails_at: str | None = None

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            self.fails_at = None
            raise EngineError(f"{call} failed")

    def release(self) -> None:
        self._note("release")

    def resume_weights(self) -> None:
        self._note("resume_weights")

    def resume_cache(self) -> None:
        self._note("resume_cache")

    def reload(self, *, timeout_s: float) -> None:
        assert timeout_s == 7.0
        self._note("reload")
        self.away.clear()

    def offload(self, part: str, *, timeout_s: float) -> int:
        assert timeout_s == 7.0
        if part in self.away:
            return 0
        self._note(f"offload {part}")
        self.away.add(part)
        return 5

    def give_up_weight_updates(self) -> None:
        self._note("give_up_weight_updates")


def make_turns() -> tuple[Recorder, Turns, Stopwatch]:
    recorder: Any = Recorder()
    return recorder, Turns(recorder, recorder, timeout_s=7.0), Stopwatch()


def hand_over(recorder: Recorder, turns: Turns, watch: Stopwatch, *, sends_late: bool = True) -> None:
    with turns.to_engines(watch, prepare=lambda: recorder._note("prepared"), sends_late=sends_late):
        recorder._note("sent")


def test_nobody_takes_memory_before_the_other_has_given_it_up() -> None:
    recorder, turns, watch = make_turns()
    turns.to_trainer(watch)
    assert recorder.calls == [] and not turns.are_engines_on, "it is the trainer's turn from the start"
    hand_over(recorder, turns, watch)
    assert recorder.calls == HANDED_OVER and turns.are_engines_on and turns.offloaded_bytes == 10
    turns.to_trainer(watch)
    turns.to_trainer(watch)
    assert recorder.calls == [*HANDED_OVER, "release", "reload"] and not turns.are_engines_on
    assert watch.seconds.keys() == {"release", "reload", "offload", "sync", "resume"}
    recorder.calls.clear()
    hand_over(recorder, turns, watch, sends_late=False)
    assert recorder.calls == EARLY and turns.offloaded_bytes == 10, "what is on disk needs no GPU"
    recorder.calls.clear()
    turns.to_new_trainer(watch)
    assert recorder.calls == ["give_up_weight_updates", "release"] and not turns.are_engines_on


@pytest.mark.parametrize("call", HANDED_OVER)
def test_after_a_failure_on_the_way_either_side_can_have_its_turn(call: str) -> None:
    for side in ("engines", "trainer"):
        recorder, turns, watch = make_turns()
        recorder.fails_at = call
        with pytest.raises(EngineError):
            hand_over(recorder, turns, watch)
        assert not turns.are_engines_on, "they are not asked for anything"
        recorder.calls.clear()
        if side == "engines":
            gone = {f"offload {part}" for part in recorder.away}
            hand_over(recorder, turns, watch)
            assert recorder.calls == [each for each in HANDED_OVER if each not in gone]
            assert turns.are_engines_on
        else:
            turns.to_trainer(watch)
            assert recorder.calls == ["release", "reload"]


def shared(*overrides: str) -> RunConfig:
    return load_config("quickstart", ["engines.placement=shared", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.max_staleness=1"],
            r"rollout.max_staleness=1 plays then; set it to 0, or rollout.play_while",
        ),
        (["evaluation.training_waits=before_sync"], r"set evaluation.training_waits=until_done"),
        (
            ["weight_sync.every_steps=2", "rollout={max_staleness: 1, play_while_training: false}"],
            r"set weight_sync.every_steps=1",
        ),
        (
            ["trainer.device=cuda", "engines.device=cuda"],
            r"NCCL takes no two ranks .* set weight_sync={kind: disk}",
        ),
        ([*ON_GPUS, "megatron={ddp: {nccl_ub: true}}"], r"leave megatron.ddp.nccl_ub out"),
    ],
)
def test_what_needs_both_at_once_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shared_placement(shared(*overrides))


def test_what_goes_with_turns() -> None:
    for overrides in (
        [],
        ["rollout={max_staleness: 2, play_while_training: false}"],
        ["trainer.device=cuda", "engines.device=cuda", "weight_sync={kind: disk}"],
    ):
        check_shared_placement(shared(*overrides))
    check_shared_placement(load_config("quickstart", ["rollout.max_staleness=1"]))


def test_what_a_shared_gpu_holds_in_each_turn() -> None:
    config, shape = shared(*ON_GPUS), ModelShape.read(preset_directory("qwen3-4b"))
    estimate = estimate_memory(config, shape)
    trainer, both, engines = turn_memory(config, shape, estimate, gpu=80 * GIB)
    state = estimate.rank.parts
    assert trainer.total > estimate.rank.total, "something of the engine stays"
    assert trainer.parts.keys() >= {"weights", "gradients", "optimizer", "activations", "head"}
    assert "trainer's weights" not in both.parts, "they are on disk by then"
    broadcast = shared(*ON_GPUS, "weight_sync={kind: broadcast}")
    _, sent, _ = turn_memory(broadcast, shape, estimate, gpu=80 * GIB)
    assert sent.parts["trainer's weights"] == state["weights"]
    assert both.parts["engine's weights"] == engines.parts["weights"] == estimate.engine["weights"]
    assert not {"optimizer", "gradients", "kv cache"} & both.parts.keys()
    assert engines.parts["weights"] + engines.parts["kv cache"] == round(0.7 * 80 * GIB)
    assert estimate.rank.host == state["weights"] + state["optimizer"]
    own = estimate_memory(load_config("quickstart", [*ON_GPUS]), shape)
    assert own.rank.host == 0 and own.rank.total == estimate.rank.total


def test_a_turn_that_does_not_fit_is_refused_with_its_largest_part() -> None:
    shape = ModelShape.read(preset_directory("qwen3-4b"))
    gpu = Capacity(gpu=80 * GIB, gpu_name="H100", host=None)
    assert judge(shared(*ON_GPUS), shape, gpu)[0] == []
    greedy = shared(*ON_GPUS, "sglang.mem_fraction_static=0.9")
    (misfit,) = judge(greedy, shape, gpu)[0]
    assert misfit.startswith("engines.placement=shared: the engines' turn takes ")
    assert "of which kv cache" in misfit and "a smaller sglang.mem_fraction_static" in misfit
