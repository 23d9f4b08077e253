"""A Hugging Face directory in block-quantised FP8, made from one that is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import torch

from polyturn.trainer.megatron.fp8 import cast_tensors, find_quantised, quantization_config
from polyturn.trainer.megatron.hf_directory import HFWeights, config_dtype, read_config, write_hf_directory


class FP8Cast:
    """How one model is cast: the same at every weight sync as in the directory that its engines were started from."""

    def __init__(self, source: Path) -> None:
        """Read names and shapes, no weights.

        Raises:
            ValueError: no Hugging Face directory, or one that is quantised already.
        """
        self.source = source
        config = read_config(source)
        if config.get("quantization_config"):
            raise ValueError(f"{source} is quantised already")
        self._dtype = config_dtype(config)
        with closing(HFWeights(source)) as weights:
            self._shapes = weights.shapes()
        self._quantised = find_quantised(self._shapes)

    def __call__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as the engines take them."""
        return cast_tensors(tensors, self._quantised)

    def write(self, target: Path) -> None:
        """The whole directory in FP8."""
        changes = {"quantization_config": quantization_config(self._shapes, self._quantised)}
        with closing(HFWeights(self.source)) as weights:
            write_hf_directory(
                target,
                source=self.source,
                tensors=self(weights.items()),
                dtype=self._dtype,
                config_changes=changes,
            )
