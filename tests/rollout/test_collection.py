"""The scheduler: limits that are never exceeded, failures that are never scored, and no wedge."""

import asyncio
import itertools
import sys
import threading
import time
from dataclasses import replace

import pytest

from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.episode import NO_ENGINE, POLICY_FAULT, Outcome
from polyturn.agents.policy import EngineUnavailable, PolicyFault
from polyturn.envs.faults import UserFault
from polyturn.envs.messages import AssistantMessage, ListTasks, Task
from polyturn.envs.tool_env import ToolEnv
from polyturn.rollout.collection import play_groups
from polyturn.rollout.groups import PromptCursor, episode_seed, parse_episode_id
from polyturn.rollout.limits import RolloutLimits
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.tools.tool import tool
from polyturn.tools.types import ToolCall
from tests.support.play import message_play

TASKS = ListTasks([Task.from_prompt(f"task-{i}", f"question {i}", label=str(i)) for i in range(6)])
FAST = RolloutLimits(max_concurrent_tools=4, max_retries=2, retry_delay_s=0)


class Gauge:
    """How many are inside at once, and the most there ever were."""

    def __init__(self):
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __enter__(self):
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)

    def __exit__(self, *_):
        with self._lock:
            self.now -= 1


class SlowEnv(ToolEnv):
    """One tool that takes a while; the answer is graded 1."""

    def __init__(self, gauge=None, seconds=0.0, during_tool=lambda: None):
        super().__init__()
        self.gauge, self.seconds, self.during_tool = gauge or Gauge(), seconds, during_tool
        self.closed = False

    @tool
    def work(self) -> str:
        """Take a while."""
        with self.gauge:
            time.sleep(self.seconds)
            self.during_tool()
        return "done"

    def grade(self, message):
        return {"answered": 1.0}

    def close(self):
        self.closed = True


class CallThenAnswer:
    """Calls the tool `num_calls` times, then answers; may fail."""

    def __init__(self, *, gauge=None, seconds=0.0, num_calls=1, fail=lambda messages: False):
        self.gauge, self.seconds, self.num_calls, self.fail = gauge or Gauge(), seconds, num_calls, fail

    async def reply(self, *, messages, tools):
        with self.gauge:
            await asyncio.sleep(self.seconds)
        if self.fail(messages):
            raise PolicyFault("the engine is gone")
        num_made = sum(message["role"] == "tool" for message in messages)
        if num_made < self.num_calls:
            return AssistantMessage(tool_calls=(ToolCall(id=str(num_made), name="work"),))
        return AssistantMessage(content="answer")


play = message_play(limits=EpisodeLimits(max_turns=8))


def make_player(make_env=SlowEnv, limits=FAST, seed=0, player=play):
    return EpisodePlayer(make_env=make_env, tasks=TASKS, play=player, limits=limits, seed=seed)


async def collect(player, policy, *, num_prompts=6, samples=3, **options):
    prompts = PromptCursor(len(TASKS), seed=0).take(num_prompts)
    try:
        return await play_groups(player, prompts, samples_per_prompt=samples, policy=policy, **options)
    finally:
        player.close()


async def test_no_limit_is_ever_exceeded_and_each_is_reached():
    requests, tools, live = Gauge(), Gauge(), Gauge()

    async def counting_play(**arguments):
        with live:
            return await play(**arguments)

    limits = RolloutLimits(max_concurrent_requests=3, max_concurrent_episodes=7, max_concurrent_tools=2)
    player = make_player(lambda: SlowEnv(tools, 0.01), limits, player=counting_play)
    groups = await collect(player, CallThenAnswer(gauge=requests, seconds=0.01, num_calls=2))
    assert (requests.most, tools.most, live.most) == (3, 2, 7)
    assert [len(group.episodes) for group in groups] == [3] * 6


