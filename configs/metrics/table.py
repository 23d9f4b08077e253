"""Every metric of a row of `metrics.jsonl`: the one place in which a name is declared.

In a name `*` stands for whatever a run has there, and `[*/]` for a part that may be missing. The table in
docs/metrics.md is made of this one, which is why the module is long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Entry = tuple[str, str, str]
"""A name, its unit, what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A figure of a step."""

    name: str
    """Its key in the row, or the pattern of its keys."""
    unit: str
    meaning: str
    owner: str
    """The module that makes it."""
    page: str
    """Where it is explained: a file of docs/, with the heading's anchor where there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Healthy:
    """Where a figure should be."""

    low: float | None = None
    high: float | None = None
    otherwise: str = ""
    """What a value elsewhere means, and what to do about it."""

    def holds(self, value: float) -> bool:
        """Whether a value is there. One that is no number is not."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    @property
    def text(self) -> str:
        """As a table shows it."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g}" if self.low == self.high else f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low is not None else f"at most {self.high:g}"


def _of(owner: str, page: str, *entries: Entry) -> Iterator[Metric]:
    for name, unit, meaning in entries:
        yield Metric(name=name, unit=unit, meaning=meaning, owner=owner, page=page)


STEP_METRICS = "trainer/run/metrics.py"

