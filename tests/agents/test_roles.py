"""Several roles, one policy: every role has a ledger of its own, and every sampled token is in exactly one of them."""

import asyncio

import pyarrow.parquet as pq

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import HermesDialect
from polyturn.agents.episode import Outcome
from polyturn.agents.episode_loop import play_messages, play_tokens
from polyturn.agents.policies.scripted import ScriptedPolicy
from polyturn.agents.policy import Generation
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.journal import decode_episode, encode_episode
from polyturn.rollout.store import read_episodes, write_episodes

ROUNDS = 3


class Debate(ToolEnv):
    """Two roles speak in turn, each hearing only the other's last message; `a` is paid, `b` is not."""

    def tasks(self, split):
        return ListTasks([Task.from_prompt("t", "Debate.")])

    def begin(self, task):
        self.heard = []
        self.role = "a"
        return [{"role": "system", "content": "You are a."}, {"role": "user", "content": "Begin."}]

    def follow_up(self, message):
        self.heard.append(message.content)
        if len(self.heard) == 2 * ROUNDS:
            return []
        self.role = "ba"[len(self.heard) % 2 == 0]
        first = [{"role": "system", "content": "You are b."}] if len(self.heard) == 1 else []
        return [*first, {"role": "user", "content": f"The other says: {message.content}"}]

    def grade(self, message):
        self.role_rewards = {"a": 1.0, "b": 0.0}
        return {"agreement": 0.5}


class Numbering:
    """A token policy whose n-th generation says "n", and which keeps what it was asked."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.requests = []
        self.generations = []

    async def generate(self, *, prompt_ids, sampling):
        number = len(self.generations)
        ids = [
            *self.tokenizer.encode(f"word {number}", add_special_tokens=False),
            self.tokenizer.eos_token_id,
        ]
        generation = Generation(
            token_ids=tuple(ids),
            logprobs=tuple(-0.25 * (number + 1) for _ in ids),
            policy_versions=(number,) * len(ids),
            finish_reason="stop",
        )
        self.requests.append(prompt_ids.tolist())
        self.generations.append(generation)
        return generation


def play(policy, tokenizer, *, max_turns=20):
    return asyncio.run(
        play_tokens(
            env=Debate(),
            policy=policy,
            renderer=ChatRenderer(tokenizer),
            dialect=HermesDialect(),
            task=None,
            seed=1,
            limits=EpisodeLimits(max_turns=max_turns, max_tokens_per_episode=10_000),
            episode_id="g.0.0",
            group_id="g",
        )
    )


def test_each_role_has_its_own_tokens(chatml):
    policy = Numbering(chatml)
    episode = play(policy, chatml)
    assert (episode.outcome, episode.reward, episode.role_rewards) == (
        Outcome.COMPLETED,
        0.5,
        {"a": 1.0, "b": 0.0},
    )
    assert [segment.role for segment in episode.segments] == ["a", "b"]
    for position, segment in enumerate(episode.segments):
        own = range(position, 2 * ROUNDS, 2)
        sampled = [t for t, s in zip(segment.token_ids, segment.sampled, strict=True) if s]
        assert sampled == [t for number in own for t in policy.generations[number].token_ids]
        for number in own:
            prompt = policy.requests[number]
            assert segment.token_ids[: len(prompt)].tolist() == prompt, (
                "a prompt that is not the role's ledger so far"
            )
        text = chatml.decode(segment.token_ids)
        assert f"You are {segment.role}." in text and f"You are {'ba'[position]}." not in text
        assert sorted(set(segment.turns)) == list(range(ROUNDS))
    assert episode.num_sampled_tokens == sum(len(g.token_ids) for g in policy.generations)


def test_the_transcript_says_who_heard_and_said_what(chatml):
    episode = play(Numbering(chatml), chatml)
    assert [(m["role"], m["name"]) for m in episode.messages[:5]] == [
        ("system", "a"),
        ("user", "a"),
        ("assistant", "a"),
        ("system", "b"),
        ("user", "b"),
    ]


def test_the_record_survives_journal_and_store(chatml, tmp_path):
    episode = play(Numbering(chatml), chatml)
    assert decode_episode(encode_episode(episode)) == episode
    path = tmp_path / "step.parquet"
    write_episodes(path, [episode], step=1, advantages={"g.0.0/a": 1.5, "g.0.0/b": -1.5})
    assert read_episodes(path) == [episode]
    columns = pq.read_table(path, columns=["role", "advantage", "role_rewards"]).to_pydict()
    assert (columns["role"], columns["advantage"]) == (["a", "b"], [1.5, -1.5])
    assert columns["role_rewards"][1] == [("a", 1.0), ("b", 0.0)]


def test_a_role_that_did_not_come_to_speak_has_no_segment(chatml):
    episode = play(Numbering(chatml), chatml, max_turns=1)
    assert (episode.outcome, [segment.role for segment in episode.segments]) == (Outcome.TRUNCATED, ["a"])
    assert (episode.reward, episode.reward_of("a")) == (0.0, 0.0)


def test_a_policy_that_speaks_in_messages_hears_what_its_role_hears():
    heard = []

    def script(messages, tools):
        heard.append([message["content"] for message in messages])
        return AssistantMessage(content=f"word {len(heard) - 1}")

    episode = asyncio.run(
        play_messages(
            env=Debate(),
            policy=ScriptedPolicy(script),
            task=None,
            seed=1,
            limits=EpisodeLimits(max_turns=20),
            episode_id="g.0.0",
            group_id="g",
        )
    )
    assert episode.reward == 0.5
    assert heard[2] == ["You are a.", "Begin.", "word 0", "The other says: word 1"]
    assert heard[1] == ["You are b.", "The other says: word 0"]
