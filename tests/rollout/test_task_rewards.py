"""From a config's tasks and rewards to trajectories: mixtures, rubrics, group rewards, environments of single tasks."""

import json
from collections import Counter
from functools import partial

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import Outcome
from polyturn.configs.errors import ConfigError
from polyturn.configs.models import resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import AssistantMessage, EnvironmentChoice, ListTasks, Task
from polyturn.envs.registry import make
from polyturn.envs.rewards.factory import make_group_rewards
from polyturn.envs.rewards.rubric import Criterion
from polyturn.envs.tasks import GeneratedTasks, draw_order
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.factory import check_train_split, run_reward, tasks_of
from polyturn.rollout.groups import PromptCursor, without_group_rewards
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.rollout.store import TrajectoryStore
from polyturn.trainer.credit.estimates import estimate_advantages, make_samples
from polyturn.trainer.run.preflight import check_environment
from tests.support.play import message_play

MODEL = resolve_model_path("builtin:tiny-searcher")
LIMITS = RolloutLimits(max_concurrent_tools=4, max_retries=1, retry_delay_s=0)
PLAY = message_play(limits=EpisodeLimits(max_turns=4))


def run_config(**sections):
    return RunConfig.model_validate(
        {
            "name": "test",
            "environment": {"id": "polyturn/SingleTurn-v0"},
            "model": {"path": "builtin:tiny-searcher"},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4},
            "trainer": {"num_steps": 1, "global_batch_size": 32},
            **sections,
        }
    )


def scripted(answer):
    """A policy of `answer(prompt, count)`, where `count` is how often this prompt was answered before."""
    asked = Counter()

    class Policy:
        async def reply(self, *, messages, tools):
            prompt = messages[-1]["content"]
            asked[prompt] += 1
            return AssistantMessage(content=answer(prompt, asked[prompt] - 1))

    return Policy()


async def play(player, answer, *, num_prompts, samples=4, **options):
    order = draw_order(player.tasks, seed=0)
    prompts = PromptCursor(len(player.tasks), seed=0, order=order).take(num_prompts)
    try:
        return await play_groups(
            player, prompts, samples_per_prompt=samples, policy=scripted(answer), **options
        )
    finally:
        player.close()


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