async def test_a_request_slot_is_free_during_tool_time():
    """With one request slot, the tool of one episode only ends once the other episode has had its request."""
    both_asked = threading.Event()
    seen = set()

    class Watching(CallThenAnswer):
        async def reply(self, *, messages, tools):
            seen.add(messages[0]["content"])
            if len(seen) == 2:
                both_asked.set()
            return await super().reply(messages=messages, tools=tools)

    def wait():
        if not both_asked.wait(timeout=10):
            raise RuntimeError("the other episode never got the request slot")

    limits = RolloutLimits(max_concurrent_requests=1, max_concurrent_episodes=2, max_retries=0)
    player = make_player(lambda: SlowEnv(during_tool=wait), limits)
    groups = await collect(player, Watching(), num_prompts=2, samples=1)
    assert [group.num_dropped for group in groups] == [0, 0]


@pytest.mark.catalogue("B48")
async def test_what_ends_late_is_kept_like_what_ends_early():
    """A step is all that was played for it, in the order of its prompts: short answers are not trained on first."""

    class LongestFirst(CallThenAnswer):
        """The lower a task's number, the more turns it takes."""

        async def reply(self, *, messages, tools):
            await asyncio.sleep(0.01)
            num_made = sum(message["role"] == "tool" for message in messages)
            if num_made < 6 - int(messages[0]["content"].split()[-1]):
                return AssistantMessage(tool_calls=(ToolCall(id=str(num_made), name="work"),))
            return AssistantMessage(content="answer")

    ended = []
    player = make_player(limits=RolloutLimits(max_concurrent_episodes=12, max_retries=0))
    prompts = sorted(PromptCursor(len(TASKS), seed=0).take(6), key=lambda prompt: prompt.task_index)
    try:
        groups = await play_groups(
            player, prompts, samples_per_prompt=2, policy=LongestFirst(), on_episode=ended.append
        )
    finally:
        player.close()
    order = [prompt.group_id for prompt in prompts]
    assert ended[0].group_id == order[-1] and ended[-1].group_id == order[0]
    assert [group.group_id for group in groups] == order
    assert sorted(episode.episode_id for group in groups for episode in group.episodes) == sorted(
        episode.episode_id for episode in ended
    )


async def test_waiting_for_a_slot_is_queue_time_and_not_generation_time():
    limits = RolloutLimits(max_concurrent_requests=1, max_retries=0)
    player = make_player(limits=limits)
    groups = await collect(player, CallThenAnswer(seconds=0.02, num_calls=0), num_prompts=6, samples=1)
    timings = [group.episodes[0].timings for group in groups]
    assert sum(timing.queue_s for timing in timings) > sum(timing.generate_s for timing in timings) > 0


async def test_environments_are_made_once_per_concurrent_episode_and_closed():
    made = []

    def make_env():
        made.append(SlowEnv())
        return made[-1]

    limits = RolloutLimits(max_concurrent_episodes=3)
    await collect(make_player(make_env, limits), CallThenAnswer(), samples=4)
    assert len(made) == 3
    assert all(env.closed for env in made)


@pytest.mark.catalogue("B43")
async def test_a_failure_is_retried_with_a_fresh_attempt_then_dropped_and_never_scored():
    """Task 2 always fails, task 4 fails once per sample."""
    failures = {}

    def fail(messages):
        question = messages[0]["content"]
        if question == "question 2":
            return True
        if question == "question 4" and failures.setdefault(question, 0) < 3:
            failures[question] += 1
            return True
        return False

    attempts = []
    groups = await collect(make_player(), CallThenAnswer(fail=fail), on_episode=attempts.append)
    by_task = {TASKS[group.prompt.task_index].task_id: group for group in groups}
    broken, flaky = by_task["task-2"], by_task["task-4"]
    assert (broken.episodes, broken.num_dropped, broken.num_retries) == ((), 3, 6)
    assert (len(flaky.episodes), flaky.num_dropped, flaky.num_retries) == (3, 0, 3)
    for group in groups:
        assert all(episode.reward == 1.0 for episode in group.episodes), "a failure was scored"
        assert group.num_missing == 0
    failed = [episode for episode in attempts if episode.outcome is Outcome.FAILED]
    assert len(failed) == 12
    assert all(episode.reward is None for episode in failed)
    assert len({episode.episode_id for episode in attempts}) == len(attempts) == 6 * 3 + 3 * 2 + 3
    assert len({episode.seed for episode in attempts}) == len(attempts)


