"""The section `supervised`: rows that a run is fine-tuned on, in place of episodes that it plays."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from polyturn.configs.schema.section import Section


class SupervisedConfig(Section):
    """Fine-tuning on conversations, by `polyturn sft`: no engines are started, and nothing is played."""

    data: Annotated[list[Path], Field(min_length=1)]
    """Files of rows (docs/fine_tuning.md)."""
    epochs: PositiveInt = 1
    """How often each row is trained on, in another order each time."""
    tokens: Literal["stored", "rendered"] = "stored"
    """Where a row has tokens of the model's own tokenizer and template, these are taught; or every row is rendered from
    its messages."""
    heldout: list[Path] = []
    """Files of rows that are not trained on and whose loss is measured."""
    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Without `heldout`: the rows of this share of the tasks in `data`, of one at least where there are two, drawn by
    the run's seed; 0: no loss is measured."""
    heldout_every_steps: NonNegativeInt = 0
    """Measure it after so many steps, too; 0: before the first and after the last."""
    max_tokens: PositiveInt | None = None
    """A row with a longer segment is left out and counted; null: environment.max_tokens_per_episode."""

    @model_validator(mode="after")
    def _no_row_is_both(self) -> Self:
        for path in self.heldout:
            if path in self.data:
                raise ValueError(f"heldout: {path} is in data, too, so that it would be trained on")
        return self
