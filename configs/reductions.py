"""How the losses of tokens become one number.

Denominators are those of the whole optimizer update, whatever its micro-batches and ranks. A sequence is an episode, or
what one role wrote in it, over all its contexts. B is the number of sequences that have a trainable token.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from polyturn.configs.plugins import Plugin
from polyturn.configs.section import Section


class TokenMean(Section):
    """The mean over all trainable tokens: long sequences weigh more (DAPO, arXiv 2503.14476)."""

    kind: Literal["token_mean"] = "token_mean"


class SequenceMean(Section):
    """The mean over sequences of the mean over their tokens: every sequence weighs the same (arXiv 2402.03300)."""

    kind: Literal["sequence_mean"]


class SequenceSum(Section):
    """The mean over sequences of the sum over their tokens."""

    kind: Literal["sequence_sum"]


class SequenceSumNorm(Section):
    """The mean over sequences of the sum over their tokens divided by a constant (Dr.GRPO, arXiv 2503.20783)."""

    kind: Literal["sequence_sum_norm"]
    length: PositiveInt
    """The constant: as a rule the largest number of tokens that an episode can sample."""


class PromptMean(Section):
    """The mean over prompts of the mean over all tokens sampled for the prompt: every prompt weighs the same."""

    kind: Literal["prompt_mean"]


class TokenSum(Section):
    """The sum over all trainable tokens: the gradient grows with the batch."""

    kind: Literal["token_sum"]


Reduction = Annotated[
    TokenMean | SequenceMean | SequenceSum | SequenceSumNorm | PromptMean | TokenSum | Plugin,
    Field(discriminator="kind"),
]