async def test_a_group_keeps_its_one_survivor():
    def fail(messages):
        return messages[0]["content"] == "question 1" and fail.lucky.pop() if fail.lucky else True

    fail.lucky = [True, True, False]
    player = make_player(limits=RolloutLimits(max_retries=0, max_concurrent_episodes=1))
    prompts = [prompt for prompt in PromptCursor(6, seed=0).take(6) if prompt.task_index == 1]
    groups = await play_groups(
        player, prompts, samples_per_prompt=3, policy=CallThenAnswer(num_calls=0, fail=fail)
    )
    player.close()
    assert (len(groups[0].episodes), groups[0].num_dropped, groups[0].num_missing) == (1, 2, 0)


@pytest.mark.catalogue("B44")
async def test_when_everything_fails_the_step_ends_with_the_reason():
    with pytest.raises(RolloutError, match=r"54 attempts failed, 54 of them with: the engine is gone"):
        await collect(make_player(), CallThenAnswer(fail=lambda _: True))


@pytest.mark.catalogue("B44")
async def test_a_long_row_of_failures_ends_the_step_early():
    attempts = []
    limits = RolloutLimits(max_concurrent_episodes=4, retry_delay_s=0)
    with pytest.raises(RolloutError, match="no episode survived"):
        await collect(
            make_player(limits=limits),
            CallThenAnswer(fail=lambda _: True),
            samples=100,
            on_episode=attempts.append,
        )
    assert len(attempts) < 60


@pytest.mark.catalogue("B44")
async def test_a_wedge_ends_with_the_number_of_episodes_under_way():
    limits = RolloutLimits(stall_timeout_s=0.1)
    with pytest.raises(RolloutError, match=r"no episode ended for 0\.1 s, 18 are under way"):
        await collect(make_player(limits=limits), CallThenAnswer(seconds=60))


async def test_an_unexpected_exception_is_a_failed_attempt_whose_traceback_is_kept():
    """Whatever an environment, a task source or a player raises ends that attempt and no other."""

    class Odd(ListTasks):
        def __getitem__(self, index):
            if index == 1:
                raise LookupError("row 1 is gone")
            return super().__getitem__(index)

    async def sometimes_broken(**arguments):
        if arguments["task"].task_id == "task-3":
            raise TypeError("half a surrogate: \ud800")
        if arguments["task"].task_id == "task-4":
            sys.exit(2)
        return await play(**arguments)

    attempts = []
    player = EpisodePlayer(
        make_env=SlowEnv, tasks=Odd(list(TASKS)), play=sometimes_broken, limits=FAST, seed=0
    )
    groups = await collect(player, CallThenAnswer(), on_episode=attempts.append)
    dropped = {group.prompt.task_index: group.num_dropped for group in groups}
    assert dropped == {0: 0, 1: 3, 2: 0, 3: 3, 4: 3, 5: 0}
    failed = {episode.task_id: episode for episode in attempts if episode.outcome is Outcome.FAILED}
    assert {episode.stop_reason for episode in failed.values()} == {"unexpected_error"}
    sentence, *trace = failed["task-3"].error.splitlines()
    assert sentence == "TypeError: half a surrogate: \\ud800"
    assert any("in sometimes_broken" in line for line in trace)
    assert failed["task-4"].error.startswith("SystemExit: 2\n")
    assert failed[""].error.startswith("LookupError: row 1 is gone\n")
    assert all(len(episode.error) < 6000 for episode in failed.values())


async def test_an_environment_that_cannot_be_made_is_a_failed_attempt():
    made = itertools.count()

    def make_env():
        if next(made) % 2:
            raise OSError("no port is free")
        return SlowEnv()

    groups = await collect(make_player(make_env), CallThenAnswer(), samples=1)
    assert sum(len(group.episodes) for group in groups) >= 5


