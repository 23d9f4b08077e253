"""Groups whose samples branch: every sampled token is trained on once, whatever fails, stops or is resumed."""

import asyncio
import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.agents.policy import Generation, PolicyFault, SamplingParams
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.envs.messages import ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.branching import at_any_turn, at_largest_rise, make_branching
from polyturn.rollout.checks import check_branching
from polyturn.rollout.collection import Collection
from polyturn.rollout.factory import token_play
from polyturn.rollout.groups import PromptCursor, parse_episode_id
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.tools.tool import tool
from polyturn.trainer.credit.estimates import estimate_advantages, make_samples
from polyturn.trainer.run.metrics import branch_metrics
from tests.support.chat_families import FAMILIES
from tests.support.play import call

TOKENIZER = FAMILIES["qwen2.5"].tokenizer
RENDERER = ChatRenderer(TOKENIZER)
TASKS = ListTasks([Task.from_prompt("t", "Roll.", label="")])
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


class Dice(ToolEnv):
    """Rolls from its seed; the reward goes by the answer."""

    is_replayable = True
    hooks_run = "event_loop"

    @tool
    def roll(self, text: str) -> str:
        """Roll a die."""
        return f"{text} {int(self.np_random.integers(6))}"

    def grade(self, message):
        return {"luck": float(len(message.content) % 3)}


class Unrepeatable(Dice):
    is_replayable = True
    rolls = itertools.count()

    @tool
    def roll(self, text: str) -> str:
        """Roll a die."""
        return str(next(self.rolls))


class Silent(Dice):
    """Does not say that it can be rebuilt, as a subclass does not inherit it."""


class Drawer:
    """Calls the tool or answers by the request's seed; each token of all has a logprob of its own."""

    def __init__(self, *, goes_on=0.7, fails=lambda number: False, session=0):
        self.goes_on, self.fails, self.session = goes_on, fails, session
        self.num_requests, self.num_tokens = 0, 10_000 * session

    async def generate(self, *, prompt_ids, sampling):
        await asyncio.sleep(0)
        self.num_requests += 1
        if self.fails(self.num_requests):
            raise PolicyFault("the engine is gone")
        draw = np.random.default_rng([sampling.seed, self.session])
        word = "abcdefg"[: int(draw.integers(1, 8))]
        text = call("roll", word) if draw.random() < self.goes_on else word
        ids = [*TOKENIZER.encode(text, add_special_tokens=False), END]
        first, self.num_tokens = self.num_tokens, self.num_tokens + len(ids)
        return Generation(
            token_ids=ids,
            logprobs=[-(first + i + 1) / 1024 for i in range(len(ids))],
            policy_versions=[0] * len(ids),
            finish_reason="stop",
        )


def rollout_config(branching, samples=4):
    return RolloutConfig(prompts_per_step=1, samples_per_prompt=samples, branching=branching)


def config(*, samples=6, trunks=2, kind="turns"):
    return rollout_config({"kind": kind, "num_trunks": trunks}, samples)


async def collect(
    policy, *, env=Dice, settings=None, finished=(), journal=None, stop=None, times=1, max_retries=2
):
    """The groups of one prompt, played `times`, all but the last to be void."""
    settings = settings or config()
    limits = RolloutLimits(retry_delay_s=0, max_retries=max_retries, stall_timeout_s=20)
    player = EpisodePlayer(
        make_env=env,
        tasks=TASKS,
        play=token_play(
            renderer=RENDERER,
            dialect=HermesDialect(),
            limits=EpisodeLimits(max_turns=6, max_tokens_per_turn=200, max_tokens_per_episode=4000),
            sampling=SamplingParams(),
        ),
        limits=limits,
        seed=5,
    )
    journal = [] if journal is None else journal

    async def keep(episode):
        journal.append(episode)
        if stop is not None and len(journal) == stop:
            collection.stop.set()

    collection = Collection(
        player=player,
        policy=policy,
        samples_per_prompt=settings.samples_per_prompt,
        branching=make_branching(settings, seed=5),
        keep=keep,
    )
    (prompt,) = PromptCursor(1, seed=0).take(1)
    try:
        for number in range(times):
            if number:
                collection.void(prompt)
            group = await collection.begin(prompt, finished)
    finally:
        player.close()
    return group, journal


def trained_logprobs(episodes):
    """Of every token that is trained on: they name it."""
    samples = make_samples(episodes)
    return Counter(value for sample in samples for value in sample.behavior_logprobs[sample.sampled].tolist())


