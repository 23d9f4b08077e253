"""A policy behind an SGLang server or router: token ids in, token ids with logprobs and policy versions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import httpx

from polyturn.agents.http import Retries, post_json
from polyturn.agents.ledger import read_routing
from polyturn.agents.policy import FinishReason, Generation, PolicyFault, SamplingParams
from polyturn.tools.plain import shown

LARGEST_ID = 1 << 31
LARGEST_LOGPROB = 1e30
"""Beyond both, trajectories could not be stored."""
UNVERSIONED = "default"
"""What a server calls the weights that it started with."""


class SGLangPolicy:
    """Samples over `POST {url}/generate`.

    The client is the caller's: it sets timeouts and the number of connections, and is shared by all episodes.
    """

    def __init__(
        self,
        *,
        client: httpx.AsyncClient,
        url: str,
        stop_token_ids: Sequence[int],
        stop_strings: Sequence[str] = (),
        retries: Retries | None = None,
        record_routing: bool = False,
    ) -> None:
        """`record_routing` asks for the experts of each token, of a server that was started to tell them."""
        self._client = client
        self._url = f"{url.rstrip('/')}/generate"
        self._stop_token_ids = tuple(stop_token_ids)
        self._stop_strings = tuple(stop_strings)
        self._retries = retries or Retries()
        self._record_routing = record_routing

    async def generate(self, *, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Sample a continuation.

        Raises:
            PolicyFault: the server failed, or its answer does not hold together.
        """
        params: dict[str, Any] = {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(self._stop_token_ids),
            "no_stop_trim": True,
            "skip_special_tokens": False,
        }
        if self._stop_strings:
            params["stop"] = list(self._stop_strings)
        if sampling.seed is not None:
            params["sampling_seed"] = sampling.seed
        payload = {"input_ids": list(prompt_ids), "sampling_params": params, "return_logprob": True}
        if self._record_routing:
            payload["return_routed_experts"] = True
            payload["routed_experts_start_len"] = sampling.routing_from
        answer = await post_json(self._client, self._url, payload, retries=self._retries)
        generation = read_generation(answer)
        if not self._record_routing:
            return generation
        return _with_routing(generation, answer, num_before=len(prompt_ids) - sampling.routing_from)


def read_generation(answer: Mapping[str, Any]) -> Generation:
    """The generation in an answer of `/generate`.

    Raises:
        PolicyFault: tokens and logprobs do not belong together, a logprob is not finite, a version is no number.
    """
    try:
        meta = answer["meta_info"]
        entries = meta["output_token_logprobs"]
        output_ids = tuple(answer["output_ids"])
        reason = meta["finish_reason"]["type"]
        logprobs = tuple(float(entry[0]) for entry in entries)
        token_ids = tuple(int(entry[1]) for entry in entries)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise PolicyFault(f"the engine's answer lacks {error}: {shown(answer, limit=300)}") from error
    if token_ids != output_ids:
        raise PolicyFault(
            f"the engine's logprobs are of {len(token_ids)} other tokens than its {len(output_ids)} ids"
        )
    if not all(0 <= token < LARGEST_ID for token in token_ids):
        raise PolicyFault("the engine gave a token id that no vocabulary has")
    if not all(abs(logprob) < LARGEST_LOGPROB for logprob in logprobs):  # NaN is not below it
        at = next(i for i, logprob in enumerate(logprobs) if not abs(logprob) < LARGEST_LOGPROB)
        raise PolicyFault(
            f"the engine gave logprob {logprobs[at]} for token {token_ids[at]} at position {at}"
        )
    return Generation(
        token_ids=token_ids,
        logprobs=logprobs,
        policy_versions=_versions(meta, len(token_ids)),
        finish_reason=_finish_reason(reason),
    )


def _with_routing(generation: Generation, answer: Mapping[str, Any], *, num_before: int) -> Generation:
    """The generation with the record of its tokens and of `num_before` tokens before them, without the last one."""
    text = answer["meta_info"].get("routed_experts")
    num_tokens = num_before + len(generation.token_ids) - 1
    if text is None:
        # What was aborted has no record: the next request asks for it, too.
        if generation.finish_reason == "abort":
            return generation
        raise PolicyFault("the engine's answer has no routed_experts; it was not started to record them")
    return replace(generation, routed_experts=read_routing(text, num_tokens=max(num_tokens, 0)))


def _versions(meta: Mapping[str, Any], length: int) -> tuple[int, ...]:
    """One version per token: from the spans if weights changed on the way, else the one of the whole answer."""
    spans = meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": length}
    ]
    versions: list[int] = []
    try:
        for span in spans:
            versions += [_version(span["version"])] * (min(int(span["end"]), length + 1) - len(versions))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PolicyFault(
            f"the engine's weight versions cannot be read: {shown(spans, limit=200)}"
        ) from error
    if len(versions) != length:
        raise PolicyFault(
            f"the engine's weight versions cover {len(versions)} of {length} tokens: {shown(spans, limit=200)}"
        )
    return tuple(versions)


def _version(text: Any) -> int:
    if text is None or text == UNVERSIONED:
        return 0
    if not (isinstance(text, str) and text.isdecimal() and len(text) < 10):
        raise PolicyFault(f"the engine's weight version is {shown(text)}, not a number that was set by us")
    return int(text)


def _finish_reason(kind: Any) -> FinishReason:
    match kind:
        case "stop" | "length" | "abort":
            return kind
    raise PolicyFault(f"the engine stopped for an unknown reason {shown(kind)}")
