"""What a run config means for rollout: its tasks, environments and rewards, how episodes are played, and the policy
behind the engines.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

from polyturn.agents.agent_play import AgentSettings, Endpoint, load_agent, play_agent
from polyturn.agents.chat import ChatRenderer, load_tokenizer, make_renderer
from polyturn.agents.connections import EngineClient
from polyturn.agents.deadlines import EpisodeLimits
from polyturn.agents.dialects import Dialect, TagDialect, make_dialect
from polyturn.agents.episode_loop import play_tokens
from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import SamplingParams
from polyturn.agents.sessions.matching import make_rule
from polyturn.agents.sessions.server import SessionServer
from polyturn.agents.sessions.socket_folders import new_socket_path
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.configs.schema.agent import AgentConfig
from polyturn.configs.schema.concurrency import AdaptiveConcurrency
from polyturn.configs.schema.deadlines import interruption_timeout_s
from polyturn.configs.schema.run import EvaluationConfig, EvaluationSuite, ModelConfig, RunConfig
from polyturn.configs.schema.tasks import EnvironmentReward, TaskSourceConfig
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.envs.messages import EnvironmentChoice, Reward, TaskSource
from polyturn.envs.played_env import PlayedEnv
from polyturn.envs.plugins import load_object
from polyturn.envs.process_env import make_for_rollout
from polyturn.envs.registry import make
from polyturn.envs.rewards.factory import make_group_rewards, make_reward
from polyturn.envs.tasks.sources import open_tasks
from polyturn.rollout.concurrency import Rule
from polyturn.rollout.engines.fleet import EngineFleet, Overload
from polyturn.rollout.engines.watch import EngineWatch
from polyturn.rollout.limits import RolloutLimits, allow_open_files, share_of
from polyturn.rollout.player import EpisodePlayer, Play
from polyturn.rollout.teachers import Teachers
from polyturn.tools.retries import Retries

MAX_GENERATION_BYTES = 256 * 1024 * 1024
"""Of an engine's answer: tokens, logprobs and routed experts of one turn."""
ROUTER_WAIT_S = 2.0
"""The longest that a fleet waits before it asks the router again."""
HELDOUT_NAMES = frozenset(
    (
        "heldout",
        "held_out",
        "held-out",
        "test",
        "testing",
        "validation",
        "valid",
        "val",
        "dev",
        "eval",
        "evaluation",
    )
)


def check_train_split(config: RunConfig) -> None:
    """Raise `ValueError` for a split to train on that is held out, unless the config says that this is meant."""
    environment, split = config.environment, config.environment.train_split
    if environment.train_on_heldout:
        return
    if split.lower() in HELDOUT_NAMES:
        why = "is held out by its name"
    elif split == config.evaluation.split:
        why = "is the one that evaluation.split plays"
    elif split in (suite.split for suite in config.evaluation.suites if _is_of_the_run(suite)):
        why = "is one that evaluation.suites play"
    else:
        return
    raise ValueError(
        f"environment.train_split: '{split}' {why}; train on another split, or say environment.train_on_heldout=true"
    )


def _is_of_the_run(suite: EvaluationSuite) -> bool:
    """Whether a suite plays tasks of the environment that is trained on."""
    return suite.environment is None and suite.tasks is None


def task_configs(config: RunConfig, split: str) -> list[TaskSourceConfig] | None:
    """What the config names as the tasks of a split; None: they are the environment's own.

    Raises:
        ValueError: held-out tasks whose split is the one that is trained on.
    """
    environment, evaluation = config.environment, config.evaluation
    if evaluation.tasks is not None:
        if evaluation.split == environment.train_split:
            raise ValueError(
                f"evaluation.tasks: evaluation.split and environment.train_split are both '{split}'; give the held-out "
                "tasks a split of another name"
            )
        if split == evaluation.split:
            return evaluation.tasks
    return environment.tasks


def tasks_of(config: RunConfig, split: str) -> TaskSource:
    """The tasks of a split: those that the config names, or else the environment's own.

    Raises:
        ValueError: they cannot be had, or there are none.
    """
    environment = config.environment
    given = task_configs(config, split)
    if given is not None:
        return open_tasks(given)
    env = make(environment.id, **environment.options)
    try:
        source = env.tasks(split)
    finally:
        env.close()
    if len(source) == 0:
        raise ValueError(f"{environment.id} has no tasks in the split '{split}'")
    return source


def training_sampling(config: RunConfig, *, model_path: Path) -> SamplingParams:
    """How training episodes are sampled. Where tokens are left out, what is left is asked for, and for that a top-k."""
    sampling = config.rollout.sampling
    if not sampling.is_restricted:
        return SamplingParams(temperature=sampling.temperature)
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.finite_top_k(ModelShape.read(model_path).vocab_size),
        min_p=sampling.min_p,
        records_support=True,
    )


def evaluation_sampling(settings: EvaluationConfig) -> SamplingParams:
    """How the episodes of an evaluation are sampled; nobody trains on them, so nothing is recorded."""
    return SamplingParams(
        temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p
    )


