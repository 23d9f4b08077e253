"""Which samples of a group begin as branches of others, in place of being played from the start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from polyturn.configs.schema.section import Plugin, Section


class NoBranching(Section):
    """Every sample is played from the start."""

    kind: Literal["none"] = "none"


class TurnBranching(Section):
    """At any turn of the trunk but the first, drawn from the seed (Tree-GRPO, arXiv 2509.21240)."""

    kind: Literal["turns"]
    num_trunks: PositiveInt | None = None
    """Samples of a group that are played from the start; the others branch from them. null: half of them."""


class EntropyBranching(Section):
    """At the turn whose first tokens are the most uncertain beside the first turn's (ARPO, arXiv 2507.19849)."""

    kind: Literal["entropy"]
    num_trunks: PositiveInt | None = None
    """Samples of a group that are played from the start; the others branch from them. null: half of them."""
    first_tokens: PositiveInt = 20
    """Tokens of each turn that are looked at."""
    min_rise: float | None = None
    """Nats by which a turn must be more uncertain than the first one to be branched at; what finds no such turn is
    played from the start. null: however little."""


class PluginBranching(Plugin):
    """At a turn that a function of one's own chooses."""

    num_trunks: PositiveInt | None = None
    """Samples of a group that are played from the start; the others branch from them. null: half of them."""


Branching = Annotated[
    NoBranching | TurnBranching | EntropyBranching | PluginBranching, Field(discriminator="kind")
]
