"""What can be known to be wrong before anything starts: one list of checks, which every command goes through once.

Nothing here starts a process or loads a weight. A check raises ConfigError with one sentence for the user.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from polyturn.configs.errors import ConfigError, as_config_error, nearest
from polyturn.configs.loading import upstream
from polyturn.configs.loading.sglang_options import attention_parts, expert_parts
from polyturn.configs.models import PRESET, read_json, resolve_model_path
from polyturn.configs.schema.deadlines import check_times
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.shared_placement import check_shared_placement
from polyturn.configs.sizing.arithmetic import check_batch
from polyturn.configs.sizing.memory import CPU_KV_TOKENS, check_layout
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import TaskSource
from polyturn.envs.process_env import make_for_rollout
from polyturn.envs.registry import list_environments
from polyturn.envs.tasks import make_curriculum
from polyturn.rollout.checks import (
    check_branching,
    check_chat_template,
    check_prompts,
    check_rewards,
    check_tasks,
)
from polyturn.rollout.factory import (
    agent_play,
    check_train_split,
    dialect_of,
    episode_limits,
    renderer_of,
    run_reward,
    tasks_of,
    training_sampling,
)
from polyturn.rollout.filters import make_filter
from polyturn.rollout.limits import allow_open_files
from polyturn.rollout.order import make_order
from polyturn.rollout.suites import Suite, suites_of
from polyturn.rollout.whole_file import check_writable
from polyturn.tools.secrets import literal_secrets
from polyturn.trainer.algorithms.registry import check_plugins
from polyturn.trainer.checkpoints.manifest import MARKER, find_faults
from polyturn.trainer.checkpoints.megatron_args import check_args
from polyturn.trainer.checkpoints.sources import initial_weights
from polyturn.trainer.checkpoints.torch_dist_index import METADATA, read_index
from polyturn.trainer.models.weight_files import check_targets, read_weight_files
from polyturn.trainer.run.best import unknown_metrics
from polyturn.trainer.run.directory import RunDirectory, check_unused
from polyturn.trainer.run.evaluations import check_evaluations
from polyturn.trainer.run.machine_checks import check_cores, check_gpus, check_hosts, check_ports
from polyturn.trainer.run.model_checks import (
    check_critic,
    check_family,
    check_fp8_engines,
    check_loadable,
    check_memory,
    check_no_decay,
    check_reference,
    check_rounding,
    check_routing_replay,
    check_sampling,
    check_shared_prefix,
    check_weight_sync,
)
from polyturn.trainer.run.replay import check_replay
from polyturn.trainer.run.resume import check_resume
from polyturn.trainer.run.served_checks import (
    check_environment_id,
    check_judges,
    check_precision,
    check_served_models,
    check_teachers,
)
from polyturn.trainer.run.supervised import check_supervised
from polyturn.trainer.sinks.factory import check_sinks


def preflight(
    config: RunConfig,
    *,
    evaluated: Path | None = None,
    splits: Sequence[str] | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Check all that a training run, or an evaluation, needs: the one list, in its order, what costs time last.

    Args:
        evaluated: the model that is to be evaluated; None: the config's is to be trained.
        splits: whose tasks are played; None: the one that is evaluated, and the one that is trained on.
        dry_run: a preset, which has no weights, will do; then nothing is asked of this machine, which is hardly the
            one that would run it. Memory is not judged: a plan is printed before that.

    Returns:
        Sentences of warning: what a resume changes, what is damaged of the run, what the chat template does.

    Raises:
        ConfigError: one sentence for the first thing that is wrong.
    """
    warnings: list[str] = []
    trains = evaluated is None
    is_sketch = dry_run and config.model.path.startswith(PRESET)
    # What the config says.
    check_secrets(config)
    check_times(config)
    check_lengths(config)
    check_upstream(config)
    check_seeds(config, trains=trains)
    if trains:
        check_batch(config)
        check_shared_placement(config)
        with as_config_error():
            check_train_split(config)
        check_plugins(config.trainer.algorithm)
        check_own_algorithms(config)
        check_evaluations(config)
        warnings += unknown_metrics(config)
        with as_config_error():
            make_order(config.rollout)
            make_filter(config.rollout.filter)
        check_sinks(config.metrics)
        check_comparison(config)
        check_compared_parts(config)
        check_fp8(config)
    model = evaluated or resolve_model_path(config.model.path, needs_weights=not is_sketch)
    # What this machine has.
    has_engines = config.plays or not trains
    if trains and not dry_run:
        check_hosts(config)
    if not is_sketch:
        if not (dry_run and config.cluster.hosts is not None):
            check_gpus(config, trains=trains)
        if has_engines:
            check_ports(config)
    if trains and not is_sketch:
        check_cores(config)
        with as_config_error():
            allow_open_files(config.rollout)
        check_run_directory(config)
    # The models.
    shape = ModelShape.read(model)
    if not is_sketch:
        check_weights(model)
        check_tokenizer(model, shape)
    check_shape(config, shape, model)
    if trains:
        check_fp8_engines(config, shape)
        check_weight_sync(config, model)
        warnings += check_rounding(config)
    else:
        check_precision(model, config.engines.device, "the model that is evaluated")
    if config.plays or not trains:
        check_judges(config)
    check_served_models(config, trains=trains, is_sketch=is_sketch)
    if trains and not is_sketch and config.plays:
        check_teachers(config, model)
    if is_sketch:
        check_family(model)
    elif trains:
        check_loadable(model, "model.path")
        check_no_decay(config, model)
        check_reference(config, model)
        check_critic(config, model)
        check_shared_prefix(config)
        check_routing_replay(config, shape)
        warnings += check_sampling(config, shape)
        check_initial_weights(config)
        if not dry_run:
            check_memory(config, shape)
    # Opening an environment or a tokenizer may take seconds, and a resume reads what is stored of the run.
    if splits is None:
        trained_on = (config.environment.train_split,) if trains else ()
        splits = (*trained_on, config.evaluation.split)
    is_taught = trains and config.supervised is not None
    if not is_taught:
        check_environment(config, splits, model)
    if trains and not is_taught:
        with as_config_error():
            check_branching(config)
        for suite in suites_of(config)[1:]:
            check_suite(suite, shape, model)
        with as_config_error("curriculum: "):
            tasks = tasks_of(config, config.environment.train_split)
            make_curriculum(config.curriculum, tasks, seed=config.seed)
    if not is_sketch and not is_taught:
        warnings += check_template(config, model)
        check_agent(config, model)
    if is_taught:
        check_supervised(config)
    elif not has_engines:
        check_replay(config, warnings.append)
    if config.resume and trains and not is_sketch:
        with as_config_error():
            directory = RunDirectory.to_resume(config)
            if directory.rollout.exists():
                raise ConfigError(
                    f"resume: {directory.path} was only played, by `polyturn rollout`; train on it with "
                    f"rollout.replay={directory.path} and another run_dir"
                )
            check_resume(config, directory, warnings.append)
    return warnings