def build_player(
    config: RunConfig,
    *,
    model_path: Path,
    split: str,
    sampling: SamplingParams,
    with_group_rewards: bool = False,
    with_teachers: bool = False,
) -> EpisodePlayer:
    """The player of a split's tasks, for a policy that samples tokens.

    Group rewards and teachers have their part in what is trained on, and none in an evaluation.

    Raises `ValueError` when environment, tasks, rewards or tokenizer cannot be had.
    """
    dialect = dialect_of(config.model, model_path)
    renderer = renderer_of(config.model, model_path, dialect)
    renderer.warm_up()
    limits = episode_limits(config)
    if config.agent is None:
        play = token_play(renderer=renderer, dialect=dialect, limits=limits, sampling=sampling)
        return player_of(
            config,
            split=split,
            play=play,
            with_group_rewards=with_group_rewards,
            with_teachers=with_teachers,
        )
    server = make_server(config.agent)
    play = agent_play(
        config.agent,
        endpoint=server,
        renderer=renderer,
        dialect=dialect,
        limits=limits,
        sampling=sampling,
    )
    return player_of(
        config,
        split=split,
        play=play,
        with_group_rewards=with_group_rewards,
        with_teachers=with_teachers,
        serves=server,
    )


def player_of(
    config: RunConfig,
    *,
    split: str,
    play: Play,
    with_group_rewards: bool = False,
    with_teachers: bool = False,
    serves: AbstractAsyncContextManager[object] | None = None,
) -> EpisodePlayer:
    """The player of a split's tasks, each episode of which `play` plays; `serves` is what that needs open.

    Raises `ValueError` when environment, tasks or rewards cannot be had.
    """
    environment = config.environment
    default = EnvironmentChoice(env_id=environment.id, options=environment.options)
    graded_by = run_reward(config)
    teachers = Teachers.from_config(config.teachers) if with_teachers else None

    def make_chosen(choice: EnvironmentChoice) -> PlayedEnv:
        return make_for_rollout(choice.env_id, graded_by=graded_by, **choice.options)

    return EpisodePlayer(
        make_env=partial(make_chosen, default),
        make_chosen=make_chosen,
        group_rewards=make_group_rewards(config.group_rewards) if with_group_rewards else (),
        tasks=tasks_of(config, split),
        play=play,
        limits=RolloutLimits.from_config(config),
        seed=config.seed,
        serves=_all_of(serves, teachers),
        teachers=teachers,
    )


def dialect_of(model: ModelConfig, model_path: Path) -> Dialect:
    """What reads the text of turns, as the config's model section says. Raises `ValueError` where it cannot be had."""
    recovers = model.malformed_calls == "recover"
    return make_dialect(model.dialect, recovers=recovers, directory=model_path, template_file=model.template)


@asynccontextmanager
async def _all_of(*parts: AbstractAsyncContextManager[object] | None) -> AsyncIterator[None]:
    """Those that there are, entered in order."""
    async with AsyncExitStack() as stack:
        for part in parts:
            if part is not None:
                await stack.enter_async_context(part)
        yield


def renderer_of(model: ModelConfig, model_path: Path, dialect: Dialect) -> ChatRenderer:
    """What turns conversations into tokens, as the config's model section says.

    Raises `ValueError` when there is no tokenizer, or when its chat template cannot be used.
    """
    return make_renderer(
        load_tokenizer(model_path, template=model.template),
        dialect,
        day=model.template_date,
        template_options=model.template_options,
        tool_prompt=model.tool_prompt,
        history=model.history,
    )


def run_reward(config: RunConfig) -> Reward | None:
    """What grades in place of the environments' own grades; None: nothing does. Raises `ValueError`."""
    return None if isinstance(config.reward, EnvironmentReward) else make_reward(config.reward)


def episode_limits(config: RunConfig) -> EpisodeLimits:
    """Where the config truncates episodes, and when what they wait for fails."""
    environment = config.environment
    return EpisodeLimits(
        max_turns=environment.max_turns,
        max_tokens_per_turn=environment.max_tokens_per_turn,
        max_tokens_per_episode=environment.max_tokens_per_episode,
        timeout_s=environment.episode_timeout_s,
        request_timeout_s=config.engines.request_timeout_s,
        interruption_timeout_s=interruption_timeout_s(config),
        hook_timeout_s=environment.hook_timeout_s,
        max_tool_calls_per_turn=environment.max_tool_calls_per_turn,
        max_tool_calls_per_episode=environment.max_tool_calls_per_episode,
        max_tool_result_chars=environment.max_tool_result_chars,
    )


def token_play(
    *, renderer: ChatRenderer, dialect: Dialect, limits: EpisodeLimits, sampling: SamplingParams
) -> Play:
    """Episodes of a policy that samples tokens."""
    return partial(play_tokens, renderer=renderer, dialect=dialect, limits=limits, sampling=sampling)


