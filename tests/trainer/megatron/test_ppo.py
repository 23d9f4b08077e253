"""PPO with a critic through the trainer's own code: episodes in, values, advantages, updates; without engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import Generation
from polyturn.configs.loading.loader import load_config
from polyturn.configs.schema.run import RunConfig
from polyturn.trainer.credit.estimates import StepCredit, estimate_advantages, make_samples
from polyturn.trainer.data.balance import cut_into_updates, share_out
from polyturn.trainer.data.samples import UpdateReport
from polyturn.trainer.ranks.rank import PolicyRank
from polyturn.trainer.ranks.trainer import Trainer
from polyturn.trainer.run.cluster import reserve

pytestmark = pytest.mark.stack

NUM_EPISODES = 48
PAYS = 11
"""The second token of a prompt that pays; 10 is that of one that does not."""
OVERRIDES = (
    "trainer.algorithm.advantage.kind=ppo_gae",
    "trainer.parallel.data=1",
    "rollout.prompts_per_step=24",
    "rollout.samples_per_prompt=2",
    "trainer.global_batch_size=24",
    "trainer.updates_per_step=2",
    "trainer.optimizer.learning_rate=0.003",
    "trainer.critic.optimizer.learning_rate=0.003",
    "trainer.max_tokens_per_gpu=256",
)


class Player:
    """Plays episodes with the rank's own weights, by transformers: a prompt, two tokens, an observation, two tokens.

    Where the prompt pays, each answer token below 150 pays 0.5, at random about one of two.
    """

    def __init__(self, path: Path) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(0)

    def play(self, rank: PolicyRank, step: int) -> list[Episode]:
        self._model.load_state_dict(dict(rank.policy.named_hf_tensors()), strict=False)
        pays = torch.randint(0, 2, (NUM_EPISODES,), generator=self._generator)
        tokens = torch.stack([torch.full_like(pays, 5), PAYS - 1 + pays, torch.full_like(pays, 7)], 1)
        logprobs = []
        for position in range(4):
            if position == 2:
                tokens = torch.cat([tokens, torch.full((NUM_EPISODES, 2), 9)], 1)
            with torch.no_grad():
                scores = self._model(input_ids=tokens).logits[:, -1].log_softmax(-1)
            drawn = torch.multinomial(scores.exp(), 1, generator=self._generator)
            logprobs.append(scores.gather(1, drawn))
            tokens = torch.cat([tokens, drawn], 1)
        return [
            self._episode(f"{step}.{i}", row.tolist(), lp.tolist(), int(pay))
            for i, (row, lp, pay) in enumerate(zip(tokens, torch.cat(logprobs, 1), pays, strict=True))
        ]

    def _episode(self, name: str, tokens: list[int], logprobs: list[float], pays: int) -> Episode:
        ledger = Ledger()
        answers = (tokens[3:5], tokens[7:9])
        for observation, answer, scores in zip(
            (tokens[:3], tokens[5:7]), answers, (logprobs[:2], logprobs[2:]), strict=True
        ):
            ledger.append_observation(observation)
            ledger.append_generation(
                Generation(
                    token_ids=tuple(answer),
                    logprobs=tuple(scores),
                    policy_versions=(0, 0),
                    finish_reason="stop",
                )
            )
        hits = sum(token < 150 for answer in answers for token in answer)
        return Episode(
            episode_id=name,
            group_id=name,
            env_id="env",
            task_id="task",
            seed=0,
            outcome=Outcome.COMPLETED,
            stop_reason="terminated",
            reward=0.5 * hits * pays,
            segments=(ledger.to_segment(),),
        )


def make_config(path: Path, *overrides: str) -> RunConfig:
    return load_config("quickstart", [*OVERRIDES, f"model.path={path}", *overrides])


def open_rank(path: Path, *overrides: str) -> PolicyRank:
    rank = PolicyRank(config=make_config(path, *overrides), model_path=str(path), rank=0)
    rank.build("127.0.0.1", 0)
    return rank


def take_step(
    trainer: PolicyRank | Trainer, config: RunConfig, episodes: list[Episode]
) -> tuple[StepCredit, UpdateReport]:
    """What the driver does in a step, with one rank of the policy, alone or in a group."""
    samples = make_samples(episodes)
    if isinstance(trainer, Trainer):
        scored = trainer.score(samples)
    else:
        columns: dict[str, Any] = trainer.score(samples)
        scored = {s.sample_id: replace(s, **columns[s.sample_id]) for s in samples}
    estimates = estimate_advantages(episodes, scored, config.trainer.algorithm)
    updates = cut_into_updates(estimates.samples, config.trainer.updates_per_step)
    if isinstance(trainer, Trainer):
        return estimates, trainer.update(updates)[0]
    return estimates, trainer.update(share_out(updates, 1)[0])


def test_ppo_learns_with_a_critic(make_model):
    path = make_model("qwen3", tied=False)
    rank, player = open_rank(path), Player(path)
    rewards: list[float] = []
    losses: list[float] = []
    explained: list[float] = []
    try:
        for step in range(14):
            episodes = player.play(rank, step)
            estimates, report = take_step(rank, rank._config, episodes)
            paying = [episode for episode in episodes if episode.segments[0].token_ids[1] == PAYS]
            rewards.append(np.mean([episode.reward for episode in paying]))
            losses.append(np.mean([metrics["critic/loss"] for metrics in report.metrics]))
            explained.append(estimates.metrics["critic/explained_variance"])
            assert report.metrics[0]["policy_kl"] < 1e-9, (
                "the first update starts from the policy that played"
            )
            assert sum(report.trained_tokens.values()) == 4 * NUM_EPISODES
    finally:
        rank.close()
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses
    assert abs(explained[0]) < 0.2 and np.mean(explained[-3:]) > 0.5, explained
    assert np.mean(rewards[:2]) < 1.2 and np.mean(rewards[-3:]) > 1.4, rewards


def test_a_critic_with_ranks_of_its_own_does_what_a_shared_one_does(ray_session, make_model, tmp_path):
    path = make_model()
    rank, player = open_rank(path), Player(path)
    steps = [player.play(rank, step) for step in range(2)]
    expected = [take_step(rank, rank._config, episodes) for episodes in steps]
    rank.close()

    config = make_config(path, "trainer.critic.placement=own")
    reservation = reserve(config)
    group = Trainer(config, model_path=path, reservation=reservation)
    try:
        group.build()
        for index, (episodes, (estimates, report)) in enumerate(zip(steps, expected, strict=True)):
            found_estimates, found = take_step(group, group._config, episodes)
            assert found_estimates.metrics == pytest.approx(estimates.metrics, abs=1e-6)
            for ours, theirs in zip(found.metrics, report.metrics, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
            if index == 0:
                group.begin_checkpoint(tmp_path / "step")
                group.finish_checkpoint()
                assert group.find_checkpoint_faults(tmp_path / "step") == []
        group.load_checkpoint(tmp_path / "step")
        _, again = take_step(group, group._config, steps[1])
        assert again.metrics == found.metrics
    finally:
        group.close()
        reservation.release()


def test_the_policy_waits_while_the_critic_warms_up_and_both_resume(make_model, tmp_path):
    path = make_model()
    rank, player = open_rank(path, "trainer.critic.warmup_steps=1"), Player(path)
    steps = [player.play(rank, step) for step in range(3)]
    before = {name: tensor.clone() for name, tensor in rank.policy.named_hf_tensors()}

    def weights(of: PolicyRank) -> dict[str, torch.Tensor]:
        critic: Any = of.critic
        state = {
            f"critic.{name}": param.detach().clone() for name, param in critic.engine.model.named_parameters()
        }
        return {**state, **{name: tensor.clone() for name, tensor in of.policy.named_hf_tensors()}}

    _, report = take_step(rank, rank._config, steps[0])
    assert set(report.metrics[0]) == {
        "policy_kl",
        *(key for key in report.metrics[0] if key.startswith("critic/")),
    }
    assert sum(report.trained_tokens.values()) == 4 * NUM_EPISODES
    for name, tensor in rank.policy.named_hf_tensors():
        assert torch.equal(tensor, before[name]), "the policy moved during the warm-up"
    assert rank.critic.num_updates == 2 and rank.policy.num_updates == 0
    take_step(rank, rank._config, steps[1])
    assert rank.critic.num_updates == 4 and rank.policy.num_updates == 2
    rank.policy.begin_checkpoint(tmp_path / "step")
    rank.policy.checkpoints.finish()
    estimates, report = take_step(rank, rank._config, steps[2])
    expected = weights(rank)
    rank.close()

    rank = open_rank(path, "trainer.critic.warmup_steps=1")
    try:
        rank.policy.load_checkpoint(tmp_path / "step")
        assert rank.critic.num_updates == 4
        resumed_estimates, resumed = take_step(rank, rank._config, steps[2])
        assert resumed_estimates.metrics == estimates.metrics and resumed.metrics == report.metrics
        for name, tensor in weights(rank).items():
            assert torch.equal(tensor, expected[name]), name
    finally:
        rank.close()