METRICS: tuple[Metric, ...] = (
    *_of(
        STEP_METRICS,
        "rewards.md",
        ("reward/mean", "reward", "mean reward of the step's episodes"),
        ("reward/std", "reward", "their standard deviation"),
        ("reward/*", "reward", "mean of one part of a composite reward, before its weight"),
        ("role/*", "reward", "mean reward of one role, in environments of several agents"),
        ("success/mean", "share", "episodes that are paid 1 or more"),
        (
            "env/*",
            "as the environment says",
            "mean of a figure that environment or agent counts and nobody is paid for",
        ),
    ),
    *_of(
        STEP_METRICS,
        "training.md",
        ("episode/num", "episodes", "in the step"),
        ("episode/turns", "turns", "of an episode, in the mean"),
        ("episode/sampled_tokens", "tokens", "that the policy wrote in an episode, in the mean"),
        ("episode/tool_calls", "calls", "of an episode, in the mean"),
        ("episode/tool_errors", "calls", "of an episode that failed, in the mean"),
        ("episode/recovered_calls", "calls", "of an episode that had a slip with one meaning, and were made"),
        ("outcome/completed", "share", "episodes that came to their end"),
        ("outcome/truncated", "share", "episodes that a limit ended"),
        ("tool/*/calls", "calls", "of one tool, in all episodes of the step"),
        ("tool/*/failures", "calls", "of them that failed"),
        ("tool/*/timeouts", "calls", "of them that took too long"),
        ("tool/*/cost", "as the tool says", "of them in sum"),
        ("tool/*/seconds_mean", "s", "of a call"),
        ("tool/*/seconds_max", "s", "of the longest call"),
        ("tool/*/queue_seconds", "s", "that calls waited for a slot, in sum"),
        (
            "rollout/failed_attempts",
            "share",
            "attempts at an episode that failed, and were played again or dropped",
        ),
        ("rollout/num_dropped", "episodes", "given up after `rollout.max_retries` failures"),
        ("user/failed_attempts", "attempts", "whose simulated user could not be played"),
        (
            "user/fault_share",
            "share",
            "of the episodes without success, those whose simulated user broke its script",
        ),
    ),
    *_of(
        STEP_METRICS,
        "training.md#the-figures-of-a-steps-tokens",
        ("ledger/segments", "segments", "of an episode, in the mean; 1 where nothing branched"),
        ("ledger/repeated", "share", "tokens that stand in an earlier segment of their episode too"),
        ("ledger/masked", "share", "tokens that were not sampled where they stand, and are not trained on"),
        ("ledger/lost_tokens", "tokens", "that an engine sampled and no segment has"),
    ),
    *_of(
        STEP_METRICS,
        "scheduling.md",
        ("group/num", "groups", "in the step"),
        ("group/uniform", "share", "groups whose rewards are all the same, filtered ones included"),
        ("rollout/in_play", "groups", "under way when the step was taken"),
        ("rollout/num_stale", "groups", "thrown away, as their tokens had become too old"),
        ("rollout/gave_up", "0 or 1", "the filter left too few groups, and the step makes do with them"),
        ("rollout/num_filtered", "groups", "that `rollout.filter` took"),
        ("rollout/filtered/*", "groups", "of them, by reason"),
        ("rollout/failed/*", "attempts", "that failed since the step before, by stop reason"),
        ("rollout/branches", "episodes", "that branch from a turn of another one"),
        ("rollout/branches_refused", "episodes", "that were to, and were played from the start"),
        ("policy/version", "updates", "version of the policy after the step"),
        ("policy/staleness_max", "updates", "age of the step's oldest token"),
        ("staleness/max", "steps", "age of the step's oldest token"),
        ("staleness/mean", "steps", "age of the step's tokens, in the mean"),
    ),
    *_of(
        STEP_METRICS,
        "training_performance.md",
        ("rollout/sampled_tokens", "tokens", "that the policy wrote in the step"),
        ("rollout/tokens_per_second", "tokens/s", "of them, by the time that episodes were waited for"),
        ("train/tokens", "tokens", "of all segments of the step"),
        ("train/tokens_per_second", "tokens/s", "of them, by the time of scoring and training"),
        (
            "train/rank_imbalance",
            "ratio",
            "tokens of the busiest data-parallel rank over those of the mean one",
        ),
        ("seconds/step", "s", "of the step"),
        ("seconds/generate", "s", "of it that engines were waited for"),
        ("seconds/tools", "s", "of it that tools and environments were waited for"),
        ("seconds/train", "s", "of it for scoring and training"),
        ("seconds/sync", "s", "of it for sending weights to the engines"),
        ("shared_prefix/tokens_saved", "share", "tokens that were not computed again"),
        ("shared_prefix/attention_saved", "share", "of attention that was not computed again"),
        ("shared_prefix/flops_saved", "share", "of all computation that was not done again"),
    ),
    *_of(
        STEP_METRICS,
        "objective.md",
        ("train/loss", "loss", "mean over the step's updates"),
        ("train/entropy", "nats", "mean entropy of the policy at a trainable token"),
        ("train/entropy_coefficient", "1", "of the entropy bonus, where it follows a target"),
        (
            "train/clip_fraction",
            "share",
            "trainable tokens whose gradient the policy loss bounded or took away",
        ),
        ("train/grad_norm", "norm", "of the gradient before it is clipped"),
        ("train/learning_rate", "1", "mean over the step's updates"),
        ("train/behavior_kl", "nats", "KL of sampler and policy during the updates (k3)"),
        ("train/reference_kl", "nats", "KL of policy and reference (k3), where there is a reference"),
        (
            "train/initial_kl",
            "nats",
            "change of the policy before the first update, which is 0 up to rounding",
        ),
        ("train/policy_kl", "nats", "change of the policy from the step's start to its last update"),
        (
            "train/logprob_difference_max",
            "nats",
            "largest difference of trainer and engine at a token of the newest weights",
        ),
        ("train/skipped_updates", "updates", "without effect, as the gradient exploded or nothing was there"),
        ("train/empty_updates", "updates", "of them, those that had nothing to train on"),
    ),
    *_of(
        STEP_METRICS,
        "weight_sync.md",
        ("sync/bytes", "bytes", "sent to each engine"),
        ("sync/seconds", "s", "from the first byte to the last engine"),
        ("sync/pause_seconds", "s", "in which engines could not generate"),
        (
            "sync/adapter_correlation",
            "1",
            "of what adapters add and what the engines get of it, the least of all modules",
        ),
    ),
    *_of(
        STEP_METRICS,
        "routing_replay.md",
        ("routing/replayed", "share", "tokens with a record of their experts"),
        ("routing/sampled_replayed", "share", "sampled tokens with such a record"),
    ),
    *_of(
        STEP_METRICS,
        "sampling.md",
        (
            "sampling/support_mean",
            "tokens",
            "that a token was drawn from, where top-p, top-k or min-p left some out",
        ),
        ("sampling/support_max", "tokens", "the most of them"),
    ),
    *_of(
        "trainer/ranks/rank.py",
        "ppo.md",
        ("critic/loss", "loss", "of the critic"),
        ("critic/clip_fraction", "share", "of the values whose change was bounded"),
        ("critic/error", "reward", "mean distance of value and return"),
        ("critic/error_max", "reward", "the largest"),
        ("critic/grad_norm", "norm", "of the critic's gradient before it is clipped"),
        ("critic/learning_rate", "1", "of the critic"),
    ),
    *_of(
        "trainer/algorithms/token_advantages.py",
        "ppo.md",
        ("critic/value_mean", "reward", "mean value of a trainable token"),
        ("critic/return_mean", "reward", "mean return of a trainable token"),
        ("critic/explained_variance", "1", "of the returns by the values: 1 is all, 0 none"),
        ("gigpo/num_states", "states", "that several turns of a group were in"),
        (
            "gigpo/compared_fraction",
            "share",
            "turns that have another one of their state to be compared with",
        ),
    ),
    *_of(
        "trainer/algorithms/advantages.py",
        "algorithms.md",
        ("group/num_compared", "groups", "that advantages were made of"),
        ("group/num_singleton", "groups", "of one episode, which has nothing to be compared with"),
        ("group/num_uniform", "groups", "of several whose rewards are all the same"),
        ("group/num_near_uniform", "groups", "whose rewards differ by less than `min_spread`"),
        ("group/num_ragged", "groups", "that are smaller than the largest"),
        ("group/size_min", "episodes", "of the smallest group"),
        ("group/size_max", "episodes", "of the largest group"),
        ("advantage/mean", "advantage", "over trainable tokens"),
        ("advantage/std", "advantage", "over trainable tokens"),
        ("advantage/abs_max", "advantage", "the largest absolute value"),
        (
            "advantage/zero_fraction",
            "share",
            "trainable tokens whose advantage is 0: nothing is learnt of them",
        ),
    ),
    *_of(
        "trainer/algorithms/group_advantages.py",
        "algorithms.md",
        ("advantage/gpg_scale", "1", "by which GPG scales the step's advantages"),
        ("group/num_low_mean", "groups", "below the mean that the algorithm asks for"),
    ),
    *_of(
        "trainer/algorithms/tree_advantages.py",
        "branching.md",
        ("tree/num", "trees", "in the step"),
        ("tree/num_branches", "episodes", "that branch from another one"),
        ("tree/leaves_max", "episodes", "of the largest tree"),
        ("tree/num_uniform", "trees", "whose rewards do not differ"),
    ),
    *_of(
        "trainer/credit/estimates.py",
        "algorithms.md",
        ("truncated/num_dropped", "episodes", "that a limit ended, left out before anything is compared"),
        ("truncated/num_masked", "episodes", "that a limit ended, compared and not trained on"),
        ("shaping/reward_mean", "reward", "mean after reward shaping"),
        ("kl/reward_penalty", "reward", "mean that a KL penalty takes from an episode's reward"),
    ),
    *_of(
        "trainer/credit/distillation.py",
        "distillation.md",
        ("distillation/tokens", "tokens", "that teachers scored"),
        (
            "distillation/kl",
            "nats",
            "mean of policy minus teacher at sampled tokens, an estimate of the reverse KL",
        ),
        ("distillation/difference_mean", "nats", "mean absolute difference"),
        ("distillation/difference_max", "nats", "largest absolute difference"),
    ),
    *_of(
        "trainer/credit/off_policy.py",
        "objective.md#figures",
        ("offpolicy/unusable_tokens", "tokens", "whose logprob at the sampler is not finite; not trained on"),
        (
            "offpolicy/[*/]logprob_difference_mean",
            "nats",
            "mean of abs(log rho), rho the trainer's probability over the sampler's",
        ),
        ("offpolicy/[*/]logprob_difference_max", "nats", "largest abs(log rho)"),
        ("offpolicy/[*/]kl", "nats", "KL(sampler, trainer): the mismatch of the two, and the age of tokens"),
        ("offpolicy/[*/]chi2", "1", "mean of rho², less 1"),
        ("offpolicy/[*/]ess", "share", "effective sample size"),
        ("offpolicy/[*/]perplexity_ratio", "ratio", "the trainer's perplexity over the sampler's"),
        ("offpolicy/*/tokens", "tokens", "of this age (`age_1`) or turn (`turn_2`)"),
        ("offpolicy/*/clipped_fraction", "share", "of them whose weight a correction bounded"),
        ("offpolicy/*/rejected_fraction", "share", "of them whose weight a correction made 0"),
        (
            "offpolicy/*/loss_clipped_fraction",
            "share",
            "of them that the policy loss bounds before the first update",
        ),
        ("correction/tokens", "tokens", "that corrections looked at"),
        ("correction/tokens_kept", "tokens", "of them with a weight above 0"),
        ("correction/sequences", "sequences", "that corrections looked at"),
        ("correction/sequences_kept", "sequences", "of them with a weight above 0"),
        ("correction/*/*", "as it says", "what one correction says of itself, such as `mean_weight`"),
        ("entropy_control/chosen_tokens", "tokens", "that the entropy control holds or leaves out"),
        ("entropy_control/candidates", "tokens", "that Clip-Cov chose from"),
        ("entropy_control/covariance", "nats", "of logprob and advantage"),
        ("entropy_control/*", "as it says", "what an entropy control of one's own says of itself"),
    ),
    *_of(
        STEP_METRICS,
        "algorithms.md",
        (
            "environment/*/*",
            "as without",
            "any figure here of the episodes of one environment of a mixture, or of `others`",
        ),
    ),
    *_of(
        "trainer/run/evaluations.py",
        "training.md",
        ("heldout/[*/]mean", "reward", "held-out score; further suites have their names in front"),
        ("heldout/[*/]low", "reward", "lower end of its 95 % interval"),
        ("heldout/[*/]high", "reward", "upper end of its 95 % interval"),
        ("heldout/[*/]num_tasks", "tasks", "with an episode that did not fail"),
        ("heldout/[*/]num_episodes", "episodes", "that did not fail"),
        ("heldout/[*/]num_failed", "episodes", "that failed for good, and have no score"),
        ("heldout/[*/]num_truncated", "episodes", "that a limit ended"),
        ("heldout/[*/]num_user_faults", "attempts", "whose simulated user could not be played"),
        (
            "heldout/[*/]user_fault_share",
            "share",
            "of the episodes without success, those whose simulated user broke its script",
        ),
        ("heldout/[*/]mean_turns", "turns", "of an episode"),
        ("heldout/[*/]env/*", "as the environment says", "mean of a figure that the environment counts"),
        ("heldout/[*/]oldest_version", "updates", "version of the oldest token; -1 where none is recorded"),
        ("heldout/[*/]newest_version", "updates", "version of the newest token"),
        ("heldout/[*/]step", "steps", "the step whose weights were evaluated"),
        ("heldout/[*/]version", "updates", "of these weights"),
        ("heldout/[*/]lag", "steps", "finished while it was played"),
        ("heldout/[*/]pinned", "0 or 1", "all was answered by these weights"),
        ("heldout/[*/]skipped", "evaluations", "that were due while another was under way, so far"),
    ),
    *_of(
        "trainer/run/progress.py",
        "fine_tuning.md",
        (
            "heldout/loss",
            "nats",
            "on the held-out rows of a run that is fine-tuned, a mean over taught tokens",
        ),
    ),
    *_of(
        "rollout/engines/load.py",
        "engines.md#what-is-known-of-their-load",
        ("engine/*/silent", "share", "of the looks at an engine's load that it did not answer"),
        ("engine/*/kv_use", "share", "of its KV cache that was in use, in the mean"),
        ("engine/*/kv_use_max", "share", "the largest"),
        ("engine/*/running", "requests", "in its batch, in the mean"),
        ("engine/*/waiting", "requests", "in its queue, in the mean"),
    ),
    *_of(
        "rollout/engines/fleet.py",
        "engines.md#what-is-known-of-their-load",
        ("engine/[*/]requests", "requests", "answered"),
        ("engine/[*/]cache_hit_rate", "share", "prompt tokens whose KV was there"),
        ("engine/[*/]cache_loss_rate", "share", "known tokens that had to be computed again"),
        ("engine/[*/]retractions", "requests", "that lost their place in a batch"),
        ("engine/[*/]arrivals", "episodes", "that came from another engine"),
        ("engine/[*/]faults", "requests", "that were not answered"),
        ("engine/[*/]garbled", "requests", "of them whose answers made no sense"),
        ("engine/[*/]token_seconds", "s", "that a request waits for a token"),
        ("engine/[*/]cut_off", "requests", "under way at an engine when it went"),
        ("engine/[*/]cut_off_tokens", "tokens", "that it had sampled for them, an estimate"),
        ("engine/[*/]recomputed_tokens", "tokens", "computed again for episodes that moved"),
    ),
    *_of(
        "rollout/engines/watch.py",
        "engines.md#how-many-episodes-are-live",
        ("rollout/live_limit", "episodes", "that may be live"),
        ("rollout/live_episodes", "episodes", "that are"),
        ("rollout/live_waiting", "episodes", "that wait for it"),
        ("rollout/live_pauses", "episodes", "that were paused between two turns"),
    ),
    *_of(
        "rollout/engines/keeper.py",
        "recovery.md#engines",
        ("engine/serving", "engines", "that serve"),
        ("engine/missing", "engines", "that should serve and do not"),
        ("engine/added", "engines", "that came by `polyturn engines add`"),
        ("engine/removed", "engines", "that went by `polyturn engines remove`"),
        ("engine/lost", "engines", "that died, hung or failed"),
        ("engine/lost_*", "engines", "of them, by how: `ended`, `hung`, `failing`, `garbled`"),
        ("engine/replaced", "engines", "that came for a lost one"),
        ("engine/seconds_to_serving", "s", "from a loss to the one that serves in its place, the longest"),
        ("engine/failed_starts", "starts", "that failed"),
        ("engine/given_up", "engines", "that are not started again"),
        ("engine/outdated", "engines", "found with other weights than they should have"),
    ),
    *_of(
        "rollout/engines/router_keeper.py",
        "recovery.md#engines",
        ("engine/router_restarts", "starts", "of the router after it died"),
    ),
    *_of(
        "rollout/worker.py",
        "recovery.md",
        ("rollout/worker_deaths", "processes", "that play episodes and died, so far"),
    ),
    *_of(
        "envs/tasks/curriculum.py",
        "tasks.md#curriculum",
        ("curriculum/passed_over", "tasks", "drawn and not admitted, so far"),
        ("curriculum/forced", "tasks", "played all the same, as 4,096 in a row were not admitted"),
        ("curriculum/known_tasks", "tasks", "whose difficulty is known"),
    ),
    *_of(
        "trainer/run/loop.py",
        "recovery.md",
        ("trainer/restarts", "restarts", "of the trainer in this session, after a rank died"),
    ),
    *_of(
        "trainer/sinks/factory.py",
        "metrics.md",
        ("sink/*/dropped", "rows", "that one sink did not get or did not take, so far in this session"),
    ),
    *_of(
        "trainer/run/alarms.py",
        "training.md#alarms",
        ("rollout/longest_pause_s", "s", "between two episodes that ended, while some were awaited"),
        ("alarm/*", "0 or 1", "an alarm lasts"),
    ),
    *_of(
        STEP_METRICS,
        "colocated.md",
        ("seconds/release", "s", "for engines to give their memory up"),
        ("seconds/reload", "s", "for ranks to take theirs back"),
        ("seconds/offload", "s", "for ranks to give theirs up"),
        ("seconds/resume", "s", "for engines to take theirs back"),
    ),
    *_of(
        "trainer/run/served_weights.py",
        "colocated.md",
        (
            "turns/offloaded_bytes",
            "bytes",
            "of the rank that has most, in its host's memory during the engines' turn",
        ),
    ),
)

