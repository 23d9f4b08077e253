"""The row of scalars that a step leaves in `metrics.jsonl`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from polyturn.agents.episode import Episode, Outcome
from polyturn.rollout.evaluation.held_out import mean_metrics
from polyturn.rollout.filters import UNIFORM
from polyturn.rollout.groups import Group
from polyturn.rollout.scheduler import StepGroups
from polyturn.rollout.user_faults import SUCCESS_REWARD, user_fault_share
from polyturn.tools.types import ToolUsage
from polyturn.trainer.credit.estimates import StepCredit
from polyturn.trainer.credit.off_policy import largest_logprob_difference
from polyturn.trainer.data.prefix_tree import prefix_order
from polyturn.trainer.data.samples import TrainSample, UpdateReport
from polyturn.trainer.weight_sync import SyncReport


def step_metrics(
    *,
    taken: StepGroups,
    credit: StepCredit,
    reports: Sequence[UpdateReport],
    seconds: Mapping[str, float],
    total_seconds: float,
    version: int,
    sync: SyncReport | None,
    overlaps: bool = False,
) -> dict[str, float]:
    """All figures of one step.

    Args:
        version: the policy's after the step; its tokens are of earlier ones.
        sync: what sending the weights after the step came to; None: they were not sent.
        overlaps: whether episodes of other steps are played meanwhile.
    """
    groups = taken.groups
    episodes = [episode for group in groups for episode in group.episodes]
    last, num_updates = reports[0].metrics[-1], len(reports[0].metrics)
    before = version - num_updates
    # Where steps overlap, what was waited for them says nothing of how long they were played.
    rollout_seconds = total_seconds if overlaps else seconds["generate"] + seconds["tools"]
    num_sampled = sum(episode.num_sampled_tokens for episode in episodes)
    num_tokens = sum(len(segment) for episode in episodes for segment in episode.segments)
    row = {
        **episode_metrics(episodes),
        **ledger_metrics(episodes),
        "group/num": float(len(groups)),
        **credit.metrics,
        "group/uniform": uniform_share(groups, num_filtered=taken.num_filtered.get(UNIFORM, 0)),
        **user_metrics(groups),
        "rollout/num_dropped": float(sum(group.num_dropped for group in groups)),
        **schedule_metrics(taken),
        **branch_metrics(episodes),
        "rollout/failed_attempts": failed_share(groups),
        "rollout/sampled_tokens": float(num_sampled),
        "rollout/tokens_per_second": num_sampled / rollout_seconds if rollout_seconds > 0 else 0.0,
        "train/tokens": float(num_tokens),
        "train/tokens_per_second": num_tokens / seconds["train"] if seconds["train"] > 0 else 0.0,
        "train/initial_kl": reports[0].initial_kl,
        "train/policy_kl": last["policy_kl"],
        "train/logprob_difference_max": largest_logprob_difference(credit.samples, version=before)[0],
        "train/rank_imbalance": rank_imbalance(credit.samples, reports),
        **{
            f"shared_prefix/{name}_saved": statistics.fmean(report.shared_prefix[name] for report in reports)
            for name in reports[0].shared_prefix
        },
        **sync_metrics(sync),
        "policy/version": float(version),
        **staleness_metrics(episodes, version=before, updates_per_step=num_updates),
        "seconds/step": total_seconds,
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
    }
    for name in (
        "loss",
        "entropy",
        "entropy_coefficient",
        "clip_fraction",
        "grad_norm",
        "learning_rate",
        "behavior_kl",
        "reference_kl",
    ):
        found = [metrics[name] for metrics in reports[0].metrics if name in metrics]
        if found:
            row[f"train/{name}"] = statistics.fmean(found)
    row.update(environment_metrics(episodes))
    of_environments = {
        name for metrics in reports[0].metrics for name in metrics if name.startswith("environment/")
    }
    for name in sorted(of_environments):
        row[name] = statistics.fmean(metrics[name] for metrics in reports[0].metrics if name in metrics)
    row["train/skipped_updates"] = sum(metrics.get("skipped", 0.0) for metrics in reports[0].metrics)
    row["train/empty_updates"] = float(reports[0].num_empty)
    row.update(routing_metrics(credit.samples))
    row.update(support_metrics(credit.samples))
    critic_names = {name for metrics in reports[0].metrics for name in metrics if name.startswith("critic/")}
    for name in sorted(critic_names):
        row[name] = statistics.fmean(metrics[name] for metrics in reports[0].metrics if name in metrics)
    return row


def sync_metrics(sync: SyncReport | None) -> dict[str, float]:
    """What went to the engines, how long it took, and how long they could not generate meanwhile."""
    if sync is None:
        return {"sync/bytes": 0.0, "sync/seconds": 0.0, "sync/pause_seconds": 0.0}
    figures = {
        "sync/bytes": float(sync.num_bytes),
        "sync/seconds": sync.seconds,
        "sync/pause_seconds": sync.pause_seconds,
    }
    if sync.adapter_correlation is not None:
        figures["sync/adapter_correlation"] = sync.adapter_correlation
    return figures


def user_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What simulated users are to blame for: failed attempts, and the share of the episodes without success.

    The share is absent where there is no such episode, and both where no user took part.
    """
    share = user_fault_share(episode for group in groups for episode in group.episodes)
    num_faults = sum(group.num_user_faults for group in groups)
    figures = {} if share is None else {"user/fault_share": share}
    return figures | ({"user/failed_attempts": float(num_faults)} if figures or num_faults else {})


