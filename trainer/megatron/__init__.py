"""The trainer on Megatron-core: models, their weights and checkpoints, forward passes and updates of one rank.

Importing it makes Megatron-core run on a CPU where torch finds no GPU (`cpu`), so it comes before any `megatron.core`.
"""

import torch

from polyturn.trainer.megatron.cpu import install_cpu_compatibility

if not torch.cuda.is_available():
    install_cpu_compatibility()
