"""What the viewer answers: the declared shapes, the right episodes, and a sentence for whatever is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.token_credit import TokenCredit, token_credit_path, write_token_credit
from polyturn.tools.search.retrieval import Hit, render_hits, render_quoted
from polyturn.viewer.answers import Answers, Conflict
from polyturn.viewer.catalogue import Catalogue
from polyturn.viewer.conversation import num_common, shown_messages
from polyturn.viewer.opening import open_answers
from polyturn.viewer.parameters import BadParameter, NotThere, Parameters
from polyturn.viewer.plain_json import dumps
from polyturn.viewer.renderers import RENDERERS, any_of_them, search_results
from polyturn.viewer.token_columns import seconds_by_turn
from tests.support.command_line import in_this_process
from tests.viewer.api_types import read_api_types
from tests.viewer.fixture import EPISODES_PER_GROUP, GROUPS_PER_STEP, NUM_STEPS, FixtureRun

RUN = "search-20260101-120000"
OTHER = "search-20260101-130000"
TYPES = read_api_types()


def ask(answers: Answers, url: str) -> Any:
    """The answer as the page reads it."""
    parts = urlsplit(url)
    return orjson.loads(dumps(answers.answer(parts.path, Parameters(parse_qsl(parts.query)))))


@pytest.fixture(scope="module")
def answers(made: FixtureRun) -> Answers:
    return Answers(Catalogue([made.folder]))


@contextmanager
def copied(made: FixtureRun, folder: Path) -> Iterator[tuple[Path, Answers]]:
    """A run that a test may damage."""
    path = folder / RUN
    shutil.copytree(made.run, path)
    yield path, Answers(Catalogue([folder]))


@pytest.mark.parametrize(
    "url",
    [
        "/api/runs",
        f"/api/run?run={RUN}",
        f"/api/run?run={OTHER}",
        "/api/run?run=eval-base",
        f"/api/metrics?run={RUN}&run={OTHER}",
        f"/api/metrics?run={RUN}&name=train/loss&points=2",
        f"/api/steps?run={RUN}",
        f"/api/step?run={RUN}&step=6",
        f"/api/step?run={RUN}&set=heldout:before&step=0",
        f"/api/episodes?run={RUN}",
        f"/api/episodes?run={RUN}&version=2&sort=-reward",
        "/api/episodes?run=eval-base&set=two-hop",
        f"/api/group?run={RUN}&group=g00000000",
        f"/api/episode?run={RUN}&id=g00000000-1",
        f"/api/episode?run={RUN}&step=6&id=g00000020-3",
        f"/api/tokens?run={RUN}&id=g00000000-1&segment=1",
        f"/api/mismatch?run={RUN}",
        "/api/live",
    ],
)
def test_answers_have_the_shapes_that_the_page_is_written_for(answers: Answers, url: str) -> None:
    found = ask(answers, url)
    assert TYPES.problems(found, TYPES.answers[urlsplit(url).path]) == []


def test_a_shape_that_differs_would_be_found() -> None:
    page: Any = {"edges": [0.0], "counts": ["1"], "extra": None}
    assert TYPES.problems(page, "Histogram") == [
        "answer.extra is not declared",
        "answer.num_without is missing",
        "answer.counts[0] is no number",
    ]


def test_filters_find_what_is_stored(answers: Answers, made: FixtureRun) -> None:
    def ids(query: str) -> list[str]:
        return [
            row["episode_id"] for row in ask(answers, f"/api/episodes?run={RUN}&limit=1000&{query}")["rows"]
        ]

    store = TrajectoryStore(made.run)
    every = {
        episode.episode_id: episode for step in range(1, NUM_STEPS + 1) for episode in store.journaled(step)
    }
    assert len(ids("")) == len(every) == NUM_STEPS * GROUPS_PER_STEP * EPISODES_PER_GROUP
    wanted = {
        "outcome=failed": lambda e: e.outcome == "failed",
        "dropped=true": lambda e: e.outcome == "failed",
        "min_reward=0.5&max_reward=1": lambda e: e.reward is not None and e.reward >= 0.5,
        "tool_error=true": lambda e: e.num_tool_errors > 0,
        "task=two-hop-3": lambda e: e.task_id == "two-hop-3",
        "group=g00000002": lambda e: e.group_id == "g00000002",
        "text=FOUNDER%20OF%20LIMA": lambda e: "founder of Lima" in str(e.messages),
        "text=%E2%80%AE": lambda e: "\u202e" in str(orjson.dumps(e.messages).decode()),
        "version=0": lambda e: any((s.policy_versions == 0).any() for s in e.segments),
    }
    for query, is_wanted in wanted.items():
        expected = {name for name, episode in every.items() if is_wanted(episode)}
        assert expected and set(ids(query)) == expected, query


def test_order_and_pages(answers: Answers) -> None:
    for sort in ("reward", "-reward", "-metrics.searches", "task_id", "-step", "total_s", "seed"):
        whole = ask(answers, f"/api/episodes?run={RUN}&limit=1000&sort={sort}")["rows"]
        name = sort.removeprefix("-").rpartition(".")[2]
        values = [row["metrics"][name] if "." in sort else row[name] for row in whole]
        values = [int(value) if name == "seed" else value for value in values if value is not None]
        assert values == sorted(values, reverse=sort.startswith("-")), sort
        page = ask(answers, f"/api/episodes?run={RUN}&limit=7&offset=20&sort={sort}")["rows"]
        assert page == whole[20:27]
    with pytest.raises(BadParameter):
        ask(answers, f"/api/episodes?run={RUN}&sort=nothing")


def test_a_group_says_where_its_episodes_part(answers: Answers) -> None:
    group = ask(answers, f"/api/group?run={RUN}&group=g00000004&step=2")
    members = group["episodes"]
    assert len(members) == EPISODES_PER_GROUP and group["num_common_messages"] == 2
    first = members[0]["messages"]
    for member in members[1:]:
        at = member["parts_at_message"]
        assert at is not None and first[:at] != member["messages"] and at >= 2
        assert member["parts_at_token"] is not None


def test_an_episode_shows_thoughts_calls_results_and_branches(answers: Answers) -> None:
    plain = ask(answers, f"/api/episode?run={RUN}&id=g00000001-0")
    call = plain["messages"][2]["calls"][0]
    result = plain["messages"][call["result"]]
    assert call["name"] == "search" and result["role"] == "tool" and result["call_id"] == call["id"]
    assert plain["messages"][2]["thinking"].startswith("First I need") and plain["messages"][2]["turn"] == 0
    assert [passage["rank"] for passage in result["blocks"][0]["passages"]] == [1, 2]
    branching = ask(answers, f"/api/episode?run={RUN}&id=g00000000-1")
    one, two = branching["segments"]
    assert one["parent"] is None and two["parent"] == 0 and 0 < two["num_shared"] < one["num_tokens"]
    failed = ask(answers, f"/api/episode?run={RUN}&id=g00000000-3")
    assert failed["row"]["dropped"] == "failed: environment_fault" and "Traceback" in failed["error"]
    branch = ask(answers, f"/api/episode?run={RUN}&id=g00000002-2")
    assert branch["relatives"][0]["episode_id"] == branch["row"]["parent_id"] == "g00000002-0"


def test_tokens_are_the_stored_ones_with_their_text(answers: Answers, made: FixtureRun) -> None:
    stored = next(
        e for e in TrajectoryStore(made.run).read_step(1) if e.episode_id == "g00000001-0"
    ).segments[0]
    found = ask(answers, f"/api/tokens?run={RUN}&id=g00000001-0&start=0&count=20000")
    assert found["ids"] == stored.token_ids.tolist() and found["sampled"] == stored.sampled.tolist()
    logprobs = [value for value in found["logprobs"] if value is not None]
    assert np.allclose(logprobs, stored.logprobs[stored.sampled])
    assert "".join(found["texts"]).startswith("system Find the answer with the search tool")
    part = ask(answers, f"/api/tokens?run={RUN}&id=g00000001-0&start=5&count=3")
    assert part["ids"] == found["ids"][5:8] and part["total"] == len(stored)


def test_turns_have_their_own_seconds(answers: Answers, made: FixtureRun) -> None:
    stored = next(e for e in TrajectoryStore(made.run).read_step(1) if e.episode_id == "g00000001-0").timings
    turns = ask(answers, f"/api/episode?run={RUN}&id=g00000001-0")["turns"]
    assert len(turns) == 3
    for name in ("generate_s", "queue_s"):
        assert sum(turn[name] for turn in turns) == pytest.approx(getattr(stored, name), rel=1e-4)
    reset = stored.spans[0][2] - stored.spans[0][1]
    assert sum(turn["tools_s"] for turn in turns) == pytest.approx(stored.tools_s - reset, rel=1e-4)
    assert [turn["start_s"] for turn in turns] == [
        pytest.approx(stored.spans[1 + 3 * n][1]) for n in range(3)
    ]


@pytest.mark.parametrize(
    ("spans", "num_turns", "expected"),
    [
        ("TQGT", 1, [(1, 1, 1)]),
        ("QTGGTG", 2, [(2, 1, None), (1, None, None)]),
        ("GQGG", 3, [(1, None, 1), (1, None, None), (1, None, None)]),
        ("T", 0, []),
        ("QT", 1, []),
    ],
)
def test_waits_are_shared_out_to_turns(spans: str, num_turns: int, expected: list[Any]) -> None:
    kinds = {"G": "generate", "T": "tools", "Q": "queue"}
    waits = tuple((kinds[letter], float(at), at + 1.0) for at, letter in enumerate(spans))
    episode = Episode(
        episode_id="e",
        group_id="g",
        env_id="env",
        task_id="t",
        seed=0,
        outcome=Outcome.COMPLETED,
        stop_reason="terminated",
        reward=0.0,
        num_turns=num_turns,
        timings=EpisodeTimings(spans=waits),
    )
    found = [(turn["generate_s"], turn["tools_s"], turn["queue_s"]) for turn in seconds_by_turn(episode)]
    assert found == expected


def test_what_the_trainer_made_of_tokens_stands_beside_them(made: FixtureRun, tmp_path: Path) -> None:
    with copied(made, tmp_path) as (path, answers):
        episodes = TrajectoryStore(path).read_step(2)
        write_token_credit(
            token_credit_path(path, 2),
            [
                (episode.episode_id, number, _credit(segment))
                for episode in episodes
                for number, segment in enumerate(episode.segments)
                if segment.num_sampled
            ],
        )
        found = ask(answers, f"/api/tokens?run={RUN}&step=2&id=g00000005-0")
        sampled = found["sampled"]
        assert [value is not None for value in found["differences"]] == sampled
        assert np.allclose([value for value in found["differences"] if value is not None], 0.25)
        assert np.allclose([value for value in found["ratios"] if value is not None], np.exp(0.25))
        assert TYPES.problems(found, "Tokens") == []
        turns = ask(answers, f"/api/episode?run={RUN}&step=2&id=g00000005-0")["turns"]
        assert np.allclose([turn["mean_difference"] for turn in turns], 0.25)
        mismatch = ask(answers, f"/api/mismatch?run={RUN}")
        assert TYPES.problems(mismatch, "MismatchMap") == []
        assert sum(mismatch["num_tokens"][mismatch["steps"].index(2)]) == sum(
            episode.num_sampled_tokens for episode in episodes
        )


def _credit(segment: Any) -> TokenCredit:
    return TokenCredit(
        proximal_logprobs=segment.logprobs[segment.sampled] + np.float32(0.25),
        clipped=np.zeros(segment.num_sampled, dtype=np.bool_),
    )


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("/api/nothing", NotThere),
        ("/api/run?run=nobody", NotThere),
        ("/api/run", BadParameter),
        (f"/api/run?run={RUN}&run={OTHER}", BadParameter),
        (f"/api/episodes?run={RUN}&limit=-1", BadParameter),
        (f"/api/episodes?run={RUN}&limit=1001", BadParameter),
        (f"/api/episodes?run={RUN}&min_reward=nan", BadParameter),
        (f"/api/episodes?run={RUN}&tool_error=1", BadParameter),
        (f"/api/episodes?run={RUN}&set=../../etc", NotThere),
        (f"/api/step?run={RUN}&step=77", NotThere),
        (f"/api/tokens?run={RUN}&id=g00000001-0&segment=9", NotThere),
        (f"/api/report?run={RUN}", Conflict),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(answers: Answers, url: str, kind: type[Exception]) -> None:
    with pytest.raises(kind) as refused:
        ask(answers, url)
    assert len(str(refused.value).splitlines()) == 1


def test_what_failed_is_still_shown_when_its_journal_is_gone(made: FixtureRun, tmp_path: Path) -> None:
    with copied(made, tmp_path) as (path, answers):
        shutil.rmtree(path / "journal")
        (failed,) = ask(answers, f"/api/episodes?run={RUN}&step=2&dropped=true")["rows"]
        assert failed["outcome"] == "failed" and failed["dropped"] == "failed: environment_fault"
        assert (
            "Traceback" in ask(answers, f"/api/episode?run={RUN}&step=2&id={failed['episode_id']}")["error"]
        )
        assert not ask(answers, f"/api/step?run={RUN}&step=2")["summary"]["is_live"]


def test_groups_that_a_filter_took_are_counted_and_it_is_said_why_they_are_not_shown(
    made: FixtureRun, tmp_path: Path
) -> None:
    with copied(made, tmp_path) as (path, answers):
        lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        row = {**orjson.loads(lines[1]), "rollout/filtered/uniform": 3.0}
        (path / "metrics.jsonl").write_bytes(b"".join([lines[0], orjson.dumps(row) + b"\n", *lines[2:]]))
        shutil.rmtree(path / "journal")
        dropped = ask(answers, f"/api/step?run={RUN}&step={row['step']}")["dropped"]
        [(reason, number)] = [each for each in dropped.items() if each[0].startswith("filtered: ")]
        assert number == 3 and reason.startswith("filtered: uniform (groups, which are stored until the next")


@pytest.mark.parametrize("name", ["format_1_first", "format_1_last", "format_2", "format_3"])
def test_runs_of_earlier_releases_are_shown(name: str) -> None:
    folder = Path(__file__).parents[1] / "rollout" / "older_formats" / name
    answers = Answers(Catalogue([folder]))
    rows = ask(answers, f"/api/episodes?run={name}")
    assert rows["rows"] and TYPES.problems(rows, "EpisodePage") == []
    episode = ask(answers, f"/api/episode?run={name}&id={rows['rows'][0]['episode_id']}")
    assert TYPES.problems(episode, "EpisodeDetail") == []


def test_a_live_run_is_followed(made: FixtureRun, tmp_path: Path) -> None:
    with copied(made, tmp_path) as (path, answers):
        cursor = ask(answers, "/api/live")["cursor"]
        assert ask(answers, f"/api/live?cursor={cursor}")["changed"] == []
        store = TrajectoryStore(path)
        episode = store.journaled(NUM_STEPS)[0]
        object.__setattr__(episode, "episode_id", "later")
        store.journal(NUM_STEPS, episode)
        store.close()
        assert ask(answers, f"/api/live?cursor={cursor}")["changed"] == [RUN]
        assert ask(answers, f"/api/episode?run={RUN}&id=later")["row"]["step"] == NUM_STEPS
        assert ask(answers, f"/api/step?run={RUN}&step={NUM_STEPS}")["summary"]["is_live"]


EVERY = (
    "/api/runs",
    f"/api/run?run={RUN}",
    f"/api/metrics?run={RUN}",
    f"/api/steps?run={RUN}",
    f"/api/step?run={RUN}&step=1",
    f"/api/episodes?run={RUN}&text=a&version=1&sort=metrics.searches",
    f"/api/group?run={RUN}&group=g00000000",
    f"/api/episode?run={RUN}&id=g00000000-1",
    f"/api/tokens?run={RUN}&id=g00000000-1",
    f"/api/mismatch?run={RUN}",
    f"/api/episodes?run={RUN}&set=heldout:before",
)
FILES = (
    "trajectories/step_000001.parquet",
    "journal/step_000001.journal",
    "journal/step_000006.journal",
    "token_credit/step_000001.parquet",
    "evaluation/before.parquet",
    "evaluation/results.jsonl",
    "metrics.jsonl",
    "config.yaml",
    "summary.json",
    "failed_check.json",
)


@pytest.fixture(scope="module")
def damaged_run(made: FixtureRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step and what is under way, to be damaged and mended again."""
    path = tmp_path_factory.mktemp("damaged") / RUN
    shutil.copytree(made.run, path)
    for folder, ending in (("trajectories", "parquet"), ("journal", "journal")):
        for step in range(2, NUM_STEPS):
            (path / folder / f"step_{step:06d}.{ending}").unlink()
    episodes = TrajectoryStore(path).read_step(1)
    rows = [(e.episode_id, n, _credit(s)) for e in episodes for n, s in enumerate(e.segments)]
    write_token_credit(token_credit_path(path, 1), rows)
    return path


