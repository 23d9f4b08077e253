"""The tokens of an episode as text, coloured by what is known of each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.cells import cell_len

from polyturn.agents.episode import Episode
from polyturn.agents.ledger import Segment
from polyturn.cli.traces.paper import Paper
from polyturn.configs.errors import ConfigError
from polyturn.configs.loading import yaml_tree
from polyturn.configs.models import resolve_model_path
from polyturn.tools.plain import printable

TOKENIZER = "tokenizer.json"
UNFINISHED = "\ufffd"
MOST_PIECES = 6
"""So many tokens of bytes make one character at most."""
CYCLE = ("green", "cyan", "magenta", "yellow", "blue")

Decode = Callable[[list[int]], str]
Colours = Callable[[Segment, int], tuple[str | None, bool]]
"""The colour of a token of a segment, and whether it is dim."""


def _by_mask(segment: Segment, index: int) -> tuple[str | None, bool]:
    return ("green", False) if segment.sampled[index] else (None, True)


def _by_logprob(segment: Segment, index: int) -> tuple[str | None, bool]:
    if not segment.sampled[index]:
        return None, True
    probability = float(np.exp(segment.logprobs[index]))
    return ("green" if probability >= 0.9 else "yellow" if probability >= 0.3 else "red"), False


def _by_version(segment: Segment, index: int) -> tuple[str | None, bool]:
    version = int(segment.policy_versions[index])
    return (None, True) if version < 0 else (CYCLE[version % len(CYCLE)], False)


def _by_turn(segment: Segment, index: int) -> tuple[str | None, bool]:
    return CYCLE[int(segment.turns[index]) % len(CYCLE)], not segment.sampled[index]


COLOURINGS: dict[str, tuple[Colours, str]] = {
    "mask": (_by_mask, "green was sampled, dim was not"),
    "logprob": (_by_logprob, "green 0.9 and more, yellow 0.3 and more, red less likely; dim was not sampled"),
    "version": (_by_version, "a colour for each version of the policy; dim was not sampled"),
    "turn": (_by_turn, "a colour for each turn; dim was not sampled"),
}
"""By name, with the sentence that explains the colours."""


def token_lines(episode: Episode, decode: Decode, coloured_by: str, paper: Paper) -> Iterator[str]:
    """The tokens of all segments, folded to the width."""
    colours, legend = COLOURINGS[coloured_by]
    for number, segment in enumerate(episode.segments):
        role = f", {printable(segment.role)}" if segment.role else ""
        yield ""
        yield paper.ink(
            f"tokens of segment {number}{role}: {len(segment):,}, {segment.num_sampled:,} sampled ({legend})",
            bold=True,
        )
        line, used = "", 0
        for text, index in pieces(segment.token_ids.tolist(), decode):
            colour, dim = colours(segment, index)
            for part, ends in _parts(printable(text).replace("\t", "⇥")):
                size = cell_len(part)
                if used and used + size > paper.width:
                    yield line
                    line, used = "", 0
                line, used = line + (paper.ink(part, colour, dim=dim) if part else ""), used + size
                if ends:
                    yield line
                    line, used = "", 0
        if line:
            yield line


def pieces(token_ids: Sequence[int], decode: Decode) -> Iterator[tuple[str, int]]:
    """The text of the tokens with the place of each; tokens that make a character together come as one."""
    start = 0
    for end in range(1, len(token_ids) + 1):
        text = decode(list(token_ids[start:end]))
        if not text.endswith(UNFINISHED) or end - start >= MOST_PIECES or end == len(token_ids):
            yield text, start
            start = end


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a token's text, with whether a line ends behind it; the line's end is shown."""
    *ended, last = text.split("\n")
    for part in ended:
        yield f"{part}⏎", True
    yield last, False


def read_tokenizer(directory: Path, named: str | None) -> Decode:
    """How ids become text: by the tokenizer that is named, by the run's, or, without one, as numbers.

    Raises:
        ConfigError: the one that is named is none.
    """
    places = [resolve_model_path(named, key="--tokenizer")] if named else list(_places(directory))
    found = [place / TOKENIZER for place in places if (place / TOKENIZER).is_file()]
    if not found and named:
        raise ConfigError(f"--tokenizer: there is no {places[0] / TOKENIZER}; name a model's directory")
    if not found or importlib.util.find_spec("tokenizers") is None:
        return lambda ids: "".join(f"{identity} " for identity in ids)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(found[0]))
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def _places(directory: Path) -> Iterator[Path]:
    """Where a run has its tokenizer: beside its policy, or with the model that it began with."""
    yield directory / "policy"
    config = directory / "config.yaml"
    if not config.is_file():
        return
    try:
        named = yaml_tree.read_file(config).plain()["model"]["path"]
        yield resolve_model_path(str(named), needs_weights=False)
    except (ConfigError, KeyError, TypeError):
        # A model that is not on this machine: ids are shown.
        return
