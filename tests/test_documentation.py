"""What stands in the documentation can be done: links lead somewhere, commands and their options exist, YAML is that of
a recipe, suite or tool, Python runs or at least names what there is."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml
from typer.core import TyperGroup

import polyturn
from polyturn.cli.main import app
from polyturn.configs.loading.loader import shipped_names
from polyturn.configs.loading.suites import ENTRY_KEYS, SUITE_KEYS
from polyturn.configs.schema.reference import options_markdown
from tests.support.documentation import FENCE, PAGES, ROOT, Block, command_lines, of

COMMAND = typer.main.get_command(app)
LINK = re.compile(r"(?<!!)\[[^\]\[]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_what_is_there(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.relative_to(ROOT)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(other), (
                f"{page.relative_to(ROOT)} links to {target}; there is no such heading"
            )


def anchors(page: Path) -> set[str]:
    """Of headings as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def test_every_page_of_the_documentation_is_reached_from_its_first() -> None:
    first = ROOT / "docs" / "README.md"
    seen, waiting = set(), [first]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            other = (page.parent / target.partition("#")[0]).resolve()
            if other.suffix == ".md" and other.is_relative_to(ROOT / "docs") and other not in seen:
                waiting.append(other)
    assert sorted(set((ROOT / "docs").glob("*.md")) - seen) == []


def test_there_are_commands_in_the_documentation() -> None:
    assert len(command_lines()) > 50


@pytest.mark.parametrize(("place", "line"), command_lines(), ids=lambda value: value[:60])
def test_a_command_of_the_documentation_exists(place: str, line: str) -> None:
    words = shlex.split(line.replace("…", "dots").replace("...", "dots"), comments=True)
    for end in ("&", "&&", "|", ">", ">>", "2>&1", ";"):
        if end in words:
            words = words[: words.index(end)]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word and not word.startswith("-")} <= set(targets), (
            place
        )
    elif words[0] == "polyturn":
        check_command(words[1:], place)
    elif words[1] == "-m" and words[2] == "polyturn":
        check_command(words[3:], place)
    else:
        path = words[1] if words[1] != "-m" else f"{words[2].removeprefix('polyturn.').replace('.', '/')}.py"
        assert (ROOT / path).is_file() or (ROOT / path).with_suffix("").is_dir(), f"{place}: no {path}"


RECIPES = ("recipe", "recipe_or_suite", "suite")
"""What commands call an argument that is a YAML file or a shipped name."""
OPTION_KEYS = {
    f"{section}.{key}" if section else key
    for section, keys in re.findall(
        r"^## (?:`([^`]+)`|The run).*?\n(.*?)(?=^## |\Z)", options_markdown(), re.DOTALL | re.MULTILINE
    )
    for key in re.findall(r"^\| `([^`]+)` \|", keys, re.MULTILINE)
}
"""As `polyturn config options` prints them."""


def check_command(words: list[str], place: str) -> None:
    """That the command is there, and takes these arguments; it is not run."""
    command, name = COMMAND, "polyturn"
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{place}: there is no command `{name} {words[0]}`"
        command, name, words = command.commands[words[0]], f"{name} {words[0]}", words[1:]
    if isinstance(command, TyperGroup) or {"-h", "--help"} & set(words):
        return
    context = command.make_context(name, words)
    recipe = next((context.params[key] for key in RECIPES if context.params.get(key)), None)
    if recipe is None or recipe.isupper():
        return
    shipped = shipped_names("recipe") + shipped_names("suite")
    assert recipe in shipped or Path(recipe).suffix in (".yaml", ".yml"), (
        f"{place}: no recipe {recipe!r} ships"
    )
    tops = {key.partition(".")[0] for key in OPTION_KEYS}
    if recipe in shipped_names("suite"):
        tops |= {*SUITE_KEYS, *ENTRY_KEYS, "entries"}
    for override in context.params["overrides"] or ():
        top = override.partition("=")[0].partition(".")[0]
        assert top in tops, f"{place}: {override!r} begins with no section of a recipe"


@pytest.mark.parametrize("block", of("yaml", "json", "toml"), ids=lambda block: block.place)
def test_data_in_the_documentation_can_be_read(block: Block) -> None:
    match block.language:
        case "yaml":
            assert list(yaml.safe_load_all(block.text))
        case "json":
            lines = block.text.splitlines()
            try:
                json.loads(block.text)
            except ValueError:
                assert all(json.loads(line) for line in lines if line.strip())
        case "toml":
            assert tomllib.loads(block.text)


PYTHON = [page for page in PAGES if any(block.page == page for block in of("python"))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_the_documentation_names_what_there_is(page: Path, tmp_path: Path, monkeypatch) -> None:
    """Imports, functions and classes are run; that what is called by them works is tested where it is at home."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("documented")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = module.__dict__
    names["polyturn"] = polyturn
    names |= {name: getattr(polyturn, name) for name in polyturn.__all__}
    for block in (block for block in of("python") if block.page == page):
        tree = ast.parse(block.text, block.place)
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and not importable(node, page):
                names |= {alias.asname or alias.name: lambda *_, **__: None for alias in node.names}
            elif isinstance(
                node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            ):
                exec(compile(ast.Module([node], []), block.place, "exec"), names)
        check_calls(tree, names, block)


def importable(node: ast.ImportFrom, page: Path) -> bool:
    """Not what is the reader's own: a module of a package that the page itself shows."""
    return (node.module or "").partition(".")[0] not in re.findall(
        r"^# (\w+)(?:/\w+)*\.py", page.read_text(encoding="utf-8"), re.MULTILINE
    ) and not (node.module or "").startswith("my_")


def check_calls(tree: ast.Module, names: dict[str, object], block: Block) -> None:
    """What is called by a name of ours takes the keywords that it is given."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = resolve(node.func, names)
        if called is None or not str(getattr(called, "__module__", "")).startswith("polyturn"):
            continue
        try:
            parameters = inspect.signature(called).parameters
        except (TypeError, ValueError):
            continue
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            continue
        wrong = {keyword.arg for keyword in node.keywords if keyword.arg} - set(parameters)
        assert not wrong, f"{block.place}: {ast.unparse(node.func)} takes no {', '.join(sorted(wrong))}"


def resolve(node: ast.expr, names: dict[str, object]) -> object | None:
    if isinstance(node, ast.Name):
        return names.get(node.id, getattr(builtins, node.id, None))
    if isinstance(node, ast.Attribute):
        return getattr(resolve(node.value, names), node.attr, None)
    return None


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    shown = set(re.findall(r'id="polyturn\.[\w.]*\.(\w+)"', reference))
    assert {name for name in polyturn.__all__ if not name.startswith("_")} - shown == set()
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?:https?:)?//(?!squidfunk)[^"]*\.(?:js|css)"', front)
