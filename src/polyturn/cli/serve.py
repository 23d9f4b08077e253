"""`polyturn serve`: servers beside a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from polyturn.cli.outcome import reported
from polyturn.configs.errors import ConfigError
from polyturn.envs.two_hop.world import WorldSize
from polyturn.tools.search.corpus import PASSAGES_NAME, PageFile, read_passages
from polyturn.tools.search.dense import DenseIndex, DenseOptions, TransformerEncoder
from polyturn.tools.search.retrieval import Retriever
from polyturn.tools.search.server import SearchApp, run_server

app = typer.Typer(help="Serve what environments use.", no_args_is_help=True, rich_markup_mode=None)
_KINDS = ("auto", "bm25", "dense", "hybrid")
_EVERY = 100_000


@app.callback()
def _group() -> None:
    """Keeps `search` a command of its own."""


@app.command()
def search(
    index: Annotated[
        Path | None, typer.Option(help="An index's directory; built there from --corpus if it is empty.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="A JSONL file of passages in wiki-18's format; linked, not copied.")
    ] = None,
    shard: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of --index: an index's directory, or the URL of another search server; may be repeated. "
            "All are searched as one, by score."
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help=f"{', '.join(_KINDS)}; auto takes what the directory has.")
    ] = "auto",
    model: Annotated[
        Path | None, typer.Option(help="A sentence encoder's directory, for dense and hybrid.")
    ] = None,
    factory: Annotated[
        str, typer.Option(help="Of a new dense index, as faiss names it: Flat, IVF800,SQ8, HNSW32,SQ8.")
    ] = "Flat",
    e5: Annotated[bool, typer.Option("--e5", help="Put E5's prefixes before queries and passages.")] = False,
    pages: Annotated[Path | None, typer.Option(help="A JSONL file of {url, contents} for /access.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Passages for a request that does not say.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Searches at once; default: one a core.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; by default this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    build_only: Annotated[
        bool, typer.Option("--build-only", help="Build the index, and serve nothing.")
    ] = False,
) -> None:
    """Serve a search index: Search-R1's /retrieve, ASearcher's /access, and /health.

    Without --index and --corpus it serves the passages of the two-hop world.

    \b
    Example: polyturn serve search --corpus wiki-18.jsonl --index wiki-18-index
    polyturn serve search --shard wiki-18-index-0 --shard http://10.0.0.2:8000
    """
    with reported(), _as_config_error():
        if shard and (index or corpus or build_only):
            raise ConfigError(
                "command line: --shard takes what is built; build each with --index and --build-only"
            )
        if build_only and index is None:
            raise ConfigError("command line: --build-only needs --index")
        retriever = _shards(shard, kind) if shard else _engine(index, corpus, kind, model, factory, e5)
        if build_only:
            return
        further = None if pages is None else PageFile(pages)
        application = SearchApp(retriever, top_k=top_k, pages=further, num_threads=threads)
        run_server(application, host=host, port=port, on_start=lambda url: typer.echo(f"search at {url}"))


def _shards(shards: list[str], kind: str) -> Retriever:
    """All of them as one."""
    from polyturn.tools.search.shards import ShardedRetriever, open_shard

    _check_kind(kind)
    return ShardedRetriever([open_shard(where, kind) for where in shards])  # type: ignore[arg-type]


def _check_kind(kind: str) -> None:
    if kind not in _KINDS:
        raise ConfigError(f"command line: --kind is one of {', '.join(_KINDS)}, not '{kind}'")


def _engine(
    index: Path | None, corpus: Path | None, kind: str, model: Path | None, factory: str, e5: bool
) -> Retriever:
    """The engine that the options mean, built where it is not there yet."""
    from polyturn.tools.search.bm25 import BM25Index
    from polyturn.tools.search.engine import open_engine

    _check_kind(kind)
    if index is None:
        if corpus is None:
            from polyturn.envs.two_hop.env import build_index

            return build_index(1, WorldSize())
        if kind not in ("auto", "bm25"):
            raise ConfigError(f"command line: --kind {kind} needs --index, a directory to keep it in")
        with _counted("indexing") as on_passage:
            return BM25Index.build(read_passages(corpus), on_passage=on_passage)
    wanted = {"auto": [], "bm25": ["bm25"], "dense": ["dense"], "hybrid": ["bm25", "dense"]}[kind]
    has = {"bm25": (index / "tantivy").is_dir(), "dense": (index / "dense").is_dir()}
    if not any(has.values()) and not wanted:
        wanted = ["bm25"]
    for part in wanted:
        if not has[part]:
            _build(part, index, corpus, model, factory, e5)
    return open_engine(index, kind)  # type: ignore[arg-type]


def _build(part: str, index: Path, corpus: Path | None, model: Path | None, factory: str, e5: bool) -> None:
    """Build one part of an index in its directory."""
    from polyturn.tools.search.bm25 import BM25Index

    source = None if (index / PASSAGES_NAME).exists() else corpus
    if source is None and not (index / PASSAGES_NAME).exists():
        raise ConfigError(f"command line: {index} holds no index; give --corpus to build one")
    with _counted(f"building {part} in {index}") as on_passage:
        if part == "bm25":
            BM25Index.build(source, index, on_passage=on_passage)
            return
        if model is None:
            raise ConfigError("command line: a dense index needs --model, a sentence encoder's directory")
        query, passage = ("query: ", "passage: ") if e5 else ("", "")
        options = DenseOptions(
            factory=factory, query_prefix=query, passage_prefix=passage, model=str(model.resolve())
        )
        DenseIndex.build(
            source, index, encoder=TransformerEncoder(model), options=options, on_passage=on_passage
        )


@contextmanager
def _as_config_error() -> Iterator[None]:
    """What the search package calls a wrong value is bad input here."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def _counted(what: str) -> Iterator[Callable[[int], None]]:
    """Shows a count that grows: in place on a terminal, a line now and then elsewhere."""
    live = sys.stderr.isatty()

    def count(number: int) -> None:
        if live and number % 1000 == 0:
            typer.echo(f"\r{what}: {number:,} passages", err=True, nl=False)
        elif not live and number % _EVERY == 0:
            typer.echo(f"{what}: {number:,} passages", err=True)

    typer.echo(f"{what} ...", err=True)
    yield count
    if live:
        typer.echo("", err=True)
