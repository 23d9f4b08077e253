"""Checks of the models beside the policy, before anything starts: teachers and judges, and who needs them."""

from __future__ import annotations

from pathlib import Path

from polyturn.configs.addresses import LOOPBACK
from polyturn.configs.errors import ConfigError, as_config_error, did_you_mean
from polyturn.configs.loading import upstream
from polyturn.configs.models import read_json, resolve_model_path
from polyturn.configs.schema.engines import ServedModel, TeacherConfig
from polyturn.configs.schema.run import EVALUATION_ENGINES, RunConfig
from polyturn.configs.sizing.memory import check_engine_layout
from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.rollout.engines.groups import judge_rewards, section_of
from polyturn.rollout.engines.placement import claim_port


def environment_ids(config: RunConfig) -> tuple[set[str], bool]:
    """The environments that the run's tasks may be of, and whether rows may name others beside."""
    sources = config.environment.tasks or []
    ids = {config.environment.id}
    for source in sources:
        ids |= {source.environment.id} if source.environment is not None else set()
        ids |= {environment.id for environment in source.environments.values()}
    return ids, any(source.trusted_rows for source in sources)


def check_environment_id(config: RunConfig, name: str, key: str) -> None:
    """Raise ConfigError, which names the key, for an environment that no task of the run is of."""
    ids, others = environment_ids(config)
    if name not in ids and not others:
        near = did_you_mean(name, ids) or f"; there are {', '.join(sorted(ids))}"
        raise ConfigError(f"{key}: no task of the run is of {name!r}{near}")


def check_served_models(config: RunConfig, *, trains: bool = True, is_sketch: bool = False) -> None:
    """Whether the models are there and can be served as the config says.

    Args:
        trains: an evaluation has no teachers.
        is_sketch: for a plan: nothing is asked of this machine, and weights need not be there.
    """
    for model in config.served_models if trains else config.judges:
        section = section_of(config, model)
        if not model.is_managed:
            continue
        assert model.path is not None
        directory = resolve_model_path(model.path, key=f"{section}.path", needs_weights=not is_sketch)
        check_precision(directory, model.engines.device, f"{section}.path")
        if model.name == EVALUATION_ENGINES and read_json(directory / "config.json").get(
            "quantization_config"
        ):
            raise ConfigError(
                f"evaluation.engines: they are started from {directory}, which is quantised, and cannot take the "
                "trainer's weights, which are not; leave it out, or take a copy that is not quantised"
            )
        check_engine_layout(
            model.engines, ModelShape.read(directory), section=f"{section}.engines", sglang=model.sglang
        )
        for _, problem in upstream.find_problems("sglang", model.sglang, device=model.engines.device):
            raise ConfigError(f"{section}: {problem}")
        if not is_sketch and config.cluster.address is None:
            _check_ports(model, f"{section}.engines")


def check_precision(directory: Path, device: str, key: str) -> None:
    """That engines on a device can serve a directory as it is stored. Raises ConfigError, which names the key."""
    if device == "cpu" and read_json(directory / "config.json").get("quantization_config"):
        raise ConfigError(
            f"{key}: {directory} is quantised, which SGLang serves on GPUs alone; take a copy that is not: "
            f"polyturn convert {directory} NEW --to hf --dtype float32"
        )


def check_judges(config: RunConfig) -> None:
    """Raise ConfigError where a reward names a judge that there is not, or nothing names one that there is."""
    names = [judge.name for judge in config.judges]
    asked = [reward.judge for reward in judge_rewards(config) if reward.judge is not None]
    for name in asked:
        if name not in names:
            near = did_you_mean(name, names) or f"; there are {', '.join(names) or 'none'}"
            raise ConfigError(f"a reward of the kind judge names {name!r}, which is none of `judges`{near}")
    for name in names:
        if name not in asked:
            raise ConfigError(
                f"judges: nothing names {name!r}; a reward of the kind judge does, with judge: {name}"
            )


def check_teachers(config: RunConfig, directory: Path) -> None:
    """Whether every episode that is to be taught has a teacher that knows its tokens, and every teacher somebody to
    teach.

    Args:
        directory: of the policy's model.
    """
    ids, others = environment_ids(config)
    own = config.trainer.own_algorithms
    taught = {
        name: own.get(name, config.trainer.algorithm).needs_teacher for name in sorted(ids | own.keys())
    }
    wanted = config.trainer.algorithm.needs_teacher or any(taught.values())
    if not wanted and config.teachers:
        raise ConfigError(
            "teachers are given, but nobody learns from them; set trainer.algorithm.distillation, or kl in_loss with "
            "anchor: teacher"
        )
    if wanted and not config.teachers:
        raise ConfigError("trainer.algorithm learns from a teacher, but there is none; give teachers")
    for index, teacher in enumerate(config.teachers):
        for name in teacher.environments or ():
            check_environment_id(config, name, f"teachers.{index}.environments")
        _check_tokens(config, teacher, directory, section=f"teachers.{index}")
    everywhere = any(teacher.environments is None for teacher in config.teachers)
    for name, needs in taught.items():
        covered = everywhere or any(name in (teacher.environments or ()) for teacher in config.teachers)
        if needs and not covered and name in ids:
            raise ConfigError(f"teachers: the algorithm of {name} learns from a teacher, and none teaches it")
    if others and wanted and not everywhere:
        raise ConfigError(
            "teachers: rows of trusted sources may name any environment, so one teacher must be of all: leave its "
            "environments out"
        )


def _check_tokens(config: RunConfig, teacher: TeacherConfig, directory: Path, *, section: str) -> None:
    """Raise ConfigError unless the teacher's tokens are the policy's, and it has room for an episode of them."""
    path = resolve_model_path(teacher.path, key=f"{section}.path", needs_weights=False)
    ours, theirs = (_vocabulary(folder, section) for folder in (directory, path))
    if ours != theirs:
        differing = sorted(
            (token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)),
            key=lambda token: min(
                found for found in (ours.get(token), theirs.get(token)) if found is not None
            ),
        )
        first = differing[0]
        raise ConfigError(
            f"{section}.path: its tokenizer is not that of model.path: {len(differing)} tokens differ, the first is "
            f"{first!r}, {ours.get(first, 'no token')} there and {theirs.get(first, 'no token')} here; a teacher "
            "scores the policy's own tokens"
        )
    room = teacher.sglang.get("context_length")
    longest = config.environment.max_tokens_per_episode
    if isinstance(room, int) and room < longest:
        raise ConfigError(
            f"environment.max_tokens_per_episode is {longest}, but {section}.sglang.context_length leaves the teacher "
            f"room for {room} tokens"
        )


def _vocabulary(directory: Path, section: str) -> dict[str, int]:
    """Ids by token, of a directory's tokenizer.json."""
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ConfigError(
            f"{section}: {directory} has no tokenizer.json to compare; save its tokenizer as a fast one"
        )
    tokenizer = read_json(path)
    given = tokenizer["model"]["vocab"]
    # Unigram tokenizers list their pieces, the others map a token to its id.
    found = dict(given) if isinstance(given, dict) else {piece[0]: i for i, piece in enumerate(given)}
    return found | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def _check_ports(model: ServedModel, section: str) -> None:
    servers = model.engines
    if servers.port + servers.num_engines - 1 > 65535:
        raise ConfigError(
            f"{section}.port: {servers.num_engines} engines from port {servers.port} go beyond port 65535"
        )
    if not servers.port:
        return
    with as_config_error():
        for index in range(servers.num_engines):
            claim_port(servers.host or LOOPBACK, servers.port + index, section=section)