@pytest.mark.catalogue("B44")
async def test_too_large_a_share_of_failures_stops_the_step_and_says_which_kind():
    def fail(messages):
        return messages[0]["content"] in {"question 0", "question 1", "question 2", "question 3"}

    limits = RolloutLimits(max_concurrent_episodes=4, retry_delay_s=0, max_failure_share=0.6)
    with pytest.raises(
        RolloutError, match=r"max_failure_share allows 60%: 33 attempts failed, 33 .*\(33 policy_fault\)"
    ):
        await collect(make_player(limits=limits), CallThenAnswer(fail=fail), samples=10)
    lenient = RolloutLimits(max_concurrent_episodes=4, retry_delay_s=0, max_failure_share=1.0)
    groups = await collect(make_player(limits=lenient), CallThenAnswer(fail=fail), samples=10)
    assert sum(len(group.episodes) for group in groups) == 20


async def test_stop_lets_running_episodes_end_and_starts_none():
    stop, started = asyncio.Event(), []

    async def counting_play(**arguments):
        started.append(arguments["episode_id"])
        if len(started) == 4:
            stop.set()
        return await play(**arguments)

    limits = RolloutLimits(max_concurrent_episodes=4)
    player = make_player(limits=limits, player=counting_play)
    groups = await collect(player, CallThenAnswer(seconds=0.02), stop=stop)
    assert len(started) == sum(len(group.episodes) for group in groups) == 4
    assert sum(group.num_missing for group in groups) == 14


async def test_episodes_that_outlast_the_drain_are_cancelled():
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, stop.set)
    groups = await collect(make_player(), CallThenAnswer(seconds=60), stop=stop, drain_s=0.05)
    assert sum(group.num_missing for group in groups) == 18


@pytest.mark.catalogue("B45")
async def test_finished_episodes_of_a_stopped_collection_are_not_played_again():
    """Failed attempts count too: the resumed collection goes on with the attempt that comes next."""
    stop, kept = asyncio.Event(), []

    def keep(episode):
        kept.append(episode)
        if len(kept) == 7:
            stop.set()

    failing = {"question 3"}
    policy = CallThenAnswer(fail=lambda messages: messages[0]["content"] in failing)
    limits = RolloutLimits(max_concurrent_episodes=2, retry_delay_s=0)
    await collect(make_player(limits=limits), policy, on_episode=keep, stop=stop)
    before = list(kept)
    again = []
    groups = await collect(make_player(limits=limits), policy, finished=before, on_episode=again.append)
    assert not {e.episode_id for e in before} & {e.episode_id for e in again}
    whole = []
    uninterrupted = await collect(make_player(limits=limits), policy, on_episode=whole.append)
    assert {(e.episode_id, e.seed) for e in before + again} == {(e.episode_id, e.seed) for e in whole}
    assert [(g.group_id, g.num_dropped, len(g.episodes)) for g in groups] == [
        (g.group_id, g.num_dropped, len(g.episodes)) for g in uninterrupted
    ]


async def test_nothing_is_dropped_because_no_engine_answers():
    """One episode ends, then the engine dies: the group is not made of that one alone."""
    kept = []

    class Dies:
        num_answers = 0

        async def reply(self, *, messages, tools):
            if self.num_answers == 2:
                raise EngineUnavailable("connection refused", is_gone=True)
            self.num_answers += 1
            return await CallThenAnswer().reply(messages=messages, tools=tools)

    limits = RolloutLimits(max_concurrent_episodes=1, max_retries=9, retry_delay_s=0)
    with pytest.raises(
        RolloutError, match=r"3 attempts in a row had no answer .*connection refused .*3 no_engine"
    ):
        await collect(make_player(limits=limits), Dies(), num_prompts=1, on_episode=kept.append)
    assert [episode.stop_reason for episode in kept] == ["terminated", "no_engine", "no_engine", "no_engine"]