def check_whole(group, policy=None):
    """Every branch goes on from a trunk of the group; no token is trained on twice, and of those that were drawn none
    is missing, if all that was drawn is in the group.
    """
    by_id = {episode.episode_id: episode for episode in group.episodes}
    for episode in group.episodes:
        assert episode.outcome is not Outcome.FAILED
        if not episode.is_branch:
            continue
        trunk = by_id[episode.parent_id]
        assert not trunk.is_branch and parse_episode_id(trunk.episode_id)[1] < 2
        (ours,), (theirs,) = episode.segments, trunk.segments
        inherited = int(ours.sampled.argmax())
        assert ours.token_ids[:inherited].tolist() == theirs.token_ids[:inherited].tolist()
        assert not theirs.sampled[inherited - 1] and theirs.turns[inherited] == episode.branch_turn
        assert episode.messages[0] == trunk.messages[0]
    counts = trained_logprobs(group.episodes)
    assert not counts or max(counts.values()) == 1, "a token is trained on twice"
    if policy is not None:
        assert counts.total() == policy.num_tokens, "a token that was drawn is not trained on"


@pytest.mark.parametrize("kind", ["turns", "entropy"])
async def test_a_group_of_trunks_and_branches(kind):
    policy = Drawer()
    group, _ = await collect(policy, settings=config(samples=8, trunks=2, kind=kind))
    check_whole(group, policy)
    assert [parse_episode_id(episode.episode_id)[1] for episode in group.episodes] == list(range(8))
    branches = [episode for episode in group.episodes if episode.is_branch]
    assert len(branches) >= 4 and not any(episode.is_branch for episode in group.episodes[:2])
    assert len({episode.seed for episode in group.episodes}) == 8
    figures = branch_metrics(group.episodes)
    assert figures == {"rollout/branches": len(branches), "rollout/branches_refused": 0}
    again, _ = await collect(Drawer(), settings=config(samples=8, trunks=2, kind="turns"))
    if kind == "turns":
        assert [(e.branch_turn, e.messages) for e in again.episodes] == [
            (e.branch_turn, e.messages) for e in group.episodes
        ], "a run is repeated from its seed"


async def test_credit_of_a_group_that_branched():
    group, _ = await collect(Drawer(), settings=config(samples=8, trunks=2))
    samples = {sample.sample_id: sample for sample in make_samples(group.episodes)}
    algorithm = AlgorithmConfig(advantage={"kind": "tree_grpo"})
    credit = estimate_advantages(group.episodes, samples, algorithm)
    found = {sample.sequence_id: sample for sample in credit.samples}
    trunk = group.episodes[0]
    own = [e for e in group.episodes if e.parent_id == trunk.episode_id and e.branch_turn == 1]
    others = [e for e in group.episodes if e.parent_id == trunk.episode_id and e.branch_turn > 1]
    assert own or others

    def advantage(episode, turn):
        sample = found[episode.episode_id]
        (value,) = set(sample.advantages[sample.sampled & (sample.turns == turn)].tolist())
        return value

    leaves = [advantage(e, e.num_turns - 1) for e in (trunk, *own, *others)]
    assert advantage(trunk, 0) == pytest.approx(np.mean(leaves), abs=1e-5)
    assert credit.metrics["tree/num_branches"] == sum(e.is_branch for e in group.episodes)


@pytest.mark.parametrize("env", [Unrepeatable, Silent])
async def test_what_cannot_be_rebuilt_is_played_from_the_start_and_counted(env):
    policy = Drawer(goes_on=1.0)
    group, journal = await collect(policy, env=env)
    check_whole(group, policy)
    assert len(group.episodes) == 6 == len(journal) and not any(e.is_branch for e in group.episodes)
    assert branch_metrics(group.episodes) == {"rollout/branches": 0, "rollout/branches_refused": 4}


async def test_a_trunk_of_one_turn_has_nothing_to_branch_from():
    policy = Drawer(goes_on=0.0)
    group, _ = await collect(policy)
    check_whole(group, policy)
    assert branch_metrics(group.episodes) == {}


async def test_a_trunk_that_fails_for_good_is_replaced_by_another_and_none_by_the_start():
    def first_of(num_trunks):
        calls = itertools.count()
        # Requests of trunks come first: branches wait for them.
        return lambda _: next(calls) < num_trunks

    group, _ = await collect(Drawer(goes_on=1.0, fails=first_of(1)), max_retries=0)
    check_whole(group)
    assert group.num_dropped == 1 and len(group.episodes) == 5
    assert {e.parent_id for e in group.episodes if e.is_branch} == {"g00000000.1.0"}
    group, _ = await collect(Drawer(goes_on=1.0, fails=first_of(2)), max_retries=0)
    assert group.num_dropped == 2 and [e.is_branch for e in group.episodes] == [False] * 4


async def test_a_failed_branch_branches_again_and_a_void_group_has_other_trunks():
    group, journal = await collect(Drawer(goes_on=1.0, fails=lambda number: number % 9 == 0))
    check_whole(group)
    assert any(e.outcome is Outcome.FAILED for e in journal) and len(group.episodes) == 6
    group, journal = await collect(Drawer(), times=2)
    check_whole(group)
    assert {parse_episode_id(e.episode_id)[2] for e in group.episodes} == {1}
    assert len(journal) == 12


