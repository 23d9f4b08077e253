"""The episode loop: one policy plays one task of one environment, and all of it is recorded."""

from __future__ import annotations

import functools
from dataclasses import replace

from polyturn.agents.chat import ChatRenderer
from polyturn.agents.deadlines import EpisodeLimits, EpisodeTime, Slots
from polyturn.agents.dialects import Dialect
from polyturn.agents.environment_driver import Environment, EnvironmentDriver
from polyturn.agents.episode import PROMPT_TOO_LONG, Episode, Outcome, derive_seed
from polyturn.agents.episode_record import EpisodeRecord, Stop, prompt_too_long, to_the_end
from polyturn.agents.forking import NOT_REBUILT, Fork, rebuild
from polyturn.agents.ledger import Ledger
from polyturn.agents.policy import (
    MessagePolicy,
    SamplingParams,
    TokenPolicy,
    as_reply,
    live_episodes_of,
    policy_of_episode,
)
from polyturn.agents.turn_generation import Interruption, generate_turn, render_ids
from polyturn.agents.turns import History
from polyturn.envs.messages import Task


async def play_tokens(
    *,
    env: Environment,
    policy: TokenPolicy,
    renderer: ChatRenderer,
    dialect: Dialect,
    task: Task | str | None,
    seed: int,
    limits: EpisodeLimits,
    episode_id: str,
    group_id: str,
    sampling: SamplingParams | None = None,
    slots: Slots | None = None,
    fork: Fork | None = None,
) -> Episode:
    """Play one episode with a policy that samples tokens.

    Every prompt is the newest segment of the ledger, so the recorded tokens are those that the policy saw and sampled.
    Where the chat template rewrites earlier turns, a new segment begins with what it makes of them. Sampled tokens are
    never cut, and no segment grows beyond `limits.max_tokens_per_episode`. A turn that ran into a limit in the middle
    of an answer ends the episode as truncated, ungraded.

    Args:
        env: Not shared with an episode that still runs. A `ToolEnv` is awaited; any other steps in a thread.
        task: A task, the id of one, or None to let the environment draw one.
        seed: Of the environment, and of the requests: that of a turn is `derive_seed(seed, turn, 0)`.
        sampling: The temperature; its `max_tokens` and `seed` give way to `limits` and `seed`.
        slots: What other episodes share with this one; None: nothing.
        fork: Begin as a branch of another episode, in whose seed the environment is reset. Where that cannot be
            rebuilt, the episode fails with the stop reason `BRANCH_REFUSED`. None: play from the start.
    """
    clock = EpisodeTime.of(limits, slots, live=live_episodes_of(policy))
    env_seed = seed if fork is None else fork.seed
    driver = EnvironmentDriver(env, task=task, seed=env_seed, limits=limits, clock=clock)
    record = EpisodeRecord()
    ledgers: dict[str, Ledger] = {}
    histories: dict[str, History] = {}
    sampling = sampling or SamplingParams()

    async def play(policy: TokenPolicy) -> Stop:
        observation, tools = record.begin(*await driver.reset())
        if fork is not None:
            rebuilt = await rebuild(
                fork,
                observation,
                driver=driver,
                record=record,
                renderer=renderer,
                dialect=dialect,
                tools=tools,
                clock=clock,
            )
            if rebuilt is None:
                return NOT_REBUILT
            observation = rebuilt
            ledgers[record.role] = Ledger.behind(fork.prefix)
            histories[record.role] = renderer.history(tools)
        for turn in range(record.num_turns, limits.max_turns):
            if record.role not in ledgers:
                ledgers[record.role], histories[record.role] = Ledger(), renderer.history(tools)
            ledger, history = ledgers[record.role], histories[record.role]
            in_thought = renderer.opens_thought(observation, is_first=not len(ledger))
            branches = len(ledger) > 0 and not history.continues(record.conversations[record.role])
            if branches:
                new_ids = await render_ids(renderer, Ledger(), record.conversation, tools, slots)
            else:
                new_ids = await render_ids(renderer, ledger, observation, tools, slots)
            budget = limits.max_tokens_per_episode - len(new_ids) - (0 if branches else len(ledger))
            if budget <= 0 and not record.num_turns:
                return prompt_too_long(driver.task_id, len(new_ids), limits)
            if budget <= 0:
                return Stop(Outcome.TRUNCATED, "max_tokens_per_episode")
            if branches:
                ledger.branch(new_ids)
            else:
                ledger.append_observation(new_ids)
            request = replace(
                sampling,
                max_tokens=min(limits.max_tokens_per_turn, budget),
                routing_from=ledger.num_routed,
            )
            seeds = functools.partial(derive_seed, seed, turn)
            interruption = Interruption(limits.interruption_timeout_s)
            generation = await generate_turn(policy, ledger.token_ids, request, seeds, clock, interruption)
            ledger.append_generation(generation)
            text = renderer.decode(generation.token_ids)
            parsed = dialect.parse(text, in_thought=in_thought, tools=tools)
            action = renderer.with_call_ids(parsed, record.num_tool_calls)
            record.add_action(action)
            if clock.is_over:
                return Stop(Outcome.TRUNCATED, "timeout_s")
            if generation.finish_reason == "length":
                if len(generation) < request.max_tokens:
                    return Stop(Outcome.TRUNCATED, "engine_context")
                if budget <= limits.max_tokens_per_turn:
                    return Stop(Outcome.TRUNCATED, "max_tokens_per_episode")
                if not action.tool_calls:
                    return Stop(Outcome.TRUNCATED, "max_tokens_per_turn")
            if action.tool_calls and driver.refuses_calls:
                return Stop(Outcome.TRUNCATED, "max_tool_calls_per_episode")
            observation, stop = record.add_step(*await driver.step(action), clock=clock)
            if stop is not None:
                return stop
        return Stop(Outcome.TRUNCATED, "max_turns")

    try:
        with policy_of_episode(policy) as own_policy:
            stop = await to_the_end(functools.partial(play, own_policy))
    finally:
        clock.end()
    segments = (segment for role, ledger in ledgers.items() for segment in ledger.to_segments(role=role))
    episode = record.episode(
        stop, driver, clock, segments, episode_id=episode_id, group_id=group_id, seed=seed
    )
    return episode if fork is None else replace(episode, parent_id=fork.parent_id, branch_turn=fork.turn)


