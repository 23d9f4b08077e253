"""Random trees of segments: every sampled token is trained exactly once, and an episode counts once in its group."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import UNSAMPLED_VERSION, Ledger
from polyturn.agents.policy import Generation
from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.trainer.credit.estimates import estimate_advantages, make_samples
from polyturn.trainer.data.balance import cut_into_updates, share_out
from polyturn.trainer.run.metrics import ledger_metrics


@dataclass
class Grown:
    """A ledger that grew at random, and what was drawn while it did. Each drawn token has a logprob of its own."""

    ledger: Ledger = field(default_factory=Ledger)
    drawn: list[tuple[int, float, int]] = field(default_factory=list)
    ancestors: list[list[int]] = field(default_factory=list)
    """All that a branch may begin with: the tokens of each segment so far."""

    def sample(self, count: int) -> None:
        turn = len(self.drawn)
        tokens = [(turn + i) % 7 for i in range(count)]
        logprobs = [-1.0 - (turn + i) / 64 for i in range(count)]
        self.drawn += [(token, logprob, turn) for token, logprob in zip(tokens, logprobs, strict=True)]
        self.ledger.append_generation(
            Generation(
                token_ids=tokens, logprobs=logprobs, policy_versions=[turn] * count, finish_reason="stop"
            )
        )

    def branch(self, of: int, kept: int, rewritten: list[int]) -> None:
        """As a template, a compaction or a sub-agent does: the beginning of any segment, and then something else."""
        self.ancestors.append(self.ledger.token_ids.tolist())
        parent = self.ancestors[of % len(self.ancestors)]
        self.ledger.branch([*parent[: kept % (len(parent) + 1)], *rewritten])

    def episode(self, name: str, group: str, reward: float, *, lost: int = 0) -> Episode:
        return Episode(
            episode_id=name,
            group_id=group,
            env_id="env",
            task_id="task",
            seed=0,
            outcome=Outcome.COMPLETED,
            stop_reason="terminated",
            reward=reward,
            num_drawn_tokens=len(self.drawn) + lost,
            segments=self.ledger.to_segments(),
        )


tokens = st.lists(st.integers(0, 6), max_size=4)


@st.composite
def trees(draw) -> Grown:
    grown = Grown()
    grown.ledger.append_observation([9, *draw(tokens)])
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(st.sampled_from(["sample", "sample", "observe", "branch"]))
        if kind == "sample":
            grown.sample(draw(st.integers(1, 4)))
        elif kind == "observe":
            grown.ledger.append_observation(draw(tokens))
        else:
            grown.branch(draw(st.integers(0, 5)), draw(st.integers(1, 30)), [8, *draw(tokens)])
    grown.sample(1)
    return grown


@settings(max_examples=50, deadline=None)
@given(grown=st.lists(trees(), min_size=1, max_size=3), tree=st.booleans(), num_ranks=st.integers(1, 3))
def test_every_sampled_token_is_trained_once_and_an_episode_counts_once(grown, tree, num_ranks):
    """From the ledger to the share of each rank, with the branches in packs side by side or as a tree."""
    episodes = [one.episode(f"e{i}", "g", float(i)) for i, one in enumerate(grown)]
    samples = make_samples(episodes)
    updates = cut_into_updates(samples, 2)
    trained = Counter()
    for share in share_out(updates, num_ranks, shared_prefix="tree" if tree else "off"):
        for update in share:
            for sample in update.samples:
                for at in np.flatnonzero(sample.sampled):
                    trained[
                        sample.sequence_id,
                        int(sample.token_ids[at]),
                        float(sample.behavior_logprobs[at]),
                        int(sample.policy_versions[at]),
                    ] += 1
    assert trained == Counter((f"e{i}", *token) for i, one in enumerate(grown) for token in one.drawn)
    assert sum(update.counts.num_sequences for update in updates) == len(grown)
    assert sum(update.counts.num_tokens for update in updates) == sum(len(one.drawn) for one in grown)


@settings(max_examples=50, deadline=None)
@given(
    grown=trees(), other=trees(), rewards=st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0]))
)
def test_a_branched_episode_is_compared_as_one(grown, other, rewards):
    """Its advantage is that of an episode with the same reward in one segment, on each of its tokens."""
    algorithm = AlgorithmConfig()
    straight = Grown()
    straight.ledger.append_observation([9])
    straight.sample(len(grown.drawn))
    found = {}
    for name, one in (("branched", grown), ("straight", straight)):
        episodes = [one.episode("a", "g", rewards[0]), other.episode("b", "g", rewards[1])]
        scored = {sample.sample_id: sample for sample in make_samples(episodes)}
        found[name] = estimate_advantages(episodes, scored, algorithm)
    assert found["branched"].advantages == pytest.approx(found["straight"].advantages)
    by_episode = {}
    for sample in found["branched"].samples:
        by_episode.setdefault(sample.sequence_id, set()).update(sample.advantages[sample.sampled].tolist())
    assert {name: len(values) for name, values in by_episode.items()} == dict.fromkeys(by_episode, 1)


@settings(max_examples=50, deadline=None)
@given(grown=trees(), lost=st.integers(0, 3))
def test_what_is_told_of_a_ledger_is_what_is_in_it(grown, lost):
    episode = grown.episode("e", "g", 1.0, lost=lost)
    lines = [segment.token_ids.tolist() for segment in episode.segments]
    num_tokens = sum(map(len, lines))
    # Counted by brute force: each token is a path from the root.
    paths = {tuple(line[:end]) for line in lines for end in range(1, len(line) + 1)}
    assert ledger_metrics([episode]) == pytest.approx(
        {
            "ledger/segments": len(lines),
            "ledger/repeated": 1 - len(paths) / num_tokens,
            "ledger/masked": 1 - len(grown.drawn) / num_tokens,
            "ledger/lost_tokens": lost,
        }
    )
    for segment in episode.segments:
        assert (segment.policy_versions[~segment.sampled] == UNSAMPLED_VERSION).all()


def test_without_segments_nothing_is_told():
    assert ledger_metrics([]) == {}