def uniform_share(groups: Sequence[Group], *, num_filtered: int = 0) -> float:
    """The share of the groups of several episodes whose rewards are all the same; 0 where there are none.

    `num_filtered` more of them were completed, and left out of the step.
    """
    several = [{episode.reward for episode in group.episodes} for group in groups if len(group.episodes) > 1]
    num_uniform = num_filtered + sum(len(rewards) == 1 for rewards in several)
    return num_uniform / (num_filtered + len(several)) if num_uniform else 0.0


def failed_share(groups: Sequence[Group]) -> float:
    """The share of the attempts that failed; 0 where none was made."""
    num_failed = sum(group.num_retries + group.num_dropped for group in groups)
    num_attempts = num_failed + sum(len(group.episodes) for group in groups)
    return num_failed / num_attempts if num_attempts else 0.0


def rank_imbalance(samples: Sequence[TrainSample], reports: Sequence[UpdateReport]) -> float:
    """Tokens of the busiest data-parallel rank over those of the mean one; 1 where nothing was trained on."""
    lengths = {sample.sample_id: len(sample) for sample in samples}
    loads = [sum(lengths[name] for name in report.trained_tokens) for report in reports]
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def routing_metrics(samples: Sequence[TrainSample]) -> dict[str, float]:
    """Which part of the tokens, and of the sampled ones, has a record of its experts; nothing where none is kept."""
    if all(sample.routed_experts is None for sample in samples):
        return {}
    recorded = [
        np.zeros(len(sample), dtype=np.bool_)
        if sample.routed_experts is None
        else (sample.routed_experts >= 0).all(1)
        for sample in samples
    ]
    sampled = np.concatenate([sample.sampled for sample in samples])
    found = np.concatenate(recorded)
    return {"routing/replayed": float(found.mean()), "routing/sampled_replayed": float(found[sampled].mean())}


def support_metrics(samples: Sequence[TrainSample]) -> dict[str, float]:
    """How many tokens a sampled one was drawn from, where some were left out; nothing where none ever was."""
    sizes = [sample.support.sizes[sample.sampled] for sample in samples if sample.support is not None]
    restricted = np.concatenate([np.zeros(0, dtype=np.int32), *sizes])
    restricted = restricted[restricted > 0]
    if not len(restricted):
        return {}
    return {
        "sampling/support_mean": float(restricted.mean()),
        "sampling/support_max": float(restricted.max()),
    }


def episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Rewards, turns, tools and outcomes of the episodes that have a reward."""
    rewards = [episode.reward for episode in episodes if episode.reward is not None]
    if not rewards:
        return {"episode/num": 0.0}
    parts = sorted({name for episode in episodes for name in episode.reward_parts})
    roles = sorted({role for episode in episodes for role in episode.role_rewards})
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        **{
            f"reward/{part}": statistics.fmean(episode.reward_parts.get(part, 0.0) for episode in episodes)
            for part in parts
        },
        **{
            f"role/{role}": statistics.fmean(
                episode.role_rewards[role] for episode in episodes if role in episode.role_rewards
            )
            for role in roles
        },
        **{f"env/{name}": value for name, value in mean_metrics(episodes).items()},
        "success/mean": statistics.fmean(reward >= SUCCESS_REWARD for reward in rewards),
        "episode/num": float(len(episodes)),
        "episode/turns": statistics.fmean(episode.num_turns for episode in episodes),
        "episode/sampled_tokens": statistics.fmean(episode.num_sampled_tokens for episode in episodes),
        "episode/tool_calls": statistics.fmean(episode.num_tool_calls for episode in episodes),
        "episode/tool_errors": statistics.fmean(episode.num_tool_errors for episode in episodes),
        "episode/recovered_calls": statistics.fmean(episode.num_recovered_calls for episode in episodes),
        **{
            f"outcome/{outcome}": statistics.fmean(episode.outcome is outcome for episode in episodes)
            for outcome in (Outcome.COMPLETED, Outcome.TRUNCATED)
        },
        **tool_metrics(episodes),
    }


def environment_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What the episodes of each environment came to, where a step has several: `environment/ID/NAME`."""
    environments = sorted({episode.env_id for episode in episodes})
    if len(environments) < 2:
        return {}
    told = (
        "reward/mean",
        "reward/std",
        "success/mean",
        "episode/num",
        "episode/turns",
        "episode/sampled_tokens",
    )
    row: dict[str, float] = {}
    for environment in environments:
        of_one = episode_metrics([episode for episode in episodes if episode.env_id == environment])
        row |= {f"environment/{environment}/{name}": of_one[name] for name in told if name in of_one}
    return row


