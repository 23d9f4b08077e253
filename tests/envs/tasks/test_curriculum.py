"""Curriculum: what is drawn follows from the results so far, survives a checkpoint, and never wedges."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from polyturn.configs.schema.curriculum import CurriculumConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tasks import MixtureTasks, curriculum, draw_order, make_curriculum
from polyturn.envs.tasks.curriculum import Curriculum
from polyturn.envs.tasks.order import DrawOrder, ShuffledOrder, task_digest
from polyturn.envs.tasks.rates import Difficulty, SuccessRates, read_difficulties
from polyturn.envs.tasks.samplers import SequentialOrder


def some_tasks(count: int, name: str = "t") -> ListTasks:
    return ListTasks([Task.from_prompt(f"{name}-{i}", f"{name} {i}") for i in range(count)])


def make(tasks: Any, seed: int = 3, **config: Any) -> DrawOrder:
    return make_curriculum(CurriculumConfig.model_validate(config), tasks, seed=seed)


def adaptive(tasks: Any, seed: int = 3, **config: Any) -> Curriculum:
    made = make(tasks, seed, **config)
    assert isinstance(made, Curriculum)
    return made


EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "curriculum"
STAIRCASE, FRESH = f"{EXAMPLES / 'staircase.py'}:Staircase", f"{EXAMPLES / 'fresh_only.py'}:FreshOnly"
DIFFICULTY = {"kind": "difficulty", "low": 0.25, "high": 0.75, "explore": 0.2, "min_tasks": 1}


def drawn(order: DrawOrder, count: int) -> list[int]:
    return [order[position].task_index for position in range(count)]


def test_orders_by_name() -> None:
    mixture = MixtureTasks([some_tasks(6, "a"), some_tasks(2, "b")], weights=[1, 3])
    assert drawn(make(mixture, sampler={"kind": "sequential"}), 20) == [*range(8), *range(8), *range(4)]
    shuffle = make(mixture, sampler={"kind": "shuffle"})
    assert drawn(shuffle, 24) == drawn(ShuffledOrder(8, seed=3), 24)
    assert Counter(drawn(shuffle, 24)) == dict.fromkeys(range(8), 3)
    by_weight = make(mixture)
    assert drawn(by_weight, 128) == drawn(draw_order(mixture, seed=3), 128)
    assert sum(index >= 6 for index in drawn(by_weight, 128)) == 96
    with pytest.raises(ValueError, match="empty"):
        SequentialOrder(0)


def play(order: Curriculum, rate_of: dict[int, float], count: int, *, start: int = 0) -> list[int]:
    """Draw, play eight episodes of each draw with the task's own rate, and observe; what was drawn."""
    found = []
    for position in range(start, start + count):
        index = order[position].task_index
        found.append(index)
        num_right = round(8 * rate_of[index])
        order.observe(position, [1.0] * num_right + [0.0] * (8 - num_right))
    return found


RATES = {index: index / 19 for index in range(20)}
IN_BAND = {index for index, rate in RATES.items() if 0.25 <= round(8 * rate) / 8 <= 0.75}


def test_difficulty_draws_from_the_band_but_for_its_exploration() -> None:
    order = adaptive(some_tasks(20), sampler=DIFFICULTY)
    found = play(order, RATES, 2000)[200:]
    outside = sum(index not in IN_BAND for index in found)
    # A fifth explores, of which the share outside of the band is outside.
    expected = len(found) * 0.2 * (20 - len(IN_BAND)) / 20
    assert expected * 0.75 < outside < expected * 1.25
    counts = Counter(index for index in found if index in IN_BAND)
    assert counts.keys() == IN_BAND
    assert max(counts.values()) < 1.5 * min(counts.values()), "each task of the band is as likely"


def test_without_anything_known_all_tasks_are_gone_through_once() -> None:
    order = adaptive(some_tasks(20), sampler=DIFFICULTY)
    assert drawn(order, 20) == drawn(draw_order(some_tasks(20), seed=3), 20)