def preflight_of_tokens(config: RunConfig, model: Path) -> list[str]:
    """Check what an evaluation needs whose model others serve already, in the order of `preflight`.

    Args:
        model: A directory with its config and tokenizer.

    Returns sentences of warning; raises ConfigError.
    """
    check_secrets(config)
    check_times(config)
    check_lengths(config)
    shape = ModelShape.read(model)
    check_tokenizer(model, shape)
    check_judges(config)
    check_environment(config, (config.evaluation.split,), model)
    warnings = check_template(config, model)
    check_agent(config, model)
    return warnings


def check_secrets(config: RunConfig) -> None:
    """That none is in the config itself, which is printed and stored."""
    for key, why in literal_secrets(config.model_dump(mode="json")):
        raise ConfigError(
            f"{key} {why}, and configs are printed and stored: put it into a file or a variable, and name that "
            "(api_key_file: PATH or env:NAME; options of your own are read by polyturn.tools.secrets.read_secret)"
        )


def check_compared_parts(config: RunConfig) -> None:
    """Checksums of weights are known for engines whose ranks share every tensor alike."""
    parts = {"attn_dp_size": attention_parts(config.sglang), "ep_size": expert_parts(config.sglang)}
    for key, count in parts.items():
        if count > 1 and config.checks.enabled and config.checks.weights_equal:
            raise ConfigError(
                f"checks.weights_equal: with sglang.{key}={count} the ranks of an engine hold other parts of weights "
                "than are compared; set checks.weights_equal: false"
            )


