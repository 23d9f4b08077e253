"""The page as one file that holds the answers it asks for: to be sent to somebody, or kept."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from polyturn.rollout.whole_file import whole_file
from polyturn.viewer.answers import Answers, Conflict
from polyturn.viewer.parameters import NotThere, Parameters
from polyturn.viewer.plain_json import Json, dumps
from polyturn.viewer.server import INDEX, page_files

FORMAT = 1
POINTS = 300
"""Of each curve."""
PAGE = 1_000
MAX_TOKENS = 20_000
"""Of a segment."""
UNESCAPED = "-_.!~*'()"
"""As `encodeURIComponent` leaves them."""
_SCRIPT = re.compile(r'<script[^>]* src="\./([\w.]+)"[^>]*></script>')
_STYLE = re.compile(r'<link rel="stylesheet"[^>]* href="\./([\w.]+)"[^>]*>')
_ICON = re.compile(r'(<link rel="icon"[^>]* href=")\./([\w.]+)(")')


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportChoice:
    """What goes into a file."""

    first_step: int = 0
    last_step: int = 2**53
    num_episodes: int = 200
    """Of each run, at most: the newest steps first, whole groups."""
    max_bytes: int = 32_000_000
    """Of all answers; episodes are left out where they would be more."""


@dataclass(kw_only=True)
class _Collected:
    answers: Answers
    choice: ExportChoice
    found: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, path: str, *, asked: Sequence[tuple[str, str]] = (), **parameters: str) -> Json | None:
        """Keep an answer under its key. None where there is none, or no room for it.

        `asked`: parameters that are no part of the key.
        """
        pairs = sorted(parameters.items())
        try:
            answer: Json = self.answers.answer(path, Parameters([*pairs, *asked]))
        except (NotThere, Conflict) as fault:
            self.left_out.append(str(fault))
            return None
        return answer if self.keep(path, pairs, answer) else None

    def keep(self, path: str, pairs: Sequence[tuple[str, str]], answer: Json) -> bool:
        body = dumps(answer)
        key = request_key(path, pairs)
        if self.size + len(body) > self.choice.max_bytes:
            return False
        self.size += len(body)
        self.found[key] = body
        return True


def request_key(path: str, pairs: Sequence[tuple[str, str]]) -> str:
    """The URL of a request, as `requestKey` of api.ts makes it."""
    query = urlencode(pairs, safe=UNESCAPED, quote_via=quote)
    return f"{path}?{query}" if query else path


def export_page(answers: Answers, path: Path, choice: ExportChoice) -> list[str]:
    """Write the file, all of it or nothing; sentences on what was left out of it.

    Raises `OSError` where it cannot be written.
    """
    collected = _Collected(answers=answers, choice=choice)
    runs = collected.add("/api/runs")
    for run in runs["runs"] if runs is not None else ():
        _collect_run(collected, run)
    evaluations = [run["id"] for run in (runs or {"runs": []})["runs"] if run["kind"] == "evaluation"]
    for a, b in itertools.islice(itertools.permutations(evaluations, 2), 12):
        collected.add("/api/compare", a=a, b=b)
    left_out = list(dict.fromkeys(collected.left_out))
    entries = b",".join(b"%s:%s" % (dumps(key), body) for key, body in collected.found.items())
    data = b'{"format":%d,"left_out":%s,"answers":{%s}}' % (FORMAT, dumps(left_out), entries)
    with whole_file(path) as file:
        file.write(whole_page(data))
    return left_out


def _collect_run(collected: _Collected, summary: Json) -> None:
    run = summary["id"]
    collected.add("/api/run", run=run)
    metrics = collected.answers.answer("/api/metrics", Parameters([("run", run)]))
    every = [("name", name) for name in metrics["names"]]
    collected.add("/api/metrics", asked=[*every, ("points", str(POINTS))], run=run)
    if summary["kind"] == "evaluation":
        collected.add("/api/report", run=run)
    else:
        collected.add("/api/mismatch", run=run)
    num_left = collected.choice.num_episodes
    for one in summary["sets"]:
        num_left -= _collect_set(collected, run, one, num_left)


def _collect_set(collected: _Collected, run: str, one: Json, num_left: int) -> int:
    """Returns how many episodes were kept."""
    choice, name = collected.choice, one["name"]
    collected.add("/api/steps", run=run, set=name)
    is_numbered = one["kind"] == "train"
    steps = [
        step for step in one["steps"] if not is_numbered or choice.first_step <= step <= choice.last_step
    ]
    for step in steps:
        collected.add("/api/step", run=run, set=name, step=str(step))
    rows: list[Json] = []
    for group in _groups(collected, run, name, steps):
        is_full = len(rows) + len(group) > num_left
        if is_full or not _collect_group(collected, run, name, group):
            reason = "episodes" if is_full else "size"
            collected.left_out.append(
                f"{run}, {one['title']}: more episodes are in its directory than the export's bound of {reason} lets in"
            )
            break
        rows += group
    whole = collected.answers.answer(
        "/api/episodes", Parameters([("run", run), ("set", name), ("limit", "0")])
    )
    page = {**whole, "rows": rows, "num_matching": len(rows), "num_all": len(rows)}
    collected.keep("/api/episodes", [("run", run), ("set", name)], page)
    return len(rows)


def _groups(collected: _Collected, run: str, name: str, steps: Sequence[int]) -> Iterator[list[Json]]:
    """The rows of each group, of the newest step first."""
    for step in reversed(steps):
        of_step: dict[str, list[Json]] = {}
        asked = [("run", run), ("set", name), ("step", str(step)), ("limit", str(PAGE))]
        for offset in itertools.count(0, PAGE):
            page = collected.answers.answer("/api/episodes", Parameters([*asked, ("offset", str(offset))]))
            for row in page["rows"]:
                of_step.setdefault(row["group_id"], []).append(row)
            if offset + PAGE >= page["num_matching"]:
                break
        yield from of_step.values()


def _collect_group(collected: _Collected, run: str, name: str, group: Sequence[Json]) -> bool:
    """Whether all of it was kept."""
    where: dict[str, Any] = {"run": run, "set": name, "step": str(group[0]["step"])}
    if collected.add("/api/group", group=group[0]["group_id"], **where) is None:
        return False
    for row in group:
        episode = collected.add("/api/episode", id=row["episode_id"], **where)
        if episode is None:
            return False
        row |= {key: episode["row"][key] for key in ("min_version", "max_version")}
        for segment in episode["segments"]:
            number = str(segment["segment"])
            tokens = collected.add(
                "/api/tokens",
                asked=[("count", str(MAX_TOKENS))],
                id=row["episode_id"],
                segment=number,
                **where,
            )
            if tokens is None:
                return False
            if tokens["total"] > MAX_TOKENS:
                collected.left_out.append(
                    f"of longer segments the first {MAX_TOKENS:,} tokens are in the file"
                )
    return True


def whole_page(data: bytes) -> bytes:
    """The page with its script, style, icon and data inside. Its policy lets no other script run, and loads nothing."""
    files = page_files()
    page = files[INDEX].decode()
    scripts: list[str] = []

    def script(found: re.Match[str]) -> str:
        text = files[found[1]].decode().replace("</script", "<\\/script").replace("<!--", "<\\!--")
        scripts.append(text)
        return f'<script type="module">{text}</script>'

    page = _SCRIPT.sub(script, page)
    page = _STYLE.sub(lambda found: f"<style>{files[found[1]].decode()}</style>", page)
    page = _ICON.sub(
        lambda found: f"{found[1]}data:image/svg+xml;base64,{_base64(files[found[2]])}{found[3]}", page
    )
    hashes = " ".join(f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'" for text in scripts)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    meta = f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}" />'
    # No `<` is left in it, so that nothing in it ends the element or begins another.
    text = data.replace(b"<", b"\\u003c").decode()
    inside = f'<script type="application/json" id="polyturn-data">{text}</script>'
    head, mark, rest = page.partition("<head>")
    if not mark:  # the placeholder
        return f"{page}{inside}".encode()
    before, end, after = rest.rpartition("</body>")
    return f"{head}{mark}{meta}{before}{inside}{end}{after}".encode()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
