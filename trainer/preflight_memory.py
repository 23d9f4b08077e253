"""Whether the memory that a run asks for is there."""

from __future__ import annotations

import importlib.util

from polyturn.configs.errors import ConfigError
from polyturn.configs.models import PRESET, resolve_model_path
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.sizing.fit import Capacity, judge, named_capacity
from polyturn.configs.sizing.hardware import host_memory
from polyturn.configs.sizing.model_shape import ModelShape


def check_memory(config: RunConfig, shape: ModelShape) -> None:
    """Compare the estimate with what there is.

    Raises:
        ConfigError: something cannot fit; a sentence for each, with what would.
    """
    misfits, _ = judge(config, shape, capacity_of(config), critic_shape(config))
    if misfits:
        raise ConfigError("\n".join(f"memory: {sentence}" for sentence in misfits))


def capacity_of(config: RunConfig) -> Capacity:
    """Of the GPU that `cluster.gpu` names, else of this machine's, else of the largest there is; and of this host.

    A preset is planned for another machine, and a cluster that is joined has several hosts: then nothing is known of
    the memory of hosts.
    """
    elsewhere = config.model.path.startswith(PRESET) or config.cluster.address is not None
    host = None if elsewhere else host_memory()
    local = None if elsewhere or config.cluster.gpu is not None else _local_gpu(config)
    if local is not None:
        return Capacity(gpu=local[1], gpu_name=local[0], host=host)
    named = named_capacity(config)
    uses_gpus = "cuda" in (config.trainer.device, config.engines.device)
    return Capacity(gpu=named.gpu if uses_gpus else None, gpu_name=named.gpu_name, host=host)


def critic_shape(config: RunConfig) -> ModelShape | None:
    """The shape of the critic's model, where that is not the policy's."""
    critic = config.trainer.critic
    if not config.trainer.uses_critic or critic.path is None:
        return None
    return ModelShape.read(resolve_model_path(critic.path, key="trainer.critic.path", needs_weights=False))


def _local_gpu(config: RunConfig) -> tuple[str, int] | None:
    """Name and bytes of the smallest GPU of this machine; None where there is none, or none is asked for."""
    if "cuda" not in (config.trainer.device, config.engines.device):
        return None
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    if not found:
        return None
    smallest = min(found, key=lambda properties: properties.total_memory)
    return f"this machine's {smallest.name}", int(smallest.total_memory)