def check_agent(config: RunConfig, model: Path) -> None:
    if config.agent is None:
        return
    with as_config_error():
        dialect = dialect_of(config.model, model)
    with as_config_error("agent: "):
        agent_play(
            config.agent,
            endpoint=None,
            renderer=renderer_of(config.model, model, dialect),
            dialect=dialect,
            limits=episode_limits(config),
            sampling=training_sampling(config, model_path=model),
        )


def check_lengths(config: RunConfig) -> None:
    limits = config.environment
    if limits.max_tokens_per_turn >= limits.max_tokens_per_episode:
        raise ConfigError(
            f"environment.max_tokens_per_turn is {limits.max_tokens_per_turn}, which leaves no room for a prompt in "
            f"environment.max_tokens_per_episode={limits.max_tokens_per_episode}"
        )
    # An engine cuts what does not fit without a word.
    pool = CPU_KV_TOKENS if config.engines.device == "cpu" else None
    for key, room in (
        ("context_length", config.sglang.get("context_length")),
        ("max_total_tokens", config.sglang.get("max_total_tokens", pool)),
    ):
        if isinstance(room, int) and room < limits.max_tokens_per_episode:
            default = "" if key in config.sglang else ", as it is on a CPU where the config says nothing"
            raise ConfigError(
                f"environment.max_tokens_per_episode is {limits.max_tokens_per_episode}, but an engine has room for "
                f"{room} tokens (sglang.{key}{default}); raise that, or lower environment.max_tokens_per_episode"
            )


def check_seeds(config: RunConfig, *, trains: bool) -> None:
    """Engines that seed requests end when one comes with a min_p."""
    sampling = config.rollout.sampling
    given = {"evaluation.min_p": config.evaluation.min_p}
    if trains:
        given["rollout.sampling.min_p"] = sampling.min_p
        given |= {
            f"min_p of evaluation.suites '{suite.name}'": suite.min_p for suite in config.evaluation.suites
        }
    for key, min_p in given.items():
        if sampling.seeded and min_p > 0:
            raise ConfigError(
                f"{key}: SGLang cannot draw by seed from what min_p leaves; set rollout.sampling.seeded=false, or use "
                "top_p or top_k"
            )


def check_comparison(config: RunConfig) -> None:
    unscored = config.trainer.algorithm.proximal != "scored"
    if unscored and config.checks.enabled and config.checks.max_logprob_difference is not None:
        raise ConfigError(
            "checks.max_logprob_difference compares trainer and engine, but trainer.algorithm.proximal=behavior leaves "
            "the trainer's logprobs unscored; set the one to null or the other to scored"
        )


def check_own_algorithms(config: RunConfig) -> None:
    """Check the environments of `trainer.algorithm_by_environment` and the plug-ins that they name."""
    for index, (name, algorithm) in enumerate(config.trainer.own_algorithms.items()):
        where = f"trainer.algorithm_by_environment.{index}"
        check_environment_id(config, name, f"{where}.environment")
        check_plugins(algorithm, where=where)


def check_upstream(config: RunConfig) -> None:
    """Again what the loader did, for configs that were made in code."""
    for section, values, device in (
        ("sglang", config.sglang, config.engines.device),
        ("megatron", config.megatron, config.trainer.device),
        (upstream.ROUTER, config.engines.router.options, config.engines.device),
    ):
        for _, problem in upstream.find_problems(section, values, device=device):
            raise ConfigError(problem)


def check_weights(directory: Path) -> None:
    with as_config_error("model.path: "):
        read_weight_files(directory)


def check_tokenizer(directory: Path, shape: ModelShape) -> None:
    num_tokens = count_tokens(directory)
    if num_tokens > shape.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer in {directory} has {num_tokens} tokens, but the model's vocab_size is "
            f"{shape.vocab_size}; they are not of one model"
        )


def check_shape(config: RunConfig, shape: ModelShape, directory: Path) -> None:
    if config.environment.max_tokens_per_episode > shape.max_positions:
        raise ConfigError(
            f"environment.max_tokens_per_episode is {config.environment.max_tokens_per_episode}, but the model in "
            f"{directory} has {shape.max_positions} positions"
        )
    check_layout(config, shape)
    if config.trainer.lora is not None:
        with as_config_error("trainer."):
            check_targets(shape, config.trainer.lora.target_modules)