def test_a_band_that_is_too_small_is_not_drawn_from_again_and_again() -> None:
    few = adaptive(some_tasks(20), sampler={**DIFFICULTY, "min_tasks": len(IN_BAND) + 1})
    assert Counter(play(few, RATES, 200)) == dict.fromkeys(range(20), 10)
    enough = adaptive(some_tasks(20), sampler={**DIFFICULTY, "min_tasks": len(IN_BAND)})
    assert Counter(play(enough, RATES, 200)) != dict.fromkeys(range(20), 10)


def test_the_band_follows_the_policy() -> None:
    """Tasks that the policy learns leave the band, and those that come within reach enter it."""
    order = adaptive(some_tasks(20), sampler={**DIFFICULTY, "explore": 0.5}, memory=0.0)
    play(order, RATES, 400)
    learnt = {index: min(1.0, rate + 0.5) for index, rate in RATES.items()}
    play(order, learnt, 400, start=400)
    found = Counter(play(order, learnt, 400, start=800))
    now = {index for index, rate in learnt.items() if 0.25 <= round(8 * rate) / 8 <= 0.75}
    assert now != IN_BAND
    assert min(found[index] for index in now) > max(found[index] for index in range(20) if index not in now)


def test_what_was_drawn_stays_drawn_until_it_is_known_what_came_of_it() -> None:
    order = adaptive(some_tasks(20), sampler=DIFFICULTY)
    ahead = [order[position] for position in range(10)]
    order.observe(0, [1.0, 0.0])
    assert [order[position] for position in range(1, 10)] == ahead[1:]
    with pytest.raises(LookupError, match="position 0 is not kept"):
        order[0]
    assert drawn(make(some_tasks(20), sampler=DIFFICULTY), 10) == [draw.task_index for draw in ahead]