async def test_a_mixture_of_files_is_trained_on_with_a_rubric(tmp_path, monkeypatch):
    """The files, rules and weights of a config, to the rewards, parts and advantages of a step on disk."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ({"prompt": f"double {i}", "answer": str(2 * i)} for i in range(30)))
    choices = ({"q": f"which {i}", "gold": "C", "reward": "multiple_choice"} for i in range(5))
    write_jsonl(tmp_path / "b.jsonl", choices)
    (tmp_path / "mine.py").write_text(
        "def brief(episode, limit): return float(len(episode.answer) <= limit)\n"
    )
    brief = {"kind": "function", "target": "mine.py:brief", "options": {"limit": 2}}
    config = run_config(
        environment={
            "id": "polyturn/SingleTurn-v0",
            "tasks": [
                {"path": "a.jsonl@[:-10]", "weight": 3},
                {
                    "path": "b.jsonl",
                    "weight": 1,
                    "prompt_key": "q",
                    "label_key": "gold",
                    "rewards": ["multiple_choice"],
                },
            ],
        },
        evaluation={"tasks": "a.jsonl@[-10:]"},
        reward={
            "kind": "rubric",
            "parts": [
                {"name": "right", "reward": {"kind": "rule", "name": "numeric"}},
                {"name": "brief", "weight": 0.5, "reward": brief},
            ],
        },
        group_rewards=[{"name": "variety", "weight": 0.1, "target": "diversity"}],
    )
    check_environment(config, ("train", "heldout"), MODEL)
    assert len(tasks_of(config, "heldout")) == 10
    player = EpisodePlayer(
        make_env=partial(_graded, config),
        tasks=tasks_of(config, "train"),
        play=PLAY,
        limits=LIMITS,
        seed=0,
        group_rewards=make_group_rewards(config.group_rewards),
    )

    def answer(prompt, count):
        if prompt.startswith("which"):
            return "C"
        return str(2 * int(prompt.split()[1])) if count % 2 else "I do not know"

    groups = await play(player, answer, num_prompts=64)
    sources = Counter(group.episodes[0].task_id.split("-")[0] for group in groups)
    assert sources == {"a": 48, "b": 16}
    episodes = [episode for group in groups for episode in group.episodes]
    assert {episode.outcome for episode in episodes} == {Outcome.COMPLETED}
    played = [(group, episode) for group in groups for episode in group.episodes]
    for group, episode in played:
        parts = episode.reward_parts
        if episode.task_id.startswith("b"):
            assert parts == {"multiple_choice": 1.0, "group.variety": 0.0}
            assert episode.reward == 1.0
            continue
        said = episode.messages[-1]["content"]
        knew = said != "I do not know"
        # Two groups of one task share the policy's count, so a group need not be half and half.
        variety = sum(other.messages[-1]["content"] != said for other in group.episodes) / 3
        assert parts == {"right": knew, "brief": knew, "group.variety": pytest.approx(variety)}
        assert episode.reward == pytest.approx(1.5 * knew + 0.1 * variety)
    assert any(episode.reward_parts["group.variety"] > 0 for episode in episodes)
    store = TrajectoryStore(tmp_path)
    scored = {sample.sample_id: sample for sample in make_samples(episodes)}
    estimates = estimate_advantages(episodes, scored, config.trainer.algorithm)
    store.write_step(1, episodes, advantages=estimates.advantages)
    assert store.read_step(1) == episodes


def _graded(config):
    env = make(config.environment.id)
    env.graded_by = run_reward(config)
    return env


class Grades(ToolEnv):
    """Grades every answer by its length."""

    def grade(self, message):
        return {"length": float(len(message.content))}


TASKS = ListTasks([Task.from_prompt(f"t{i}", f"prompt {i}") for i in range(4)])


def group_player(reward, tasks=TASKS):
    part = Criterion(name="g", weight=2.0, reward=reward)
    return EpisodePlayer(make_env=Grades, tasks=tasks, play=PLAY, limits=LIMITS, seed=0, group_rewards=[part])


async def test_a_group_reward_is_called_once_for_each_group_with_all_its_episodes():
    calls = []

    def reward(episodes):
        calls.append([(episode.task.task_id, episode.answer, episode.reward) for episode in episodes])
        return [1.0 for _ in episodes]

    groups = await play(group_player(reward), lambda prompt, count: "x" * (count + 1), num_prompts=4)
    assert len(calls) == 4
    for group, call in zip(groups, sorted(calls), strict=False):
        assert len(group.episodes) == len(call) == 4
    assert all(len({task for task, _, _ in call}) == 1 for call in calls)
    assert all(sorted(reward for _, _, reward in call) == [1.0, 2.0, 3.0, 4.0] for call in calls)
    rewards = sorted(episode.reward for group in groups for episode in group.episodes)
    assert rewards == sorted([3.0, 4.0, 5.0, 6.0] * 4)


async def test_a_group_reward_that_fails_is_tried_again_and_then_the_group_is_dropped_and_never_scored():
    tried = Counter()

    def reward(episodes):
        task = episodes[0].task.task_id
        tried[task] += 1
        if task == "t1" or (task == "t2" and tried[task] == 1):
            raise RuntimeError("the judge is away")
        return [0.0 for _ in episodes]

    groups = await play(group_player(reward), lambda prompt, count: "x", num_prompts=4)
    by_task = {TASKS[group.prompt.task_index].task_id: group for group in groups}
    assert (by_task["t1"].episodes, by_task["t1"].num_dropped, by_task["t1"].num_missing) == ((), 4, 0)
    assert [len(by_task[task].episodes) for task in ("t0", "t2", "t3")] == [4, 4, 4]
    assert tried == {"t0": 1, "t1": 2, "t2": 2, "t3": 1}


async def test_when_every_group_reward_fails_the_step_ends_with_the_reason():
    def reward(episodes):
        raise RuntimeError("the judge is away")

    with pytest.raises(RolloutError, match="the judge is away"):
        await play(group_player(reward), lambda prompt, count: "x", num_prompts=2)


@pytest.mark.catalogue("B45")
async def test_a_resumed_step_is_scored_once():
    """Episodes from the journal have no group rewards yet; those of a finished step have them already."""

    def reward(episodes):
        return [float(len(episodes)) for _ in episodes]

    played = []
    groups = await play(group_player(reward), lambda p, c: "x", num_prompts=2, on_episode=played.append)
    scored = [episode for group in groups for episode in group.episodes]
    assert {episode.reward for episode in played} == {1.0}
    assert {episode.reward for episode in scored} == {9.0}
    for finished in (played, scored):
        again = await play(group_player(reward), lambda p, c: "never", num_prompts=2, finished=finished)
        assert [episode for group in again for episode in group.episodes] == scored


class Other(Grades):
    def __init__(self, *, worth):
        super().__init__()
        self.worth = worth

    def grade(self, message):
        return {"other": self.worth}


async def test_a_task_is_played_in_the_environment_that_it_chooses():
    made = []

    def make_chosen(choice):
        made.append((choice.env_id, choice.options["worth"]))
        return Other(worth=choice.options["worth"])

    def task(index):
        choice = EnvironmentChoice(env_id="o", options={"worth": 10.0 * index}) if index else None
        return Task(task_id=f"t{index}", messages=({"role": "user", "content": "p"},), environment=choice)

    limits = RolloutLimits(max_concurrent_episodes=1)
    player = EpisodePlayer(
        make_env=Grades,
        make_chosen=make_chosen,
        tasks=ListTasks([task(index) for index in range(3)]),
        play=PLAY,
        limits=limits,
        seed=0,
    )
    groups = await play(player, lambda prompt, count: "four", num_prompts=9)
    parts = {episode.task_id: episode.reward_parts for group in groups for episode in group.episodes}
    assert parts == {"t0": {"length": 4.0}, "t1": {"other": 10.0}, "t2": {"other": 20.0}}
    assert sorted(made) == [("o", 10.0), ("o", 20.0)], "made once and used again"


async def test_endless_generated_tasks_are_read_ahead_and_played():
    tasks = GeneratedTasks(lambda index, seed: {"id": f"t{index}", "prompt": f"{index}?", "answer": index})
    player = group_player(lambda episodes: [0.0 for _ in episodes], tasks)
    groups = await play(player, lambda prompt, count: "x", num_prompts=12)
    assert len({group.episodes[0].task_id for group in groups}) == 12


@pytest.mark.parametrize(
    ("environment", "evaluation", "words"),
    [
        ({"train_split": "heldout"}, {}, "'heldout' is held out by its name"),
        ({"train_split": "Test"}, {}, "'Test' is held out by its name"),
        ({"train_split": "validation"}, {"split": "train"}, "'validation' is held out by its name"),
        ({"train_split": "all"}, {"split": "all"}, "'all' is the one that evaluation.split plays"),
    ],
)
def test_a_heldout_split_is_trained_on_only_where_the_recipe_says_so(environment, evaluation, words):
    def config(**more):
        return run_config(
            environment={"id": "polyturn/SingleTurn-v0", **environment, **more}, evaluation=evaluation
        )

    with pytest.raises(ValueError, match=words):
        check_train_split(config())
    check_train_split(config(train_on_heldout=True))


NO_SUCH = {"id": "polyturn/TwoHopSearch-v0", "options": {"top_k": 0}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"reward": {"kind": "rule", "name": "f2"}},
            "reward: there is no reward rule 'f2'; did you mean 'f1'",
        ),
        ({"reward": {"kind": "rule", "name": "multiple_choice"}}, "task 'sum-0': multiple_choice: the label"),
        ({"reward": {"kind": "remote", "url": "x"}}, "reward: url: 'x' is not an http"),
        (
            {"reward": {"kind": "function", "target": "json:dump"}},
            r"reward: json:dump.* cannot be called as a reward",
        ),
        ({"group_rewards": [{"name": "a", "target": "b"}]}, "group_rewards: there is no group reward 'b'"),
        (
            {"evaluation": {"split": "train", "tasks": "a.jsonl"}},
            "give the held-out tasks a split of another name",
        ),
        ({"evaluation": {"tasks": "none.jsonl"}}, r"none\.jsonl: no such task file"),
        (
            {
                "environment": {
                    "id": "polyturn/SingleTurn-v0",
                    "tasks": {"path": "a.jsonl", "environment": NO_SUCH},
                }
            },
            "task 'a-1': top_k must be at least 1",
        ),
    ],
)
def test_preflight_finds_what_cannot_be_graded_or_played(tmp_path, monkeypatch, sections, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a"}])
    with pytest.raises(ConfigError, match=words):
        check_environment(run_config(**sections), ("train", "heldout"), MODEL)


@pytest.mark.parametrize("num_lost", [0, 1, 3, 4])
async def test_a_group_of_which_some_are_played_again_has_the_rewards_of_one_that_was_not_interrupted(
    num_lost,
):
    """Whatever of it was scored before: the episodes of a step that was written come back with group rewards."""

    def reward(episodes):
        return [sum(other.answer == episode.answer for other in episodes) / 4 for episode in episodes]

    def answer(prompt, count):
        return "x"

    (scored,) = await play(group_player(reward), answer, num_prompts=1)
    assert [episode.reward for episode in scored.episodes] == [3.0] * 4
    (again,) = await play(group_player(reward), answer, num_prompts=1, finished=scored.episodes[num_lost:])
    assert [episode.reward for episode in again.episodes] == [3.0] * 4
    assert [episode.reward_parts for episode in again.episodes] == [{"length": 1.0, "group.g": 1.0}] * 4
    raw = [without_group_rewards(episode) for episode in scored.episodes]
    assert [episode.reward for episode in raw] == [1.0] * 4
    (from_journal,) = await play(group_player(reward), answer, num_prompts=1, finished=raw[num_lost:])
    assert [episode.reward for episode in from_journal.episodes] == [3.0] * 4


async def test_stored_episodes_of_another_task_are_refused_with_the_way_out():
    """As after another seed, split or task file: a group of both would compare answers to two questions."""

    def reward(episodes):
        return [0.0] * len(episodes)

    def answer(prompt, count):
        return "x"

    (group,) = await play(group_player(reward), answer, num_prompts=1)
    others = ListTasks([Task.from_prompt(f"t{i}", f"another prompt {i}") for i in range(4)])
    with pytest.raises(
        RolloutError, match=r"stored episode g00000000\.0\.0 is of another task .* begin a new one"
    ):
        await play(group_player(reward, others), answer, num_prompts=1, finished=group.episodes[:1])
    renamed = ListTasks([Task.from_prompt(f"u{i}", f"prompt {i}") for i in range(4)])
    with pytest.raises(RolloutError, match=r"of the task 't\d', not 'u\d'"):
        await play(group_player(reward, renamed), answer, num_prompts=1, finished=group.episodes[:1])
