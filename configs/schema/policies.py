"""What is said of a policy that is named."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from polyturn.configs.schema.section import Section


class BestOf(Section):
    """The best of several samples of a policy. Nothing that is chosen so can be trained on."""

    policy: str
    """Another policy's name."""
    options: dict[str, Any] = {}
    """That policy's options."""
    num_samples: Annotated[int, Field(ge=2)] = 4
    """Each costs as much as a policy without this."""
    per: Literal["episode", "turn"] = "episode"
    """Whole episodes are played and one is kept, or in every turn several messages are asked for and one is said."""
    by: str = "majority"
    """majority: what most of them say. grade: the environment's own grade, which no policy has: an upper bound; of
    episodes alone. `module:name` or `path/to/file.py:name`: a score of one's own."""
    by_options: dict[str, Any] = {}
    """Keyword arguments of the score."""