def check_fp8(config: RunConfig) -> None:
    if config.weight_sync.dtype != "fp8_block":
        return
    if config.engines.device != "cuda":
        raise ConfigError(
            "weight_sync.dtype: fp8_block needs engines on GPUs: set engines.device=cuda, or weight_sync.dtype="
            "fp8_rounded, which has the same weights in the trainer's dtype"
        )
    if config.checks.compares_weights:
        raise ConfigError(
            "checks.weights_equal compares weights that engines hold as they were sent, and FP8 engines lay theirs out "
            "anew: set checks.weights_equal=false"
        )


def check_initial_weights(config: RunConfig) -> None:
    """`checkpoint.load`: what it is, and whether its files are whole as far as sizes, headers and indices tell."""
    with as_config_error("checkpoint.load: "):
        path = initial_weights(config)
        if path is not None and (path / METADATA).is_file():
            read_index(path)
    if path is not None and (path / MARKER).is_file():
        for fault in find_faults(path, read=False):
            raise ConfigError(f"checkpoint.load: {fault}")
    elif path is not None and (path / "config.json").is_file():
        check_loadable(path, "checkpoint.load")
    elif path is not None:
        with as_config_error("checkpoint.load: "):
            check_args(path, read_json(resolve_model_path(config.model.path) / "config.json"))


def count_tokens(directory: Path) -> int:
    """One more than the largest token id of the tokenizer in a model directory. Raises ConfigError."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ConfigError(
            f"model.path: {directory} has no tokenizer.json; save its tokenizer there as a fast one"
        )
    return 1 + max(_token_ids(path), default=-1)


def _token_ids(path: Path) -> Iterator[int]:
    tokenizer = read_json(path)
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict | list) or not isinstance(added, list):
        raise ConfigError(
            f"{path}: no tokenizer has this form: 'model' must hold a 'vocab', and 'added_tokens' a list"
        )
    # Unigram tokenizers list their pieces, the others map a token to its id.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
    ids += [token.get("id") if isinstance(token, dict) else token for token in added]
    for token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise ConfigError(f"{path}: {token_id!r:.40} is no token's id")
        yield token_id


def open_tasks(config: RunConfig, split: str) -> TaskSource:
    """The tasks that the config's environment has in a split.

    Raises ConfigError, also where there are none.
    """
    environment = config.environment
    known = [info.env_id for info in list_environments()]
    if environment.id not in known:
        near = nearest(environment.id, known, count=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise ConfigError(f"environment.id: there is no environment '{environment.id}'; {hint}")
    with as_config_error("environment: "):
        try:
            make_for_rollout(environment.id, graded_by=run_reward(config), **environment.options).close()
        except EnvironmentFault as fault:
            raise ConfigError(f"environment: {fault}") from fault
        return tasks_of(config, split)


def check_environment(config: RunConfig, splits: Sequence[str], directory: Path) -> None:
    """Rewards, tasks and prompts of the splits that are played."""
    with as_config_error():
        check_rewards(config)
    for split in dict.fromkeys(splits):
        source = open_tasks(config, split)
        with as_config_error("environment: "):
            check_tasks(config, source)
            check_prompts(
                source,
                tokenizer_path=directory / "tokenizer.json",
                max_tokens=config.environment.max_tokens_per_episode,
            )


def check_suite(suite: Suite, shape: ModelShape, directory: Path) -> None:
    """What a further evaluation plays, as is checked of that of the section `evaluation` itself."""
    try:
        check_lengths(suite.config)
        check_shape(suite.config, shape, directory)
        check_environment(suite.config, (suite.config.evaluation.split,), directory)
    except ConfigError as error:
        raise ConfigError(f"evaluation.suites, {suite.name}: {error}") from error


def check_template(config: RunConfig, directory: Path) -> list[str]:
    """What the model's chat template does that one may not expect. Raises ConfigError where it cannot be used."""
    # Without transformers nothing is played, and the command says what is missing.
    if importlib.util.find_spec("transformers") is None:
        return []
    with as_config_error("model: "):
        return [f"model: {note}" for note in check_chat_template(config, directory)]


def check_run_directory(config: RunConfig) -> None:
    """Whether a run can be made, or is there to go on with, and its directory can be written to."""
    with as_config_error():
        if config.resume:
            path = RunDirectory.to_resume(config).path
        else:
            path = config.run_dir or config.output_dir
            if config.run_dir is not None:
                check_unused(path)
        check_writable(path)