def agent_play(
    agent: AgentConfig,
    *,
    endpoint: Endpoint | None,
    renderer: ChatRenderer,
    dialect: Dialect,
    limits: EpisodeLimits,
    sampling: SamplingParams,
) -> Play:
    """Episodes of an agent of the user's own.

    Raises:
        ValueError: it cannot be loaded, or there is nothing to go on from between its requests.
    """
    if isinstance(dialect, TagDialect):
        raise ValueError(
            "model.dialect: tags have their conversations in one assistant turn, and an agent asks for turns; use a "
            "dialect of tool calls"
        )
    settings = AgentSettings(
        matching=make_rule(agent.matching),
        policy_errors=tuple(load_exception(name) for name in agent.policy_errors),
        grade_truncated=agent.grade_truncated,
    )
    return partial(
        play_agent,
        agent=load_agent(agent.target, agent.options),
        endpoint=endpoint,
        renderer=renderer,
        dialect=dialect,
        limits=limits,
        sampling=sampling,
        settings=settings,
    )


def make_server(agent: AgentConfig) -> SessionServer | None:
    """What serves the sessions of an agent's episodes; None: nothing does. The Unix socket is for sandboxes."""
    if not agent.serve:
        return None
    return SessionServer(socket_path=new_socket_path())


def load_exception(target: str) -> type[BaseException]:
    """The exception that `module:name` names. Raises `ValueError` where it is none."""
    found = load_object(target)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        raise ValueError(f"agent.policy_errors: {target} is no exception")
    return found


@asynccontextmanager
async def open_engines(
    config: RunConfig, *, model_path: Path, url: str | Sequence[str], engine_urls: Sequence[str] = ()
) -> AsyncIterator[EngineWatch]:
    """The policy behind `url`, with connections of its own, and a watch on its engines.

    Args:
        url: A router, or engines that are asked directly.
        engine_urls: Those behind a router; none: they are not watched.
    """
    allow_open_files(config.rollout)
    is_direct = not isinstance(url, str)
    urls = (url,) if isinstance(url, str) else tuple(url)
    renderer = renderer_of(config.model, model_path, dialect_of(config.model, model_path))
    deadline_s, router = config.engines.request_timeout_s, config.engines.router
    live, rule = live_episodes(config)
    vocab_size = ModelShape.read(model_path).vocab_size
    async with open_client(timeout_s=deadline_s) as client:

        def connect(engine_url: str) -> SGLangPolicy:
            return SGLangPolicy(
                client=client,
                url=engine_url,
                stop_token_ids=renderer.stop_token_ids,
                stop_strings=renderer.stop_strings,
                retries=Retries(max_retries=0, deadline_s=deadline_s),
                record_routing=config.engines.routing_replay and is_direct,
                vocab_size=vocab_size,
                serves_adapters=config.serves_adapters,
            )

        fleet = EngineFleet(
            [connect(each) for each in urls],
            sticky=router.policy != "least_loaded",
            overload=Overload(ratio=router.overload_ratio, margin=router.overload_margin),
            live=live,
            retries=fleet_retries(deadline_s, is_behind_router=bool(engine_urls) and not is_direct),
            chat_urls=[f"{each}/v1" for each in urls],
        )
        watch = EngineWatch(
            fleet,
            urls=urls if is_direct else engine_urls,
            client=client,
            is_direct=is_direct,
            connect=connect if is_direct else None,
            rule=rule,
        )
        async with watch.watching():
            yield watch


def fleet_retries(deadline_s: float, *, is_behind_router: bool) -> Retries:
    """How often a fleet asks again. A router that is gone is started again, as nobody sees who asks it, and that takes
    longer than a few tries."""
    if is_behind_router:
        return Retries(max_retries=sys.maxsize, max_wait_s=ROUTER_WAIT_S, deadline_s=deadline_s)
    return Retries(deadline_s=deadline_s)


@asynccontextmanager
async def open_policy(
    config: RunConfig, *, model_path: Path, url: str | Sequence[str]
) -> AsyncIterator[EngineFleet]:
    """The policy of `open_engines` alone."""
    async with open_engines(config, model_path=model_path, url=url) as watch:
        yield watch.fleet


def live_episodes(config: RunConfig) -> tuple[LiveEpisodes | None, Rule | None]:
    """The episodes whose KV the engines hold, and how their number follows the engines' load; None: it does not.

    Each of several rollout workers has its share, and follows by itself.
    """
    concurrency, num_workers = config.rollout.concurrency, max(1, config.rollout.num_workers)
    if not isinstance(concurrency, AdaptiveConcurrency):
        return None, None
    largest = share_of(config.rollout.max_concurrent_episodes, num_workers)
    start = share_of(concurrency.start_episodes or config.rollout.max_concurrent_episodes, num_workers)
    smallest = share_of(concurrency.min_episodes, num_workers)
    return LiveEpisodes(min(start, largest)), Rule.from_config(
        concurrency, smallest=smallest, largest=largest
    )


def open_client(*, timeout_s: float) -> EngineClient:
    """A client for many requests at once; `timeout_s` bounds each, `MAX_GENERATION_BYTES` each answer."""
    return EngineClient(timeout_s=timeout_s, max_bytes=MAX_GENERATION_BYTES)