HOSTILE_BYTES = (
    b"[" * 5_000,
    b'{"step": 1, "a": 1e999}\n',
    b'{"step": true}\n[]\n',
    b"a: &a [*a]\n",
    b"\xff" * 99,
)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(FILES),
    how=st.sampled_from(["cut", "flip", "replace", "remove"]),
    where=st.floats(0, 1, exclude_max=True),
    content=st.binary(max_size=200) | st.sampled_from(HOSTILE_BYTES),
)
def test_whatever_bytes_are_there_every_answer_is_one(
    damaged_run: Path, name: str, how: str, where: float, content: bytes
) -> None:
    path = damaged_run / name
    before = path.read_bytes() if path.exists() else None
    whole = before or b"{}"
    place = int(where * len(whole))
    if how == "remove":
        path.unlink(missing_ok=True)
    else:
        changed = {
            "cut": whole[:place],
            "flip": whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :],
            "replace": content,
        }[how]
        path.write_bytes(changed)
    try:
        answers = Answers(Catalogue([damaged_run]))
        for url in EVERY:
            try:
                found = ask(answers, url)
            except (NotThere, Conflict):
                continue
            assert TYPES.problems(found, TYPES.answers[urlsplit(url).path]) == [], url
    finally:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(before)


KEYS = ("role", "content", "reasoning", "tool_calls", "tool_call_id", "function", "name", "id")
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=9)


