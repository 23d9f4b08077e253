"""What can be known to be wrong before anything starts. Nothing here starts a process or loads a weight."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

from polyturn.configs.addresses import LOOPBACK
from polyturn.configs.errors import ConfigError, nearest
from polyturn.configs.loading import upstream
from polyturn.configs.models import PRESET, read_json, resolve_model_path
from polyturn.configs.schema.deadlines import check_times
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.arithmetic import check_batch, num_cores, num_gpus
from polyturn.configs.sizing.memory import check_layout
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.envs.messages import TaskSource
from polyturn.envs.registry import list_environments, make
from polyturn.rollout.checks import check_chat_template, check_prompts, check_rewards, check_tasks
from polyturn.rollout.engines.placement import claim_port
from polyturn.rollout.limits import allow_open_files
from polyturn.rollout.task_sources import check_train_split, tasks_of
from polyturn.trainer.algorithms.registry import check_plugins
from polyturn.trainer.checkpoints.manifest import MARKER, find_faults
from polyturn.trainer.checkpoints.sources import initial_weights
from polyturn.trainer.checkpoints.torch_dist_index import METADATA, read_index
from polyturn.trainer.models.weight_files import check_targets, read_weight_files
from polyturn.trainer.run.directory import RunDirectory, check_unused, check_writable
from polyturn.trainer.run.model_checks import check_family, check_loadable, check_memory, check_models
from polyturn.trainer.run.resume import Tell, check_resume

logger = logging.getLogger(__name__)


def preflight(config: RunConfig, *, dry_run: bool = False, tell: Tell | None = None) -> None:
    """Check all that a training run needs.

    Args:
        tell: is told of what a resume changes, and of what is damaged in the run, all of which is read for that; None:
            this is left to the run itself, which does so before it starts anything.
        dry_run: a preset, which has no weights, will do; then nothing is asked of this machine, which is hardly the
            one that would run it.

    Raises ConfigError with one sentence for the first thing that is wrong.
    """
    check_batch(config)
    check_times(config)
    _check_lengths(config)
    _check_train_split(config)
    check_plugins(config.trainer.algorithm)
    _check_comparison(config)
    _check_upstream(config)
    is_plan = dry_run and config.model.path.startswith(PRESET)
    directory = resolve_model_path(config.model.path, needs_weights=not is_plan)
    if is_plan:
        check_family(directory)
        _check_shape(config, ModelShape.read(directory), directory)
        _check_fp8(config)
        _check_tasks(config, (config.environment.train_split, config.evaluation.split), directory)
        return
    _check_machine(config)
    _check_ports(config)
    _check_run_directory(config)
    _check_model(config, directory)
    check_models(config, directory)
    if not dry_run:
        # A plan is printed before it is judged.
        check_memory(config, ModelShape.read(directory))
    _check_initial_weights(config)
    _check_fp8(config)
    # Last: opening an environment or a tokenizer may take seconds.
    _check_tasks(config, (config.environment.train_split, config.evaluation.split), directory)
    _check_chat_template(config, directory)
    _check_resume(config, tell)


def preflight_evaluation(config: RunConfig, *, model_path: Path) -> None:
    """Check all that an evaluation of the model needs. Raises ConfigError as `preflight` does."""
    check_times(config)
    _check_lengths(config)
    _check_upstream(config)
    engines = config.engines
    if engines.device == "cuda":
        _check_gpus(
            engines.num_engines * engines.tensor_parallel, "engines.num_engines or engines.tensor_parallel"
        )
    _check_model(config, model_path)
    _check_tasks(config, (config.evaluation.split,), model_path)
    _check_ports(config)
    _check_chat_template(config, model_path)


def _check_lengths(config: RunConfig) -> None:
    limits = config.environment
    if limits.max_tokens_per_turn >= limits.max_tokens_per_episode:
        raise ConfigError(
            f"environment.max_tokens_per_turn is {limits.max_tokens_per_turn}, which leaves no room for a prompt in "
            f"environment.max_tokens_per_episode={limits.max_tokens_per_episode}"
        )


def _check_train_split(config: RunConfig) -> None:
    try:
        check_train_split(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_comparison(config: RunConfig) -> None:
    unscored = config.trainer.algorithm.proximal != "scored"
    if unscored and config.checks.enabled and config.checks.max_logprob_difference is not None:
        raise ConfigError(
            "checks.max_logprob_difference compares trainer and engine, but trainer.algorithm.proximal=behavior leaves "
            "the trainer's logprobs unscored; set the one to null or the other to scored"
        )


def _check_upstream(config: RunConfig) -> None:
    """Again what the loader did, for configs that were made in code."""
    for section, device in (("sglang", config.engines.device), ("megatron", config.trainer.device)):
        for _, problem in upstream.find_problems(section, getattr(config, section), device=device):
            raise ConfigError(problem)


def _check_model(config: RunConfig, directory: Path) -> None:
    shape = ModelShape.read(directory)
    _check_weights(directory)
    num_tokens = count_tokens(directory)
    if num_tokens > shape.vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer in {directory} has {num_tokens} tokens, but the model's vocab_size is "
            f"{shape.vocab_size}; they are not of one model"
        )
    _check_shape(config, shape, directory)


def _check_shape(config: RunConfig, shape: ModelShape, directory: Path) -> None:
    if config.environment.max_tokens_per_episode > shape.max_positions:
        raise ConfigError(
            f"environment.max_tokens_per_episode is {config.environment.max_tokens_per_episode}, but the model in "
            f"{directory} has {shape.max_positions} positions"
        )
    check_layout(config, shape)
    if config.trainer.lora is not None:
        try:
            check_targets(shape, config.trainer.lora.target_modules)
        except ValueError as error:
            raise ConfigError(f"trainer.{error}") from error


def _check_fp8(config: RunConfig) -> None:
    if config.weight_sync.dtype == "same":
        return
    if config.engines.device != "cuda":
        raise ConfigError(
            f"weight_sync.dtype: {config.weight_sync.dtype} needs engines on GPUs: set engines.device=cuda, or "
            "weight_sync.dtype=same"
        )
    if config.checks.enabled and config.checks.weights_equal:
        raise ConfigError(
            "checks.weights_equal compares weights that engines hold as they were sent, and FP8 engines lay theirs out "
            "anew: set checks.weights_equal=false"
        )


def _check_initial_weights(config: RunConfig) -> None:
    """`checkpoint.load`: what it is, and whether its files are whole as far as sizes, headers and indices tell."""
    try:
        path = initial_weights(config)
        if path is not None and (path / METADATA).is_file():
            read_index(path)
    except ValueError as error:
        raise ConfigError(f"checkpoint.load: {error}") from error
    if path is not None and (path / MARKER).is_file():
        for fault in find_faults(path, read=False):
            raise ConfigError(f"checkpoint.load: {fault}")
    elif path is not None and (path / "config.json").is_file():
        check_loadable(path, "checkpoint.load")


def _check_weights(directory: Path) -> None:
    try:
        read_weight_files(directory)
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from error


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
    try:
        make(environment.id, **environment.options).close()
        return tasks_of(config, split)
    except ValueError as error:
        raise ConfigError(f"environment: {error}") from error


def _check_tasks(config: RunConfig, splits: tuple[str, ...], directory: Path) -> None:
    try:
        check_rewards(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for split in dict.fromkeys(splits):
        source = open_tasks(config, split)
        try:
            check_tasks(config, source)
            check_prompts(
                source,
                tokenizer_path=directory / "tokenizer.json",
                max_tokens=config.environment.max_tokens_per_episode,
            )
        except ValueError as error:
            raise ConfigError(f"environment: {error}") from error


def _check_chat_template(config: RunConfig, directory: Path) -> None:
    # Without transformers nothing is played, and the command says what is missing.
    if importlib.util.find_spec("transformers") is None:
        return
    try:
        notes = check_chat_template(config, directory)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
    for note in notes:
        logger.warning("model: %s", note)


def _check_machine(config: RunConfig) -> None:
    """Open files; ranks against this machine's cores and GPUs, where no Ray cluster with its own is joined."""
    try:
        allow_open_files(config.rollout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.cluster.address is not None:
        return
    parallel = config.trainer.parallel
    if config.trainer.device == "cpu":
        cores = num_cores()
        if parallel.world_size > cores:
            raise ConfigError(
                f"trainer.parallel asks for {parallel.world_size} ranks ({parallel.describe()}), but this machine has "
                f"{cores} core(s); lower one of them"
            )
        if config.trainer.num_ranks > cores:
            raise ConfigError(
                f"the policy and the critic ask for {config.trainer.num_ranks} ranks, but this machine has {cores} "
                "core(s); set trainer.critic.placement=shared, or lower one of them"
            )
    _check_gpus(num_gpus(config), "trainer.parallel or engines.num_engines")


def _check_gpus(wanted: int, lower: str) -> None:
    # Without torch there is nothing to count GPUs with, and nothing that could use them.
    if not wanted or importlib.util.find_spec("torch") is None:
        return
    import torch

    visible = torch.cuda.device_count()
    if wanted > visible:
        raise ConfigError(
            f"the config asks for {wanted} GPU(s), and {visible} can be seen; lower {lower}, or set engines.device and "
            "trainer.device to cpu"
        )


def _check_ports(config: RunConfig) -> None:
    """Addresses and ports of this machine; the engines of a Ray cluster that is joined may be on others."""
    engines, router = config.engines, config.engines.router
    ports = [engines.port + i for i in range(engines.num_engines)] if engines.port else [0]
    if ports[-1] > 65535:
        raise ConfigError(
            f"engines.port: {engines.num_engines} engines from port {engines.port} go beyond port 65535"
        )
    if router.port and router.port in ports:
        raise ConfigError(
            f"engines.router.port: port {router.port} is also one of engines.port; choose another, or 0 for a free one"
        )
    try:
        claim_port(router.host, router.port, section="engines.router")
        if config.cluster.address is None:
            for port in ports:
                claim_port(engines.host or LOOPBACK, port, section="engines")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_run_directory(config: RunConfig) -> None:
    """Whether a run can be made, or is there to go on with, and its directory can be written to."""
    try:
        if config.resume:
            path = RunDirectory.to_resume(config).path
        else:
            path = config.run_dir or config.output_dir
            if config.run_dir is not None:
                check_unused(path)
        check_writable(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_resume(config: RunConfig, tell: Tell | None) -> None:
    if config.resume and tell is not None:
        try:
            check_resume(config, RunDirectory.to_resume(config), tell)
        except ValueError as error:
            raise ConfigError(str(error)) from error
