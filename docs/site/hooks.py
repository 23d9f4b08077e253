"""What the site makes of the pages: the order of its navigation, and links to what is no page of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FIRST = "README.md"
LINK = re.compile(r"\[([^\]\[]+)\]\(([^)\s#]+\.md)(?:#[^)]*)?\)")
OUTSIDE = re.compile(r"\[([^\]\[]+)\]\((\.\./[^)\s]+)\)")


def on_config(config: Any) -> Any:
    """A section for each heading of the first page, with the pages that are linked under it, each where it is first."""
    sections: list[dict[str, list[dict[str, str]]]] = []
    seen = {FIRST}
    for line in (Path(config["docs_dir"]) / FIRST).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections.append({line.removeprefix("## "): []})
        for title, page in LINK.findall(line):
            if sections and page not in seen and not page.startswith(".."):
                seen.add(page)
                next(iter(sections[-1].values())).append({title[0].upper() + title[1:]: page})
    config["nav"] = [{"Start": FIRST}, *sections]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What lies beside the documentation in the repository is named by its path there."""
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].removeprefix('../')}`)", markdown)