def _nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    role = st.sampled_from(["assistant", "tool", "user"])
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner | role, max_size=5)


@settings(max_examples=25, deadline=None)
@given(messages=st.lists(st.recursive(LEAVES, _nested, max_leaves=12), max_size=6))
def test_messages_of_any_shape_are_shown(messages: list[Any]) -> None:
    for show in {*RENDERERS.values(), any_of_them}:
        found = orjson.loads(dumps(shown_messages(messages, num_turns=2, show=show)))
        assert TYPES.problems(found, ("array", "ShownMessage")) == []
    assert num_common([messages, messages]) <= len(messages)


@pytest.mark.parametrize("title", ["Paris", "Paris (Texas)"])
def test_titles_of_search_results_end_where_their_parenthesis_does(title: str) -> None:
    hits = [Hit(passage_id=str(place), title=title, text="A city.", score=1.0) for place in range(2)]
    for shown in (render_hits(hits), render_quoted(hits)):
        (block,) = search_results({"role": "tool", "content": shown})
        assert [(one["title"], one["text"]) for one in block["passages"]] == [(title, "A city.")] * 2


def test_the_evaluations_of_a_folder_of_runs_are_among_its_runs(made: FixtureRun, tmp_path: Path) -> None:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "one").symlink_to(made.evaluation)
    assert [run.kind for run in Catalogue([tmp_path]).runs()] == ["evaluation"]
    (tmp_path / "a run").symlink_to(made.run)
    assert [run.id for run in Catalogue([tmp_path]).runs()] == ["a run", "one"]