@given(
    cut=st.integers(1, 60),
    ahead=st.integers(0, 12),
    kind=st.sampled_from(["difficulty", "band", "both", "plugin"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=40, deadline=None)
def test_a_curriculum_that_is_restored_draws_what_it_would_have_drawn(
    cut: int, ahead: int, kind: str, seed: int
) -> None:
    """The state goes through JSON, as it does in a checkpoint, with draws that are open."""
    configs: dict[str, Any] = {
        "difficulty": {"sampler": DIFFICULTY},
        "band": {"gate": {"kind": "band", "min_episodes": 1, "retry_after": 2}},
        "both": {"sampler": DIFFICULTY, "gate": {"kind": "band", "min_episodes": 1}},
        "plugin": {
            "sampler": {"kind": "plugin", "target": STAIRCASE, "options": {"width": 3, "solved_at": 0.3}},
            "gate": {"kind": "plugin", "target": FRESH, "options": {"times": 12}},
        },
    }
    whole, first, second = (adaptive(some_tasks(20), seed, **configs[kind]) for _ in range(3))
    play(whole, RATES, cut)
    play(first, RATES, cut)
    opened = [whole[position] for position in range(cut, cut + ahead)]
    assert [first[position] for position in range(cut, cut + ahead)] == opened
    second.restore(json.loads(json.dumps(first.state())))
    assert [second[position] for position in range(cut, cut + ahead)] == opened
    assert play(second, RATES, 60, start=cut) == play(whole, RATES, 60, start=cut)
    assert second.metrics == whole.metrics


def test_a_gate_passes_over_what_is_too_easy_or_too_hard_but_for_now_and_then() -> None:
    order = adaptive(
        some_tasks(4),
        sampler={"kind": "sequential"},
        gate={"kind": "band", "low": 0.1, "high": 0.9, "min_episodes": 8, "retry_after": 3},
    )
    rates = {0: 0.0, 1: 0.5, 2: 1.0, 3: 0.25}
    assert play(order, rates, 4) == [0, 1, 2, 3]
    # Tasks 0 and 2 are passed over in three epochs, and played in the fourth.
    assert play(order, rates, 8, start=4) == [1, 3, 1, 3, 1, 3, 0, 1]
    assert order.metrics["curriculum/passed_over"] == 6
    assert order.metrics["curriculum/known_tasks"] == 4


def test_a_gate_that_admits_nothing_never_wedges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum, "MAX_PASSED_OVER", 50)
    gate = {"kind": "band", "low": 0.5, "high": 0.5, "min_episodes": 1, "retry_after": 0}
    order = adaptive(some_tasks(3), sampler={"kind": "sequential"}, gate=gate)
    assert play(order, dict.fromkeys(range(3), 0.0), 3) == [0, 1, 2]
    assert play(order, dict.fromkeys(range(3), 0.0), 2, start=3) == [50 % 3, (50 + 51) % 3]
    assert order.metrics["curriculum/forced"] == 2


def test_episodes_are_needed_before_a_task_is_judged() -> None:
    gate = {"kind": "band", "low": 0.1, "high": 0.9, "min_episodes": 16, "retry_after": 0}
    order = adaptive(some_tasks(2), sampler={"kind": "sequential"}, gate=gate)
    assert play(order, {0: 0.0, 1: 0.5}, 7) == [0, 1, 0, 1, 1, 1, 1]


def test_rates_forget_by_memory_and_count_what_reaches_the_success_reward() -> None:
    rates = SuccessRates(success_reward=0.9, memory=0.5)
    assert (rates.rate(7), rates.num_episodes(7)) == (None, 0)
    rates.observe(7, [0.9 - 1e-9, 0.5, 1.0, 0.0])
    assert rates.rate(7) == 0.5
    rates.observe(7, [1.0, 1.0])
    assert rates.rate(7) == pytest.approx((2 * 0.5 + 2) / (4 * 0.5 + 2))
    rates.observe(7, [])
    assert (rates.rate(7), rates.num_episodes(7)) == (0.75, 6)


def write_difficulties(path: Path, tasks: ListTasks, successes: dict[int, int]) -> Path:
    lines = [
        Difficulty(
            task_id=tasks[index].task_id,
            digest=task_digest(tasks[index]),
            num_episodes=8,
            num_successes=count,
            mean_reward=count / 8,
        ).to_line()
        for index, count in successes.items()
    ]
    path.write_bytes(b"".join(lines))
    return path


def test_a_run_begins_with_what_a_probe_found(tmp_path: Path) -> None:
    tasks = some_tasks(20)
    path = write_difficulties(tmp_path / "d.jsonl", tasks, {3: 4, 5: 0, 11: 8, 12: 5})
    assert json.loads(path.read_bytes().splitlines()[0])["success_rate"] == 0.5
    order = adaptive(tasks, sampler={**DIFFICULTY, "explore": 0.0}, difficulties=path)
    assert sorted(drawn(order, 2)) == [3, 12]
    changed = ListTasks([Task.from_prompt(f"t-{i}", "another question") for i in range(20)])
    with pytest.raises(ValueError, match=r"d\.jsonl knows none of the tasks"):
        make(changed, sampler=DIFFICULTY, difficulties=path)
    with path.open("ab") as file:
        file.write(b'{"task_id": "t-')
    assert len(read_difficulties(path)) == 4, "a last line that was cut short is left out"


def test_a_task_of_which_a_draw_is_under_way_is_not_drawn_again_from_the_band(
    tmp_path: Path,
) -> None:
    path = write_difficulties(tmp_path / "d.jsonl", some_tasks(4), dict.fromkeys(range(4), 4))
    order = adaptive(some_tasks(4), sampler={**DIFFICULTY, "explore": 0.0}, difficulties=path)
    first = drawn(order, 4)
    assert sorted(first) == [0, 1, 2, 3]
    order.observe(1, [])
    assert order[4].task_index == first[1], "the only one that is not under way"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]\n", r"d\.jsonl:1: no line of `polyturn probe`"),
        ("{}\n", r"d\.jsonl:1: no line of `polyturn probe`.*task_id"),
        (
            '{"task_id":"a","digest":"d","num_episodes":2,"num_successes":3,"mean_reward":1}\n',
            r"d\.jsonl:1: 3 successes of 2 episodes cannot be",
        ),
    ],
)
def test_a_file_of_difficulties_that_is_none_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        read_difficulties(path)
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        read_difficulties(tmp_path / "none.jsonl")


