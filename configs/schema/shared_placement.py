"""What goes with engines that sit on the trainer's GPUs, by turns, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

from polyturn.configs.errors import ConfigError
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.weight_sync import BroadcastSync

KEY = "engines on the trainer's GPUs (engines.placement, engines.num_on_trainer_gpus)"


def check_shared_placement(config: RunConfig) -> None:
    """Raise ConfigError, in one sentence, for the first option that needs engines and trainer at the same time."""
    for sentence in _conflicts(config) if config.shares_gpus else ():
        raise ConfigError(sentence)


def _conflicts(config: RunConfig) -> Iterator[str]:
    engines, rollout = config.engines, config.rollout
    if rollout.max_staleness and rollout.play_while_training:
        yield (
            f"{KEY}: nothing is played while the trainer trains, and rollout.max_staleness={rollout.max_staleness} "
            "plays then; set it to 0, or rollout.play_while_training=false, with which answers are cut off and go on "
            "afterwards"
        )
    if config.evaluation.engines is None and config.evaluation.waits != "until_done":
        yield (
            f"{KEY}: an evaluation needs the engines, which give their memory up to the trainer; set "
            "evaluation.training_waits=until_done, or give evaluation.engines"
        )
    if config.weight_sync.every_steps > 1:
        yield (
            f"{KEY}: the engines give their weights up in every step, and get them back from the trainer alone; set "
            "weight_sync.every_steps=1"
        )
    if engines.device == "cuda" and isinstance(config.weight_sync, BroadcastSync):
        yield (
            f"{KEY}: NCCL takes no two ranks of one group on one GPU, so that weights cannot be broadcast from the "
            "trainer to engines that share its GPUs; set weight_sync={kind: disk}"
        )
    if config.megatron.get("ddp", {}).get("nccl_ub"):
        yield (f"{KEY}: buffers that NCCL has registered cannot be given up; leave megatron.ddp.nccl_ub out")