RENDERERS_OF_ONES_OWN = """
def table(message):
    if message["role"] != "tool":
        return []
    return [{"kind": "table", "title": "mine", "columns": ["a"], "rows": [[message["content"][:9]]]}]


def number(message):
    return [{"kind": "table", "title": None, "columns": ["a"], "rows": [[1]]}]


def nothing(message):
    return None


def raises(message):
    raise RuntimeError("no")


def other():
    pass
"""


def test_an_environments_own_renderer_shows_its_messages(made: FixtureRun, tmp_path: Path) -> None:
    """Named as on the command line; what is wrong in one costs no more than its blocks."""
    file = tmp_path / "own looks.py"
    file.write_text(RENDERERS_OF_ONES_OWN)
    url = f"/api/episode?run={RUN}&id=g00000000-1"

    def blocks(name: str) -> list[tuple[str, list[Any]]]:
        renderers = [f"polyturn/TwoHopSearch-v0={file}:{name}"]
        found = ask(open_answers([made.folder], renderers=renderers), url)
        assert TYPES.problems(found, TYPES.answers["/api/episode"]) == []
        return [(message["role"], message["blocks"]) for message in found["messages"]]

    shown = blocks("table")
    assert {role for role, found in shown if found} == {"tool"}
    assert all(found[0]["title"] == "mine" for role, found in shown if role == "tool")
    for name, complaint in (("number", "0.table.rows.0.0: "), ("nothing", "what it returns: ")):
        [[block]] = {str(found): found for _, found in blocks(name)}.values()
        assert block["kind"] == "text" and block["text"].startswith(complaint)
    assert not any(found for _, found in blocks("raises"))
    for text, complaint in (
        ("polyturn/TwoHopSearch-v0", "is written ENV_ID=module:name"),
        (f"x={file}:no", "has no 'no'"),
        (f"x={file}:other", "def show(message"),
    ):
        done = in_this_process(
            "view", str(made.folder), "--renderer", text, "--export", str(tmp_path / "a.html")
        )
        assert done.returncode == 2 and complaint in done.stderr, done.stderr
