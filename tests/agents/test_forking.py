"""A branch begins where its trunk was: with its tokens, unsampled, in an environment that was rebuilt."""

import asyncio
import itertools
import pickle

import numpy as np
import pytest

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import play_tokens
from polyturn.agents.forking import BRANCH_REFUSED, fork_at, fork_turns
from polyturn.agents.ledger import UNKNOWN_EXPERT, UNSAMPLED_VERSION
from polyturn.agents.policy import Generation
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.envs.messages import Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.tools.tool import tool
from tests.support.chat_families import FAMILIES
from tests.support.play import call, thinking

TASK = Task(
    task_id="t",
    messages=(
        {"role": "user", "content": "Roll until it is a six."},
        {"role": "assistant", "content": "I shall."},
        {"role": "user", "content": "Go on."},
    ),
)


class Dice(ToolEnv):
    """Answers with numbers from its seed, by tool and by user, until it is told `done`."""

    is_replayable = True

    @tool
    def roll(self, text: str) -> str:
        """Roll a die."""
        self.turn_reward = 0.25
        return f"{text}: {int(self.np_random.integers(1000))}"

    def follow_up(self, message):
        if message.content == "done":
            return ()
        return [{"role": "user", "content": f"{message.content}? {int(self.np_random.integers(1000))}"}]

    def grade(self, message):
        return {"sum": float(self.np_random.integers(1000))}


class Writes:
    """Writes given texts; records experts as an engine does: of all tokens but the last."""

    def __init__(self, tokenizer, texts, *, number=0):
        self.tokenizer, self.texts, self.number = tokenizer, list(texts), number
        self.prompts, self.seeds = [], []

    async def generate(self, *, prompt_ids, sampling):
        await asyncio.sleep(0)
        self.prompts.append(prompt_ids.tolist())
        self.seeds.append(sampling.seed)
        self.number += 1
        ids = [*self.tokenizer.encode(self.texts.pop(0), add_special_tokens=False)]
        ids.append(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))
        tokens = np.array([*self.prompts[-1], *ids])
        return Generation(
            token_ids=ids,
            logprobs=[-float(self.number)] * len(ids),
            policy_versions=[self.number] * len(ids),
            finish_reason="stop",
            routed_experts=np.stack([tokens % 7, tokens % 5], axis=1)[sampling.routing_from : -1],
            support=SamplingSupport(sizes=[1] * len(ids), token_ids=ids),
        )


class KnowsTools(HermesDialect):
    """As a dialect that takes the types of arguments from the tools: it reads the trunk's turns as they were read."""

    def parse(self, text, *, in_thought=False, tools=()):
        assert [spec.name for spec in tools] == ["roll"]
        return super().parse(text, in_thought=in_thought, tools=tools)


def play(name, texts, *, env=None, fork=None, seed=1, number=0):
    tokenizer = FAMILIES[name].tokenizer
    policy = Writes(tokenizer, texts, number=number)
    episode = asyncio.run(
        play_tokens(
            env=env or Dice(),
            policy=policy,
            renderer=ChatRenderer(tokenizer),
            dialect=KnowsTools(),
            task=TASK,
            seed=seed,
            limits=EpisodeLimits(max_turns=8, max_tokens_per_turn=500, max_tokens_per_episode=5000),
            episode_id=f"g.{seed}.0",
            group_id="g",
            fork=fork,
        )
    )
    return episode, policy


PLAIN = [call("roll", "one"), "more", call("roll", "two"), "again", "done"]
THINKING = [
    thinking("First.", call("roll", "one")),
    thinking("Second.", "more"),
    thinking("Third.", call("roll", "two")),
    thinking("Fourth.", "again"),
    thinking("Last.", "done"),
]


