"""Weight sync of a LoRA policy by its adapters alone: the engines keep the base weights that they were started with.

Each version's adapters are loaded under a name of their own while the engines serve, so that nothing stops: a request
that was begun with the adapters of before goes on with them to its end. An engine's stamp says which version's a new
request is to name (`SGLangPolicy`), and its prefix cache has the adapters' name in its keys. Those of older versions
are dropped once nobody uses them.
"""

from __future__ import annotations

import base64
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from polyturn.agents.sglang_policy import adapter_name
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.engines.process import EngineError
from polyturn.trainer.weight_sync import SyncReport
from polyturn.trainer.weight_sync.engine_calls import EngineCalls
from polyturn.trainer.weight_sync.tally import Tally

IS_LOADED = "already"
"""Of what SGLang 0.5.23 says to a name that it has: that it is already loaded, or already exists."""
KEPT_VERSIONS = 2
"""The newest, and that before it, which a request may just be about to name."""


class AdapterPublisher:
    """Publishes adapters to engines that were started with the base model."""

    def __init__(
        self,
        *,
        adapter_config: Callable[[Sequence[str]], Mapping[str, Any]],
        tensor_parallel: int,
        timeout_s: float,
    ) -> None:
        """It has no engines until it is told of some.

        Args:
            adapter_config: PEFT's, for adapters with tensors of these names.
            tensor_parallel: Ranks of each engine, each of which takes its part of the whole.
            timeout_s: Of each reply.
        """
        self._adapter_config = adapter_config
        self._tensor_parallel = tensor_parallel
        self._timeout_s = timeout_s
        self._engines = EngineCalls([], timeout_s=timeout_s)
        self._loaded: dict[str, list[int]] = {}
        self._prepared: tuple[int, Tally, float] | None = None

    def set_engines(self, urls: Sequence[str]) -> None:
        """One that is new gets all adapters with the next version, as ever; see `WeightPublisher.set_engines`."""
        self._engines.close()
        self._engines = EngineCalls(urls, timeout_s=self._timeout_s)
        self._loaded = {**{url: [] for url in urls}, **self._loaded}

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Load them on every engine, beside those that are served.

        `named_tensors`: every A and B under PEFT's name, whole.
        """
        started = time.perf_counter()
        tally = Tally(None)
        # A view would take all of the memory that it is a view of along.
        values = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in named_tensors
        }
        for name, tensor in values.items():
            tally.add(name, tensor)
        payload = base64.b64encode(pickle.dumps(values)).decode()
        config = self._adapter_config(list(values))

        def load(engine: EngineControl) -> None:
            try:
                engine.load_adapter(
                    adapter_name(version), config=config, serialized=[payload] * self._tensor_parallel
                )
            except EngineError as refused:
                # The version is published once more, since another engine did not take it.
                if IS_LOADED not in str(refused):
                    raise
            if version not in self._loaded[engine.url]:
                self._loaded[engine.url].append(version)

        self._engines.ask(load, doing=f"load the adapters of version {version}")
        self._prepared = (version, tally, time.perf_counter() - started)

    def activate(self) -> SyncReport:
        """Have new requests name them, and drop those that are too old; see `WeightPublisher.activate`."""
        assert self._prepared is not None, "prepare comes first"
        (version, tally, seconds), self._prepared = self._prepared, None
        started = time.perf_counter()
        self._engines.ask(lambda engine: engine.stamp(version), doing="take a version")
        self._engines.check_version(version)
        self._drop_old()
        return tally.report(
            version=version, seconds=seconds + time.perf_counter() - started, pause_seconds=0.0
        )

    def close(self) -> None:
        """The newest adapters stay, since the engines serve them."""
        self._engines.close()

    def _drop_old(self) -> None:
        """Begin to: an engine waits for the requests that use them."""
        old = {url: self._loaded[url][:-KEPT_VERSIONS] for url in self._engines.urls}

        def drop(engine: EngineControl) -> None:
            for version in old[engine.url]:
                engine.unload_adapter(adapter_name(version))

        if any(old.values()):
            self._engines.start(drop)
        self._loaded |= {url: self._loaded[url][-KEPT_VERSIONS:] for url in self._engines.urls}