@pytest.mark.parametrize(("num_dead", "num_attempts", "num_dropped"), [(9, 10, 0), (1000, 16, 1)])
async def test_engines_that_come_and_go_use_up_no_attempts_of_a_sample(num_dead, num_attempts, num_dropped):
    """Unless there is no end to it while others are answered: what it asks may be what ends them."""
    asked, over = [], asyncio.Event()

    class Unlucky:
        async def reply(self, *, messages, tools):
            if messages[0]["content"] != "question 0":
                await over.wait()
            elif len(asked) < num_dead:
                asked.append(messages)
                if len(asked) == min(num_dead, 16):
                    over.set()
                raise EngineUnavailable("connection refused", is_gone=True)
            return AssistantMessage(content="answer")

    tasks = ListTasks([Task.from_prompt(f"task-{i}", f"question {i}", label="") for i in range(12)])
    player = EpisodePlayer(make_env=SlowEnv, tasks=tasks, play=play, limits=FAST, seed=0)
    kept = []
    groups = await play_groups(
        player,
        PromptCursor(len(tasks), seed=0).take(12),
        samples_per_prompt=1,
        policy=Unlucky(),
        on_episode=kept.append,
    )
    player.close()
    assert len([episode for episode in kept if episode.task_id == "task-0"]) == num_attempts
    assert sum(group.num_dropped for group in groups) == num_dropped


class WithoutUser(SlowEnv):
    """Talks with a user whose model is down."""

    def begin(self, task):
        raise UserFault("the simulated user cannot speak")


@pytest.mark.parametrize("make_env", [SlowEnv, WithoutUser])
async def test_what_an_earlier_session_gave_up_is_tried_again(make_env):
    """Its engine had died, say: else its resume would drop the prompts, or have nothing to train on for ever."""
    kept = []
    with pytest.raises(RolloutError, match="every episode failed"):
        await collect(
            make_player(make_env, limits=FAST),
            CallThenAnswer(fail=lambda _: True),
            num_prompts=1,
            on_episode=kept.append,
        )
    again = []
    [group] = await collect(
        make_player(limits=FAST), CallThenAnswer(), num_prompts=1, finished=kept, on_episode=again.append
    )
    assert len(group.episodes) == 3 and group.num_dropped == 0
    assert not {e.episode_id for e in kept} & {e.episode_id for e in again}


async def test_sessions_that_no_engine_answered_do_not_use_up_the_attempts_together():
    """A few in each of them, and the sample would be given up although nothing is wrong with it."""
    kept = []
    with pytest.raises(RolloutError, match="every episode failed"):
        await collect(
            make_player(limits=FAST),
            CallThenAnswer(fail=lambda _: True),
            num_prompts=1,
            on_episode=kept.append,
        )
    earlier = [
        replace(made, stop_reason=NO_ENGINE if number % 3 else made.stop_reason)
        for number, made in enumerate(kept)
    ]
    assert {made.stop_reason for made in earlier} == {NO_ENGINE, POLICY_FAULT}
    [group] = await collect(make_player(limits=FAST), CallThenAnswer(), num_prompts=1, finished=earlier)
    assert len(group.episodes) == 3 and group.num_dropped == 0


def test_seeds_depend_on_identity_alone():
    seeds = {
        episode_seed(run_seed=run, group_id=group, sample=sample, attempt=attempt)
        for run in range(3)
        for group in ("g00000000", "g00000001")
        for sample in range(4)
        for attempt in range(3)
    }
    assert len(seeds) == 3 * 2 * 4 * 3
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert episode_seed(run_seed=0, group_id="g00000000", sample=0, attempt=0) == 0x930E32D5DAF1


def test_episode_ids_can_be_read_back():
    assert parse_episode_id("g00000012.3.1") == ("g00000012", 3, 1)


async def test_a_disk_that_takes_no_episode_ends_the_collection():
    """The episodes that are under way are given up; nobody waits for what cannot be kept."""

    def keep(episode):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await collect(make_player(), CallThenAnswer(), on_episode=keep)
