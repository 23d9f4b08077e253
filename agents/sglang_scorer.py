"""Logprobs of given tokens under the model behind an SGLang server."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polyturn.agents.http import HTTPClient, post_json
from polyturn.agents.policy import PolicyFault
from polyturn.agents.sglang_policy import LARGEST_LOGPROB
from polyturn.tools.plain import shown
from polyturn.tools.retries import Retries


class SGLangScorer:
    """Scores over `POST {url}/generate` without generating anything. The client is the caller's."""

    def __init__(self, *, client: HTTPClient, url: str, vocab_size: int) -> None:
        """`vocab_size` is the model's: an id beyond it ends the server (SGLang 0.5.23), so that none is sent."""
        self._client = client
        self._url = f"{url.rstrip('/')}/generate"
        self._vocab_size = vocab_size

    async def score(
        self, token_ids: npt.NDArray[np.int32], *, start: int, retries: Retries
    ) -> npt.NDArray[np.float32]:
        """The logprobs of the tokens from `start` on, [T - start], each given all tokens before it.

        They are over the whole vocabulary at temperature 1: SGLang applies no temperature to tokens that it did not
        draw.

        Args:
            token_ids: [T]
            start: at least 1: the first token has nothing before it.

        Raises:
            EngineUnavailable: the server gave no answer.
            PolicyFault: it refused, its answer is of other tokens or not finite, or the model has no such token.
        """
        assert 0 < start < len(token_ids), f"no token from {start} on among {len(token_ids)}"
        largest = int(token_ids.max())
        if largest >= self._vocab_size:
            raise PolicyFault(
                f"{self._url}: the model has no token {largest}, its vocabulary has {self._vocab_size:,}"
            )
        payload = {
            "input_ids": token_ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            # The entry of the first token asked for is empty: it says what comes after it.
            "logprob_start_len": start - 1,
        }
        answer = await post_json(self._client, self._url, payload, retries=retries)
        try:
            entries = answer["meta_info"]["input_token_logprobs"][1:]
            logprobs = np.array([entry[0] for entry in entries], dtype=np.float64)
            ids = np.array([entry[1] for entry in entries], dtype=np.int64)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise PolicyFault(f"{self._url}: the answer lacks {error}: {shown(answer, limit=300)}") from error
        if not np.array_equal(ids, token_ids[start:]):
            raise PolicyFault(
                f"{self._url}: {len(ids)} logprobs of other tokens than the {len(token_ids) - start} that were sent"
            )
        if not (np.abs(logprobs) < LARGEST_LOGPROB).all():
            raise PolicyFault(f"{self._url}: a logprob of the tokens is not finite")
        return logprobs.astype(np.float32)
