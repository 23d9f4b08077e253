"""Stop strings reach the real engine: sampling ends behind them, and their tokens stay."""

from __future__ import annotations

import pytest

from polyturn.agents.policy import SamplingParams
from polyturn.agents.sglang_policy import SGLangPolicy
from polyturn.rollout.setup import open_client

pytestmark = pytest.mark.stack


async def test_sampling_ends_behind_a_stop_string_which_stays(engines, tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt, sampling = list(range(20, 60)), SamplingParams(max_tokens=40, seed=3)
    async with open_client(timeout_s=60) as client:
        free = await SGLangPolicy(client=client, url=engines.url, stop_token_ids=()).generate(
            prompt_ids=prompt, sampling=sampling
        )
        assert len(free.token_ids) == 40
        # A letter of one token that was not sampled before.
        text = [tokenizer.decode([token]) for token in free.token_ids]
        letters = (part if part.isascii() and part.isprintable() else "" for part in text)
        at = next(i for i, part in enumerate(letters) if part and i >= 3 and part not in "".join(text[:i]))
        stop = text[at]
        stopped = await SGLangPolicy(
            client=client, url=engines.url, stop_token_ids=(), stop_strings=("</never>", stop)
        ).generate(prompt_ids=prompt, sampling=sampling)
    assert stopped.token_ids.tolist() == free.token_ids[: at + 1].tolist()
    assert stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == at + 1