def test_options_that_would_change_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="without one they change nothing"):
        CurriculumConfig(difficulties=Path("d.jsonl"))
    with pytest.raises(ValidationError, match="no success rate is between them"):
        CurriculumConfig.model_validate({"gate": {"kind": "band", "low": 0.9, "high": 0.1}})


PLUGINS = """
from polyturn.envs.tasks.order import Draw

class Sampler:
    def __init__(self, tasks, *, seed, rates, height):
        self.tasks = tasks

    def draw(self, position):
        return Draw(len(self.tasks), 0)

    def observe(self, task_index, rewards):
        pass

    def state(self):
        return None

    def restore(self, state):
        pass

class Swapped(Sampler):
    def observe(self, rewards, task_index):
        pass

class Stateless:
    def __init__(self, tasks, *, rates):
        pass

    def admits(self, task_index):
        return True

    def observe(self, task_index, rewards):
        pass

NUMBER = 3
"""


@pytest.mark.parametrize(
    ("part", "name", "options", "message"),
    [
        ("sampler", "Sampler", {}, r"Sampler cannot be made as Sampler\(\.\.\., seed=\.\.\., rates=.*height"),
        ("sampler", "Sampler", {"seed": 1, "height": 2}, "'seed' is given by the run, and is no option"),
        ("sampler", "Swapped", {"height": 2}, r"'rewards' stands where 'task_index' is.*def observe\(self"),
        ("sampler", "nothing", {}, "has no 'nothing'"),
        ("sampler", "NUMBER", {}, "is of type int, not a class"),
        ("gate", "Stateless", {}, r"has no method 'state'; a gate's `state` is `def state\(self\) -> Any`"),
    ],
)
def test_a_plugin_that_cannot_serve_is_refused_at_the_start(
    tmp_path: Path, part: str, name: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "plugins.py").write_text(PLUGINS)
    config = {part: {"kind": "plugin", "target": f"{tmp_path / 'plugins.py'}:{name}", "options": options}}
    with pytest.raises(ValueError, match=message):
        make(some_tasks(3), **config)


def test_a_draw_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "plugins.py").write_text(PLUGINS)
    target = f"{tmp_path / 'plugins.py'}:Sampler"
    sampler = {"kind": "plugin", "target": target, "options": {"height": 1}}
    with pytest.raises(ValueError, match="one of the 3 tasks"):
        adaptive(some_tasks(3), sampler=sampler)[0]


def test_the_examples_do_what_they_say() -> None:
    stairs = adaptive(some_tasks(6), sampler={"kind": "plugin", "target": STAIRCASE, "options": {"width": 2}})
    assert drawn(stairs, 4) == [0, 1, 0, 1]
    stairs.observe(0, [1.0, 0.0])
    assert [stairs[position].task_index for position in (4, 5)] == [0, 1], "half is not enough"
    stairs.observe(1, [1.0, 1.0])
    assert [stairs[position].task_index for position in (6, 7)] == [1, 2]
    fresh = adaptive(
        some_tasks(3),
        sampler={"kind": "sequential"},
        gate={"kind": "plugin", "target": FRESH, "options": {"times": 2}},
    )
    assert drawn(fresh, 6) == [0, 1, 2, 0, 1, 2]
    fresh.observe(4, [])
    assert fresh[6].task_index == 1, "the only one that may be drawn again"
