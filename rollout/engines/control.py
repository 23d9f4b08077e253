"""Control calls to one SGLang server. The router does not forward them: they go to each engine itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import httpx

from polyturn.rollout.engines.load import EngineLoad
from polyturn.rollout.engines.process import EngineError
from polyturn.tools.closing import Closing

PauseMode = Literal["retract", "in_place", "abort"]
MemoryTag = Literal["weights", "kv_cache", "cuda_graph"]
NO_UPDATE_IS_OPEN = "no weight-update session is open"
"""What SGLang 0.5.23 says to the end of one that was not begun."""
AN_UPDATE_IS_OPEN = "a weight-update session is already open"
"""What it says to the beginning of one where another was not ended."""


class EngineControl(Closing):
    """Synchronous client of one engine's control endpoints.

    Each call raises `EngineError` when it is refused.
    """

    def __init__(self, url: str, *, timeout_s: float = 600.0) -> None:
        self.url = url
        self._client = httpx.Client(
            base_url=url, timeout=httpx.Timeout(timeout_s, connect=10.0), trust_env=False
        )
        self.released: frozenset[MemoryTag] = frozenset()
        """What this client had it give up. A server that is asked for what it has not given up ends."""

    def begin_weight_update(self) -> None:
        """Open a weight update: only inside it are weights received. One that was left open is closed first."""
        try:
            self._post("/begin_weight_update", {})
        except EngineError as refused:
            if AN_UPDATE_IS_OPEN not in str(refused):
                raise
            self.end_weight_update()
            self._post("/begin_weight_update", {})

    def end_weight_update(self) -> None:
        """Close a weight update."""
        self._post("/end_weight_update", {})

    def stamp(self, version: int | str) -> None:
        """Say which version the weights are, as tokens that are sampled from now on will."""
        self._post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def give_up_weight_update(self) -> None:
        """Close the weight update that a trainer left open when it died, if there is one: its weights are of none."""
        try:
            self.end_weight_update()
        except EngineError as refused:
            if NO_UPDATE_IS_OPEN not in str(refused):
                raise

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        """Join a process group whose rank 0 is the trainer; blocks until every rank has joined."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        self._post("/init_weights_update_group", body)

    def destroy_weights_update_group(self, group_name: str) -> None:
        """Leave a process group. An engine remembers a group's name even when its trainer has died."""
        self._post("/destroy_weights_update_group", {"group_name": group_name})

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        flush_cache: bool = True,
    ) -> None:
        """Receive tensors by broadcast from rank 0; blocks until they have been loaded.

        One flat tensor of bytes carries all of them in order. Without `flush_cache` the KV cache of the old weights is
        used on; with it, an engine that is paused in place refuses, although it has taken the weights.
        """
        body = {
            "names": names,
            "dtypes": dtypes,
            "shapes": shapes,
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache,
        }
        self._post("/update_weights_from_distributed", body)

    def update_weights_from_tensor(
        self, *, serialized: Sequence[str], load_format: str | None, flush_cache: bool = True
    ) -> None:
        """Load named tensors, one base64 pickle for each rank; blocks until they have been loaded.

        On a CPU they must hold the values: a descriptor of shared memory from another process kills the engine.
        """
        body = {
            "serialized_named_tensors": list(serialized),
            "load_format": load_format,
            "flush_cache": flush_cache,
        }
        self._post("/update_weights_from_tensor", body)

    def load_adapter(self, name: str, *, config: Mapping[str, Any], serialized: Sequence[str]) -> None:
        """Load a LoRA adapter under a name that it never had: PEFT's config, and a base64 pickle for each rank."""
        body = {"lora_name": name, "config_dict": dict(config), "serialized_named_tensors": list(serialized)}
        self._post("/load_lora_adapter_from_tensors", body)

    def unload_adapter(self, name: str) -> None:
        """Drop a LoRA adapter, once the requests that use it have ended."""
        self._post("/unload_lora_adapter", {"lora_name": name})

    def update_weights_from_disk(
        self, *, model_path: str, weight_version: int, flush_cache: bool = True
    ) -> None:
        """Load the weights of a Hugging Face directory of the same architecture, and stamp their version."""
        body = {"model_path": model_path, "flush_cache": flush_cache, "weight_version": str(weight_version)}
        self._post("/update_weights_from_disk", body)

    def pause(self, mode: PauseMode, *, timeout_s: float | None = None) -> None:
        """Let no request go on until `go_on`; those that come meanwhile wait.

        `retract` gives back the KV of those under way, which is computed anew afterwards, by the weights of then;
        `in_place` leaves it as it is; `abort` answers them with what they have.
        """
        self._post("/pause_generation", {"mode": mode}, timeout_s=timeout_s)

    def settle(self) -> None:
        """Wait until the engine's scheduler has done all that it was told before."""
        self._get("/server_info")

    def go_on(self) -> None:
        """End a pause."""
        self._post("/continue_generation", {})

    def flush_cache(self) -> None:
        """Drop the prefix cache. Refused while requests run."""
        self._post("/flush_cache", {})

    def weight_version(self) -> str:
        """The version of the weights that the engine says it serves."""
        return str(self._get("/model_info")["weight_version"])

    def load(self) -> EngineLoad:
        """What it says of its load; while it is paused, that of before."""
        return EngineLoad.from_answer(self._get("/v1/loads"))

    def release_memory(self, tags: Collection[MemoryTag], *, timeout_s: float | None = None) -> None:
        """Give up what is not given up yet of the memory of these kinds, whose contents are lost.

        It must be paused by `retract`: a server with a request under way ends.
        """
        wanted = sorted(set(tags) - self.released)
        if wanted:
            self._post("/release_memory_occupation", {"tags": wanted}, timeout_s=timeout_s)
            self.released |= set(wanted)

    def resume_memory(self, tags: Collection[MemoryTag], *, timeout_s: float | None = None) -> None:
        """Take back what was given up of these kinds; weights and KV must then be filled."""
        wanted = sorted(set(tags) & self.released)
        if wanted:
            self._post("/resume_memory_occupation", {"tags": wanted}, timeout_s=timeout_s)
            self.released -= set(wanted)

    def weight_checksums(self, *, timeout_s: float | None = None) -> dict[str, str]:
        """The checksum of every tensor that the engine serves from, by the engine's own name.

        Engine names are fused ones (`qkv_proj`, `gate_up_proj`); see `EngineChecksums` for the other side. With tensor
        parallelism the names of rank r > 0 carry the prefix `rank{r}.`.
        """
        reply = self._post("/weights_checker", {"action": "checksum"}, timeout_s=timeout_s)
        return {
            (name if rank == 0 else f"rank{rank}.{name}"): checksum
            for rank, info in enumerate(reply["ranks"])
            for name, checksum in info["checksums"].items()
        }

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _get(self, path: str) -> dict[str, Any]:
        return self._request("GET", path, None)

    def _post(self, path: str, body: dict[str, Any], *, timeout_s: float | None = None) -> dict[str, Any]:
        return self._request("POST", path, body, timeout_s=timeout_s)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        timeout = self._client.timeout if timeout_s is None else httpx.Timeout(timeout_s, connect=10.0)
        try:
            reply = self._client.request(method, path, json=body, timeout=timeout)
        except httpx.TransportError as fault:
            raise EngineError(f"{self.url}{path} did not answer: {type(fault).__name__} {fault}") from fault
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        content = reply.json() if is_json else {}
        if not isinstance(content, dict):
            content = {}
        if reply.status_code != 200 or content.get("success") is False:
            reason = content.get("message") or reply.text[:500]
            raise EngineError(f"{self.url}{path} answered {reply.status_code}: {reason}")
        return content