HEALTHY: Mapping[str, Healthy] = {
    "rollout/num_dropped": Healthy(
        high=0, otherwise="episodes fail for good: `error` in trajectories/ and journal/ says why"
    ),
    "rollout/num_stale": Healthy(
        high=0,
        otherwise="groups are played and thrown away: lower rollout.max_concurrent_episodes, or raise "
        "rollout.max_staleness",
    ),
    "rollout/gave_up": Healthy(
        high=0, otherwise="rollout.filter takes more groups than can be played in its place"
    ),
    "rollout/worker_deaths": Healthy(
        high=0, otherwise="processes that play episodes die: see logs/, and the memory that environments need"
    ),
    "user/fault_share": Healthy(
        high=0.1,
        otherwise="failures are the simulated user's rather than the policy's: give it a better model",
    ),
    "train/entropy": Healthy(
        low=0.01,
        otherwise="the policy is all but deterministic, and tries nothing new: raise entropy_coefficient or set "
        "entropy_target, or a KL penalty",
    ),
    "train/clip_fraction": Healthy(
        high=0.3,
        otherwise="the loss bounds many tokens: take a smaller learning rate, or fewer updates_per_step",
    ),
    "train/skipped_updates": Healthy(
        high=0, otherwise="updates are skipped: gradients explode, or nothing is there to train on"
    ),
    "advantage/zero_fraction": Healthy(
        high=0.9, otherwise="nearly no token teaches anything: rewards within groups are alike"
    ),
    "critic/explained_variance": Healthy(
        low=0.0,
        otherwise="the critic is worse than a constant: warm it up longer, or raise its learning rate",
    ),
    "offpolicy/unusable_tokens": Healthy(
        high=0, otherwise="engines tell logprobs that are not finite: look at their logs and their dtype"
    ),
    "offpolicy/[*/]kl": Healthy(
        high=0.05,
        otherwise="trainer and engines differ, or tokens are old: see dtype, rollout.max_staleness and corrections",
    ),
    "offpolicy/[*/]ess": Healthy(
        low=0.5,
        otherwise="few tokens carry the step's weight: add a correction, or lower rollout.max_staleness",
    ),
    "sync/adapter_correlation": Healthy(
        low=0.9, otherwise="engines get little of what the adapters add: send float32, or the merged weights"
    ),
    "engine/[*/]cache_loss_rate": Healthy(
        high=0.1, otherwise="engines compute known tokens again: lower rollout.max_concurrent_episodes"
    ),
    "engine/[*/]faults": Healthy(high=0, otherwise="engines leave requests unanswered: see logs/"),
    "engine/*/silent": Healthy(
        high=0.5, otherwise="an engine does not tell its load: it is overloaded, or hangs"
    ),
    "engine/given_up": Healthy(high=0, otherwise="an engine is gone for good: logs/engines.jsonl says why"),
    "engine/router_restarts": Healthy(high=0, otherwise="the router dies: see logs/"),
    "heldout/[*/]num_failed": Healthy(
        high=0, otherwise="held-out episodes failed, so that the score is of fewer than it seems"
    ),
    "heldout/[*/]skipped": Healthy(
        high=0,
        otherwise="evaluations take longer than the steps between them: play fewer tasks, or less often",
    ),
    "sink/*/dropped": Healthy(high=0, otherwise="a dashboard lacks rows, which metrics.jsonl has"),
    "trainer/restarts": Healthy(
        high=0, otherwise="ranks of the trainer die: see the sentence in the terminal"
    ),
}
"""By the names of metrics."""

WATCHED: Mapping[str, str] = {
    "rollout/longest_pause_s": "stall_s",
    "rollout/failed_attempts": "failed_attempts",
    "group/uniform": "uniform_groups",
    "outcome/truncated": "truncated_episodes",
    "engine/*/kv_use_max": "kv_use",
    "train/rank_imbalance": "rank_imbalance",
    "ledger/lost_tokens": "lost_tokens",
    "engine/missing": "engines_missing",
    "engine/[*/]token_seconds": "engine_slowness",
    "engine/*/running": "engine_imbalance",
}
"""By the names of other metrics, the alarm that watches one: its threshold is an option (`alarms`)."""
