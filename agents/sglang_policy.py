"""A policy behind an SGLang server or router: token ids in, token ids with logprobs and policy versions out."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from polyturn.agents.http import HTTPClient, Retries, get_json, post_json
from polyturn.agents.policy import FinishReason, GarbledAnswer, Generation, PolicyFault, SamplingParams
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.tools.plain import shown

LARGEST_ID = 1 << 31
LARGEST_LOGPROB = 1e30
"""Beyond both, trajectories could not be stored."""
UNVERSIONED = "default"
"""What a server calls the weights that it started with."""
_ALL_TOKENS = SamplingParams()


def adapter_name(version: int) -> str:
    """The name under which an engine has the LoRA adapters of a policy version."""
    return f"policy@{version}"


class SGLangPolicy:
    """Samples over `POST {url}/generate`.

    The client is the caller's: it sets timeouts and the number of connections, and is shared by all episodes.
    """

    def __init__(
        self,
        *,
        client: HTTPClient,
        url: str,
        stop_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        retries: Retries | None = None,
        record_routing: bool = False,
        vocab_size: int = LARGEST_ID,
        serves_adapters: bool = False,
    ) -> None:
        """Sample from a server.

        Args:
            record_routing: Ask for the experts of each token, of a server that was started to tell them.
            vocab_size: No token has this id, or a larger one.
            serves_adapters: The policy is the server's model with adapters; which are newest is what its version says.
        """
        self._client = client
        self._url = f"{url.rstrip('/')}/generate"
        self._stop_token_ids = tuple(stop_token_ids)
        self._stop_strings = tuple(stop_strings)
        self._retries = retries or Retries()
        self._record_routing = record_routing
        self._vocab_size = vocab_size
        self._version_url = f"{url.rstrip('/')}/model_info" if serves_adapters else None

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """Sample a continuation of `prompt_ids` [T].

        Raises:
            EngineUnavailable: the server gave no answer.
            GarbledAnswer: its answer does not hold together.
            PolicyFault: it refused, or was not started to tell what is asked of it.
        """
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(self._stop_token_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        for name in ("top_p", "top_k", "min_p"):
            if (value := getattr(sampling, name)) != getattr(_ALL_TOKENS, name):
                params[name] = value
        if stop := (*self._stop_strings, *sampling.stop):
            params["stop"] = list(stop)
        if sampling.seed is not None:
            params["sampling_seed"] = sampling.seed
        payload = {"input_ids": prompt_ids, "sampling_params": params, "return_logprob": True}
        if sampling.records_support:
            payload["return_sampling_mask"] = True
        if self._record_routing:
            payload["return_routed_experts"] = True
            payload["routed_experts_start_len"] = sampling.routing_from
        version = None
        if self._version_url is not None:
            version = await self._newest_version(self._version_url)
            payload["lora_path"] = adapter_name(version)
        answer = await post_json(self._client, self._url, payload, retries=self._retries)
        generation = read_generation(answer, vocab_size=self._vocab_size)
        if version is not None:
            # The answer tells of the newest at its end, and goes by the adapters that it was begun with.
            versions = np.full(len(generation), version, dtype=np.int32)
            generation = replace(generation, policy_versions=versions)
        if sampling.records_support:
            generation = _with_support(generation, answer["meta_info"])
        if not self._record_routing:
            return generation
        return _with_routing(generation, answer, num_before=len(prompt_ids) - sampling.routing_from)

    async def _newest_version(self, url: str) -> int:
        """What the server says that it serves."""
        answer = await get_json(self._client, url, retries=self._retries)
        return _version(answer.get("weight_version"))


def read_generation(answer: Mapping[str, Any], *, vocab_size: int = LARGEST_ID) -> Generation:
    """The generation in an answer of `/generate`.

    Raises:
        GarbledAnswer: tokens and logprobs do not belong together, a logprob is not finite, a version is no number.
    """
    try:
        meta = answer["meta_info"]
        entries = meta["output_token_logprobs"]
        output_ids = answer["output_ids"]
        reason = meta["finish_reason"]["type"]
        logprobs = np.array([entry[0] for entry in entries], dtype=np.float64)
        token_ids = np.array([entry[1] for entry in entries], dtype=np.int64)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise GarbledAnswer(f"the engine's answer lacks {error}: {shown(answer, limit=300)}") from error
    if not isinstance(output_ids, list) or not np.array_equal(token_ids, output_ids):
        raise GarbledAnswer(
            f"the engine's logprobs are of {len(token_ids)} other tokens than its ids: {shown(output_ids, limit=100)}"
        )
    in_vocabulary = (token_ids >= 0) & (token_ids < vocab_size)
    if not in_vocabulary.all():
        at = int(in_vocabulary.argmin())
        raise GarbledAnswer(
            f"the engine gave token {token_ids[at]} at position {at}, which is not in its vocabulary"
        )
    usable = np.abs(logprobs) < LARGEST_LOGPROB  # NaN is not below it
    if not usable.all():
        at = int(usable.argmin())
        raise GarbledAnswer(
            f"the engine gave logprob {logprobs[at]} for token {token_ids[at]} at position {at}"
        )
    return Generation(
        token_ids=token_ids.astype(np.int32),
        logprobs=logprobs.astype(np.float32),
        policy_versions=_versions(meta, len(token_ids)),
        finish_reason=_finish_reason(reason),
        num_cached_tokens=_count(meta.get("cached_tokens")),
        num_retractions=_count(meta.get("num_retractions")),
    )


def _count(value: Any) -> int:
    """A figure about an answer: one that makes no sense is none, and no reason to lose the answer."""
    return value if isinstance(value, int) and value > 0 else 0


def _with_support(generation: Generation, meta: Mapping[str, Any]) -> Generation:
    """The generation with what its tokens were drawn from, and with their logprobs over that.

    Raises:
        GarbledAnswer: the record is one of other tokens, or a token is not among those it was drawn from.
        PolicyFault: there is no record.
    """
    rows, values = meta.get("output_token_sampling_mask"), meta.get("output_token_sampling_logprobs")
    if (rows is None or values is None) and not len(generation):
        # What was aborted before its first token.
        rows, values = [], []
    if rows is None or values is None:
        raise PolicyFault(
            "the engine's answer lacks output_token_sampling_mask; a router in front of it may drop the request for it"
        )
    try:
        sizes = np.array([len(row) for row in rows], dtype=np.int64)
        token_ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int64, count=sizes.sum())
        logprobs = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise GarbledAnswer(f"the engine's sampling mask cannot be read: {error}") from error
    if not (len(sizes) == len(generation) and logprobs.shape == sizes.shape):
        raise GarbledAnswer(
            f"the engine's sampling mask is of {len(sizes)} tokens and its logprobs of {logprobs.size}, but it sampled "
            f"{len(generation)}"
        )
    if not ((token_ids >= 0) & (token_ids < LARGEST_ID)).all():
        raise GarbledAnswer("the engine's sampling mask names a token id that no vocabulary has")
    row_of = np.repeat(np.arange(len(sizes)), sizes)
    found = np.bincount(row_of[token_ids == generation.token_ids[row_of]], minlength=len(sizes))
    if not (found == 1).all():
        at = int((found != 1).argmax())
        raise GarbledAnswer(
            f"the engine drew token {generation.token_ids[at]} at position {at}, which is in its sampling mask "
            f"{found[at]} times"
        )
    if not (np.abs(logprobs) < LARGEST_LOGPROB).all():
        raise GarbledAnswer("the engine gave a sampling logprob that is not finite")
    return replace(
        generation,
        logprobs=logprobs.astype(np.float32),
        support=SamplingSupport(sizes=sizes.astype(np.int32), token_ids=token_ids.astype(np.int32)),
    )


def _with_routing(generation: Generation, answer: Mapping[str, Any], *, num_before: int) -> Generation:
    """The generation with the record of its tokens and of `num_before` tokens before them, without the last one."""
    text = answer["meta_info"].get("routed_experts")
    num_tokens = num_before + len(generation) - 1
    if text is None:
        # What was aborted has no record: the next request asks for it, too.
        if generation.finish_reason == "abort":
            return generation
        raise PolicyFault("the engine's answer has no routed_experts; it was not started to record them")
    return replace(generation, routed_experts=read_routing(text, num_tokens=max(num_tokens, 0)))


def read_routing(text: str, *, num_tokens: int) -> npt.NDArray[np.int16] | None:
    """[num_tokens, layers x experts per token] from SGLang's `meta_info.routed_experts`; None for no tokens.

    The text is base64 of int32 in C order, with a row for every layer (those of dense layers mean nothing).

    Raises:
        GarbledAnswer: the record is not of so many tokens, or names experts that cannot be.
    """
    try:
        flat = np.frombuffer(base64.b64decode(text, validate=True), dtype="<i4")
    except (binascii.Error, ValueError) as error:
        raise GarbledAnswer(f"the engine's routed experts are not base64 of int32: {error}") from error
    if num_tokens == 0:
        return None
    if flat.size == 0 or flat.size % num_tokens:
        raise GarbledAnswer(
            f"the engine's routed experts are {flat.size} numbers, which is no record of {num_tokens} tokens"
        )
    if flat.max() > np.iinfo(np.int16).max:
        raise GarbledAnswer(f"the engine's routed experts name expert {flat.max()}")
    return flat.reshape(num_tokens, -1).astype(np.int16)


def _versions(meta: Mapping[str, Any], length: int) -> npt.NDArray[np.int32]:
    """One version per token: from the spans if weights changed on the way, else the one of the whole answer."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": length}
    ]
    versions: list[int] = []
    ends = [0]
    try:
        for span in spans:
            versions.append(_version(span["version"]))
            ends.append(max(ends[-1], min(int(span["end"]), length + 1)))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GarbledAnswer(
            f"the engine's weight versions cannot be read: {shown(spans, limit=200)}"
        ) from error
    if ends[-1] != length:
        raise GarbledAnswer(
            f"the engine's weight versions cover {ends[-1]} of {length} tokens: {shown(spans, limit=200)}"
        )
    return np.repeat(np.array(versions, dtype=np.int32), np.diff(ends))


def _version(text: Any) -> int:
    if text is None or text == UNVERSIONED:
        return 0
    if not (isinstance(text, str) and text.isdecimal() and len(text) < 10):
        raise GarbledAnswer(f"the engine's weight version is {shown(text)}, not a number that was set by us")
    return int(text)


def _finish_reason(kind: Any) -> FinishReason:
    match kind:
        case "stop" | "length" | "abort":
            return kind
    raise GarbledAnswer(f"the engine stopped for an unknown reason {shown(kind)}")