async def play_messages(
    *,
    env: Environment,
    policy: MessagePolicy,
    task: Task | str | None,
    seed: int,
    limits: EpisodeLimits,
    episode_id: str,
    group_id: str,
    slots: Slots | None = None,
) -> Episode:
    """Play one episode with a policy that speaks in messages: a script, a person, a remote endpoint. No tokens.

    An answer that its endpoint cut off or filtered ends the episode as truncated, ungraded, as does a conversation that
    has become too long for the model.
    """
    clock = EpisodeTime.of(limits, slots)
    driver = EnvironmentDriver(env, task=task, seed=seed, limits=limits, clock=clock)
    record = EpisodeRecord()

    async def play() -> Stop:
        _, tools = record.begin(*await driver.reset())
        for _ in range(limits.max_turns):
            ask = functools.partial(policy.reply, messages=record.conversation, tools=tools)
            reply = as_reply(await clock.request(ask))
            action = reply.message
            clock.take_back(reply.waited_s)
            record.count(reply.counts)
            if reply.finish_reason == "context":
                if not record.num_turns:
                    return Stop(Outcome.FAILED, PROMPT_TOO_LONG, reply.problem)
                return Stop(Outcome.TRUNCATED, "engine_context")
            record.add_action(action)
            if clock.is_over:
                return Stop(Outcome.TRUNCATED, "timeout_s")
            if reply.finish_reason == "length":
                return Stop(Outcome.TRUNCATED, "max_tokens_per_turn")
            if reply.finish_reason == "content_filter":
                return Stop(Outcome.TRUNCATED, "content_filter")
            if action.tool_calls and driver.refuses_calls:
                return Stop(Outcome.TRUNCATED, "max_tool_calls_per_episode")
            _, stop = record.add_step(*await driver.step(action), clock=clock)
            if stop is not None:
                return stop
        return Stop(Outcome.TRUNCATED, "max_turns")

    stop = await to_the_end(play)
    return record.episode(stop, driver, clock, (), episode_id=episode_id, group_id=group_id, seed=seed)
