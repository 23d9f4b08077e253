"""`polyturn traces show`: stored episodes as conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import orjson
import typer

from polyturn.cli.outcome import reported
from polyturn.cli.traces import wanted
from polyturn.cli.traces.conversation import Shown, episode_lines
from polyturn.cli.traces.paper import Paper, put
from polyturn.cli.traces.tokens import COLOURINGS, read_tokenizer, token_lines
from polyturn.configs.errors import ConfigError, as_config_error, did_you_mean
from polyturn.rollout.traces.files import Trace, TraceFiles
from polyturn.rollout.traces.selection import Selection, selected
from polyturn.tools.plain import printable_json

SEGMENT_COLUMNS = ("token_ids", "sampled", "logprobs", "policy_versions", "turns")


def show(
    directory: wanted.Directory,
    episode: Annotated[
        str | None, typer.Argument(metavar="EPISODE", help="The beginning of its id, or its group's.")
    ] = None,
    parts: wanted.Parts = None,
    step: wanted.Steps = None,
    task: wanted.TaskId = None,
    environment: wanted.Environment = None,
    outcome: wanted.OutcomeName = None,
    reward: wanted.RewardRange = None,
    tool: wanted.ToolName = None,
    text: Annotated[str | None, typer.Option("--text", metavar="TEXT", help="That stands in it.")] = None,
    regex: wanted.IsRegex = False,
    limit: Annotated[int, typer.Option("--limit", help="So many episodes; 0 for all.", min=0)] = 1,
    thinking: Annotated[bool, typer.Option("--thinking", help="Unfold what was thought.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Fold no long message.")] = False,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="BY", help="Tokens, by mask, logprob, version or turn.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", metavar="MODEL")] = None,
    as_json: wanted.AsJson = False,
    no_pager: wanted.NoPager = False,
    color: wanted.Colour = "auto",
) -> None:
    """Show episodes as conversations.

    \b
    Example: polyturn traces show runs/quickstart-20260131-120000 --step 3 --reward :0
    """
    with reported():
        files = wanted.open_files(directory)
        paper = Paper.of_terminal(color)
        if tokens is not None and tokens not in COLOURINGS:
            raise ConfigError(
                f"--tokens: '{tokens}' is none of {', '.join(COLOURINGS)}{did_you_mean(tokens, COLOURINGS)}"
            )
        chosen = wanted.selection(
            files,
            parts=parts,
            steps=step,
            reward=reward,
            text=text,
            is_regex=regex,
            episode=episode,
            task=task,
            environment=environment,
            outcome=outcome,
            tool=tool,
        )
        total, traces = _traces(files, chosen, limit)
        if as_json:
            for trace in traces:
                typer.echo(_as_json(trace, with_tokens=tokens is not None))
        else:
            decode = None if tokens is None else read_tokenizer(directory, tokenizer)

            def lines() -> Iterator[str]:
                for trace in traces:
                    yield from episode_lines(trace, paper, Shown(thinking=thinking, full=full))
                    if decode is not None and tokens is not None:
                        yield from token_lines(trace.episode, decode, tokens, paper)
                    yield ""
                if limit and total > limit:
                    yield f"{limit} of {total:,} that fit; --limit shows more, `polyturn traces search` lists them"

            put(lines(), paged=not no_pager, is_coloured=paper.is_coloured)
        wanted.print_damage(files)


def _traces(files: TraceFiles, chosen: Selection, limit: int) -> tuple[int, Iterator[Trace]]:
    """How many fit, and the first of them. Raises ConfigError where none does."""
    with as_config_error():
        table = selected(files, chosen, ("place", "episode_id"))
    if not table.num_rows:
        for sentence in files.damage:
            typer.echo(f"warning: {sentence}", err=True)
        raise ConfigError(
            f"no episode of {files.directory} fits (searched: {', '.join(chosen.parts or files.usual_parts)}); "
            "`polyturn traces stats` says what there is, --in all looks everywhere"
        )

    def found() -> Iterator[Trace]:
        places, identities = table["place"].to_pylist(), table["episode_id"].to_pylist()
        for place, identity in list(zip(places, identities, strict=True))[: limit or None]:
            yield from files.read_episodes(place, [identity])

    return table.num_rows, found()


def _as_json(trace: Trace, *, with_tokens: bool) -> str:
    episode = trace.episode
    left_out = {"segments", "turn_records", "timings", "tools"}
    row: dict[str, Any] = {name: getattr(episode, name) for name in episode.__slots__ if name not in left_out}
    row |= {
        "part": trace.file.part,
        "step": trace.file.step,
        "state": trace.state,
        "advantages": trace.advantages,
        "timings": asdict(episode.timings),
        "turn_records": [asdict(record) for record in episode.turn_records],
        "tools": {name: asdict(usage) for name, usage in episode.tools.items()},
    }
    if with_tokens:
        row["segments"] = [
            {"role": segment.role} | {name: getattr(segment, name) for name in SEGMENT_COLUMNS}
            for segment in episode.segments
        ]
    return printable_json(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY).decode())
