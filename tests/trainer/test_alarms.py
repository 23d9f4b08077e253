"""Alarms: from which value on they go off, how often they are shown, what is counted, and what they advise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyturn.agents.episode import Episode
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.alarms import AlarmsConfig
from polyturn.rollout.groups import Group, Prompt
from polyturn.trainer.data.samples import UpdateReport
from polyturn.trainer.run.alarms import KINDS, AlarmMonitor, StallWatch, alarms_of, thresholds
from polyturn.trainer.run.metrics import failed_share, rank_imbalance, uniform_share
from tests.support.samples import make_sample

ROOT = Path(__file__).resolve().parents[2]
QUIET = {
    "rollout/longest_pause_s": 300.0,
    "rollout/failed_attempts": 0.2,
    "group/uniform": 0.8,
    "reward/mean": 0.1,
    "outcome/truncated": 0.5,
    "engine/0/kv_use_max": 0.95,
    "train/rank_imbalance": 1.5,
    "ledger/lost_tokens": 0.0,
    "engine/missing": 0.0,
    "engine/0/token_seconds": 0.3,
    "engine/1/token_seconds": 0.1,
    "engine/0/running": 2.0,
    "engine/1/running": 0.0,
    "engine/1/kv_use_max": 0.1,
}
"""Every figure is at its default threshold, none beyond."""
MORE = {
    "stall_s": ("rollout/longest_pause_s", 301.0),
    "failed_attempts": ("rollout/failed_attempts", 0.21),
    "uniform_groups": ("group/uniform", 0.81),
    "truncated_episodes": ("outcome/truncated", 0.51),
    "kv_use": ("engine/1/kv_use_max", 0.96),
    "rank_imbalance": ("train/rank_imbalance", 1.51),
    "lost_tokens": ("ledger/lost_tokens", 1.0),
    "engines_missing": ("engine/missing", 1.0),
    "engine_slowness": ("engine/0/token_seconds", 0.301),
    "engine_imbalance": ("engine/2/running", 0.0),
}
"""By alarm: what of that, changed so, sets it off."""


def test_every_threshold_has_an_alarm_and_every_alarm_a_threshold() -> None:
    assert thresholds(AlarmsConfig()).keys() == KINDS.keys() == MORE.keys()


@pytest.mark.parametrize("name", list(KINDS))
def test_an_alarm_goes_off_beyond_its_threshold_alone(name: str) -> None:
    assert alarms_of(QUIET, AlarmsConfig()) == []
    figure, value = MORE[name]
    (alarm,) = alarms_of({**QUIET, figure: value}, AlarmsConfig())
    assert alarm.name == name
    assert alarm.sentence.endswith(f" (alarms.{name}={thresholds(AlarmsConfig())[name]:g})")
    assert alarms_of({**QUIET, figure: value}, AlarmsConfig(**{name: None})) == []
    assert alarms_of({}, AlarmsConfig()) == []


def test_engines_that_do_nothing_are_in_balance() -> None:
    idle = {"engine/0/running": 0.0, "engine/1/running": 0.0}
    assert KINDS["engine_imbalance"].value(idle) == 1.0
    assert KINDS["engine_imbalance"].value({**idle, "engine/1/running": 3.0}) == 2.0


def test_options_that_an_alarm_advises_are_there() -> None:
    """What stands before a `=` or with dots in a sentence is an option of a recipe."""
    config = load_config("quickstart").model_dump()
    for kind in KINDS.values():
        for word in kind.says(1.0, {}).replace(",", " ").replace(";", " ").replace(":", " ").split():
            section, *keys = word.partition("=")[0].split(".")
            if not keys or section not in config or section == "sglang":
                continue
            found = config[section]
            for key in keys:
                assert key in found, word
                found = found[key]


def test_uniform_groups_say_whether_tasks_are_too_easy_or_too_hard() -> None:
    for mean, side in ((0.02, "too hard"), (0.98, "too easy")):
        (alarm,) = alarms_of({"group/uniform": 0.9, "reward/mean": mean}, AlarmsConfig())
        assert f"in 90% of the groups all rewards are alike, at a mean of {mean}" in alarm.sentence
        assert side in alarm.sentence


def test_an_alarm_is_shown_once_when_it_begins_and_counted_while_it_lasts() -> None:
    shown: list[str] = []
    monitor = AlarmMonitor(AlarmsConfig(after_steps=2, uniform_groups=0.8), shown.append)
    shares = [0.9, 0.5, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9]
    counted = [
        monitor.watch(step, {"group/uniform": share})["alarm/uniform_groups"]
        for step, share in enumerate(shares, start=1)
    ]
    assert counted == [0, 0, 0, 1, 1, 0, 0, 1]
    assert [text.partition(":")[0] for text in shown] == ["alarm at step 4", "alarm at step 8"]


def test_what_is_turned_off_or_not_measured_is_not_in_the_row() -> None:
    monitor = AlarmMonitor(AlarmsConfig(truncated_episodes=None), lambda text: None)
    assert monitor.watch(1, {"outcome/truncated": 1.0, "group/uniform": 0.0}) == {"alarm/uniform_groups": 0.0}


def test_a_stall_counts_at_once_and_is_left_to_the_watch_to_show() -> None:
    shown: list[str] = []
    monitor = AlarmMonitor(AlarmsConfig(stall_s=10), shown.append)
    assert monitor.watch(1, {"rollout/longest_pause_s": 10.5}) == {"alarm/stall_s": 1.0}
    assert shown == []


def test_a_stall_is_said_while_it_lasts_and_once() -> None:
    shown: list[str] = []
    said = threading.Event()

    def show(text: str) -> None:
        shown.append(text)
        said.set()

    with StallWatch(AlarmsConfig(stall_s=0.05), show) as watch:
        assert said.wait(30)
        said.clear()
        time.sleep(0.2)
        assert len(shown) == 1 and shown[0].startswith("alarm: no episode ended for 0 s")
        watch.tick()
        assert said.wait(30), "the next pause is one of its own"
    assert watch.longest_pause_s >= 0.2
    with StallWatch(AlarmsConfig(stall_s=None), show) as quiet:
        quiet.tick()
    assert len(shown) == 2


def group(episodes: list[Episode], *, num_dropped: int = 0, num_retries: int = 0) -> Group:
    prompt = Prompt(task_index=0, epoch=0, position=0, group_id="g")
    return Group(
        group_id="g",
        prompt=prompt,
        episodes=tuple(episodes),
        num_expected=len(episodes) + num_dropped,
        num_dropped=num_dropped,
        num_retries=num_retries,
    )


def test_the_figures_behind_alarms(make_episode: Callable[..., Episode]) -> None:
    def of(*rewards: float, **counts: int) -> Group:
        return group([make_episode("g", sample, reward) for sample, reward in enumerate(rewards)], **counts)

    groups = [of(1, 1), of(0, 1), of(0, 0, num_dropped=1, num_retries=2), of(0.5)]
    assert uniform_share(groups) == pytest.approx(2 / 3), "one episode alone cannot differ"
    assert failed_share(groups) == pytest.approx(3 / 10)
    assert uniform_share(groups, num_filtered=5) == pytest.approx(7 / 8), "what a filter took was played, too"
    assert (uniform_share([]), failed_share([])) == (0.0, 0.0)
    samples = [make_sample(range(length), name=str(length)) for length in (2, 4, 6)]
    reports = [
        UpdateReport(metrics=(), trained_tokens=dict.fromkeys(names, 1)) for names in (["6", "4"], ["2"])
    ]
    assert rank_imbalance(samples, reports) == pytest.approx(10 / 6)
    assert rank_imbalance([], [UpdateReport(metrics=(), trained_tokens={})]) == 1.0


def test_the_guide_names_every_alarm_with_its_figure() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    for name, kind in KINDS.items():
        assert f"| `{name}` | `{kind.figure}` |" in text