def ledger_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """What became of the tokens of the episodes in their segments; nothing where there are no segments.

    A token is repeated where an earlier one of the same episode stands behind the same tokens, as in a branch; masked
    where it was not sampled in its segment; lost where an engine sampled it and no segment has it as sampled.
    """
    lengths = [[len(segment) for segment in episode.segments] for episode in episodes]
    num_tokens = sum(map(sum, lengths))
    if not num_tokens:
        return {}
    num_repeated = sum(
        sum(prefix_order([segment.token_ids for segment in episode.segments])[1])
        for episode in episodes
        if len(episode.segments) > 1
    )
    num_sampled = sum(episode.num_sampled_tokens for episode in episodes)
    return {
        "ledger/segments": statistics.fmean(map(len, lengths)),
        "ledger/repeated": num_repeated / num_tokens,
        "ledger/masked": 1.0 - num_sampled / num_tokens,
        "ledger/lost_tokens": float(sum(episode.num_lost_tokens for episode in episodes)),
    }


def tool_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """By tool, over all episodes: calls, failures, timeouts and cost in sum, seconds of a call and of the wait."""
    sums: dict[str, ToolUsage] = {}
    for episode in episodes:
        for name, usage in episode.tools.items():
            sums[name] = sums.get(name, ToolUsage()) + usage
    return {
        f"tool/{name}/{figure}": float(value)
        for name, usage in sorted(sums.items())
        for figure, value in (
            ("calls", usage.num_calls),
            ("failures", usage.num_failures),
            ("timeouts", usage.num_timeouts),
            ("cost", usage.cost),
            ("seconds_mean", usage.mean_seconds),
            ("seconds_max", usage.max_seconds),
            ("queue_seconds", usage.queue_s),
        )
    }


def branch_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """How many episodes branch from others, and how many could not; nothing where none was to."""
    meant = [episode.is_branch for episode in episodes if episode.parent_id]
    if not meant:
        return {}
    return {
        "rollout/branches": float(sum(meant)),
        "rollout/branches_refused": float(len(meant) - sum(meant)),
    }


def schedule_metrics(taken: StepGroups) -> dict[str, float]:
    """How the groups of a step came about."""
    return {
        "rollout/in_play": float(taken.num_in_play),
        "rollout/num_stale": float(taken.num_stale),
        "rollout/gave_up": float(taken.gave_up),
        "rollout/num_filtered": float(sum(taken.num_filtered.values())),
        **{f"rollout/filtered/{reason}": float(count) for reason, count in taken.num_filtered.items()},
        **{f"rollout/failed/{reason}": float(count) for reason, count in taken.num_failed.items()},
    }


def staleness_metrics(
    episodes: Sequence[Episode], *, version: int, updates_per_step: int
) -> dict[str, float]:
    """How old the sampled tokens are that a step is trained on.

    `policy/staleness_max` is in updates: `version`, the trainer's at the step's start, minus the oldest token's;
    `staleness/max` and `staleness/mean` are in steps, as `rollout.max_staleness`.
    """
    columns = [
        version - segment.policy_versions[segment.sampled]
        for episode in episodes
        for segment in episode.segments
        if segment.num_sampled
    ]
    ages = np.concatenate(columns) if columns else np.zeros(1, dtype=np.int64)
    steps = np.ceil(ages / updates_per_step).clip(0)
    return {
        "policy/staleness_max": float(ages.max()),
        "staleness/max": float(steps.max()),
        "staleness/mean": float(steps.mean()),
    }