@functools.cache
def stopped_session(num_episodes):
    """The journal of a session that was asked to stop when it had so many episodes."""
    _, journal = asyncio.run(collect(Drawer(), stop=num_episodes))
    assert len(journal) >= num_episodes
    return journal


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_resume_takes_up_what_is_whole(data):
    """Any records of the journal may be damaged."""
    journal = stopped_session(data.draw(st.sampled_from([1, 3, 6])))
    kept = [episode for episode in journal if data.draw(st.booleans())]
    # An engine that draws otherwise this time, as one that batches otherwise may.
    group, _ = asyncio.run(collect(Drawer(session=1), finished=kept))
    check_whole(group)
    assert len(group.episodes) == 6
    alive = {episode.episode_id for episode in kept}
    for episode in kept:
        if not episode.is_branch or episode.parent_id in alive:
            assert episode in group.episodes, "what was played is not played again"


def episode_of(turns, group):
    """An episode with tokens of these logprobs in each turn."""
    own = np.concatenate([[0.0], *turns]).astype(np.float32)
    numbers = np.concatenate([[0], *[np.full(len(turn), i) for i, turn in enumerate(turns)]])
    segment = Segment(
        token_ids=np.zeros(len(own)),
        sampled=np.arange(len(own)) > 0,
        logprobs=own,
        policy_versions=np.zeros(len(own)),
        turns=numbers,
    )
    return Episode(
        episode_id=f"{group}.0.0", group_id=group, env_id="e", task_id="t", seed=0, outcome=Outcome.COMPLETED,
        stop_reason="terminated", reward=0.0, num_turns=len(turns), segments=(segment,),
    )  # fmt: skip


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.5, -2.0, -8.0]), min_size=1, max_size=4), min_size=2, max_size=6
    ),
    st.integers(0, 7),
    st.sampled_from([None, 0.5]),
)
def test_the_largest_rise_is_branched_at_first(turns, number, least):
    trunk = episode_of(turns, "g")
    means = [-np.mean(np.float32(turn[:2]), dtype=np.float64) for turn in turns]
    found = at_largest_rise(trunk, range(1, len(turns)), number, 0, first_tokens=2, min_rise=least)
    open_to = [t for t in range(1, len(turns)) if least is None or means[t] - means[0] > least]
    if not open_to:
        assert found is None
        return
    rank = number % len(open_to)
    assert found in open_to
    assert sum(means[t] > means[found] for t in open_to) <= rank
    assert sum(means[t] >= means[found] for t in open_to) > rank


def test_random_turns_are_all_chosen_and_follow_from_the_seed():
    chosen = [at_any_turn(None, (1, 2, 3), 0, seed) for seed in range(60)]
    assert set(chosen) == {1, 2, 3}
    assert chosen == [at_any_turn(None, (1, 2, 3), 1, seed) for seed in range(60)]


def test_a_plug_in_chooses_and_what_it_may_not_choose_is_refused(tmp_path):
    file = tmp_path / "choice.py"
    file.write_text(
        "def last(trunk, turns, number, seed, *, back=1):\n    return turns[-1] + 1 - back\n"
        "def first(trunk):\n    return 1\n"
    )
    made = {"kind": "plugin", "target": f"{file}:last", "num_trunks": 1}
    branching = make_branching(rollout_config(made), seed=0)
    trunk = episode_of([[-1.0]] * 4, "g")
    trunk = replace(trunk, messages=tuple({"role": "assistant", "content": ""} for _ in range(4)))
    assert branching.fork(trunk, sample=1, attempt=0).turn == 3
    wrong = make_branching(rollout_config(made | {"options": {"back": 0}}), seed=0)
    with pytest.raises(
        RolloutError, match=r"it chose turn 4 of g\.0\.0, which can be branched at turn 1 to 3"
    ):
        wrong.fork(trunk, sample=1, attempt=0)
    with pytest.raises(ValueError, match="def choose"):
        make_branching(rollout_config(made | {"target": f"{file}:first"}), seed=0)


def test_trunks_are_shared_out_and_something_is_left_to_branch():
    branching = make_branching(config(samples=7, trunks=3), seed=0)
    assert [branching.trunks_of(sample)[:1] for sample in range(7)] == [[], [], [], [0], [1], [2], [0]]
    assert branching.trunks_of(4) == [1, 2, 0]
    assert rollout_config({"kind": "turns"}).num_trunks == 2
    assert rollout_config({"kind": "none"}).num_trunks == 4
    with pytest.raises(ValueError, match="none is left to branch"):
        rollout_config({"kind": "entropy", "num_trunks": 4})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("agent.target=agents.py:play",), "an agent of one's own"),
        (
            ("environment.id=polyturn/SolveCritiqueSelect-v0",),
            "SolveCritiqueSelect-v0 does not say that it can be rebuilt",
        ),
    ],
)
def test_what_cannot_branch_at_all_is_refused_before_a_run(overrides, words):
    with pytest.raises(ValueError, match=words):
        check_branching(load_config("quickstart", ["rollout.branching.kind=turns", *overrides]))
    check_branching(load_config("quickstart", ["rollout.branching.kind=turns"]))