@pytest.mark.parametrize(("name", "texts"), [("qwen2.5", PLAIN), ("qwen3", THINKING)])
def test_a_branch_that_goes_on_as_its_trunk_did_is_the_same_episode(name, texts):
    """Also where the template rewrites what came before: the ledger goes on from the segment that was newest then."""
    trunk, drawn = play(name, texts)
    assert trunk.outcome is Outcome.COMPLETED and fork_turns(trunk) == (1, 2, 3, 4)
    assert (len(trunk.segments) > 1) == (name == "qwen3")
    for turn in fork_turns(trunk):
        env = Dice()
        asyncio.run(env.reset_async(seed=77, options={"task": TASK}))
        fork = pickle.loads(pickle.dumps(fork_at(trunk, turn)))  # as another process gets it
        branch, policy = play(name, texts[turn:], env=env, fork=fork, seed=9, number=turn)
        assert (branch.parent_id, branch.branch_turn, branch.is_branch) == (trunk.episode_id, turn, True)
        assert policy.prompts == drawn.prompts[turn:], "the policy sees what it saw"
        assert not set(policy.seeds) & set(drawn.seeds), "and draws anew"
        for same in (
            "messages",
            "reward",
            "reward_parts",
            "num_turns",
            "turn_records",
            "num_tool_calls",
            "outcome",
        ):
            assert getattr(branch, same) == getattr(trunk, same), same
        newest = trunk.segments[-len(branch.segments) :]
        for ours, theirs in zip(branch.segments, newest, strict=True):
            assert ours.token_ids.tolist() == theirs.token_ids[: len(ours)].tolist()
            own = theirs.sampled[: len(ours)] & (theirs.turns[: len(ours)] >= turn)
            assert ours.sampled.tolist() == own.tolist()
            assert ours.logprobs.tolist() == np.where(own, theirs.logprobs[: len(ours)], 0).tolist()
            assert set(ours.policy_versions[~own]) == {UNSAMPLED_VERSION}
            assert ours.turns.tolist() == theirs.turns[: len(ours)].tolist()
            if own.any():
                assert len(ours) == len(theirs)
                assert np.array_equal(ours.routed_experts, theirs.routed_experts)
                assert (ours.support.sizes > 0).tolist() == own.tolist()


def test_another_answer_is_another_episode_with_the_same_beginning():
    trunk, _ = play("qwen2.5", PLAIN)
    branch, _ = play("qwen2.5", [call("roll", "three"), "done"], fork=fork_at(trunk, 2), seed=9)
    assert branch.messages[:7] == trunk.messages[:7] and branch.messages[7] != trunk.messages[7]
    assert branch.num_turns == 4 and branch.reward != trunk.reward
    assert (
        branch.num_sampled_tokens
        == sum(turn.sampled.sum() for turn in branch.segments)
        < trunk.num_sampled_tokens
    )
    assert fork_turns(branch) == (), "no branch of a branch"


def test_routing_that_the_engine_did_not_record_is_asked_for_again():
    trunk, _ = play("qwen2.5", PLAIN)
    fork = fork_at(trunk, 3)
    whole = trunk.segments[0].routed_experts.copy()
    fork.prefix.routed_experts[5:] = UNKNOWN_EXPERT
    branch, _ = play("qwen2.5", PLAIN[3:], fork=fork, seed=9)
    assert np.array_equal(branch.segments[0].routed_experts, whole)


class Forgets(Dice):
    """Says another number each time."""

    numbers = itertools.count()

    def follow_up(self, message):
        return () if message.content == "done" else [{"role": "user", "content": str(next(self.numbers))}]


class Ends(Dice):
    """Ends at another turn each time."""

    first = itertools.count()

    def begin(self, task):
        self.is_later = next(self.first) > 0
        return super().begin(task)

    @tool
    def roll(self, text: str) -> str:
        """Roll a die."""
        if self.is_later:
            self.finish()
        return text


@pytest.mark.parametrize("env", [Forgets, Ends])
def test_what_is_not_rebuilt_is_refused_and_samples_nothing(env):
    trunk, _ = play("qwen2.5", PLAIN, env=env())
    branch, policy = play("qwen2.5", [], env=env(), fork=fork_at(trunk, 3))
    assert branch.outcome is Outcome.FAILED and branch.stop_reason == BRANCH_REFUSED
    assert not policy.prompts
    untouched, _ = play("qwen2.5", PLAIN[1:], env=Dice(), fork=fork_at(play("qwen2.5", PLAIN)[0], 1))
    assert untouched.outcome is Outcome.COMPLETED, "before anything differs"
