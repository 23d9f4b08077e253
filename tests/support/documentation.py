"""The pages of the documentation, their blocks of code, and the commands in them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "configs").rglob("*.md"),
        *ROOT.glob("*.md"),
    ]
)
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
STARTS = ("polyturn ", "python -m polyturn", "python benchmarks/", "make ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    page: Path
    language: str
    text: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        body = inspect.cleandoc(found[4]) if found[1] else found[4]
        yield Block(page=page, language=found[2], text=body, line=text.count("\n", 0, found.start(4)) + 1)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def command_lines() -> list[tuple[str, str]]:
    """Of blocks without a language or of a shell: what stands in them of ours, a command a line."""
    found = []
    for block in of("", "bash", "sh", "shell", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            while re.match(r"^[A-Z_]+=\S+ ", line):
                line = line.partition(" ")[2]
            if line.startswith(STARTS):
                found.append((block.place, line))
    return found
