"""What the site makes of the pages: the order of its navigation, a page for the README of each recipe, and links to
what is no page of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel

FIRST = "README.md"
LINK = re.compile(r"\[([^\]\[]+)\]\(([^)\s#]+\.md)(?:#[^)]*)?\)")
OUTSIDE = re.compile(r"\[([^\]\[]+)\]\((\.\./[^)\s]+)\)")
RECIPES = "configs/recipes"
TO_RECIPE = re.compile(r"\]\(\.\./configs/recipes/(\w+)/README\.md")


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


def on_files(files: Any, config: Any) -> Any:
    """The READMEs of the recipes as pages `recipes/NAME.md`, which docs/recipes.md links to."""
    folder = Path(config["config_file_path"]).parent / RECIPES
    for readme in sorted(folder.glob("*/README.md")):
        name = readme.parent.name
        text = page_of_recipe(name, readme.read_text(encoding="utf-8"))
        files.append(
            File.generated(config, f"recipes/{name}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        )
    return files


def page_of_recipe(name: str, text: str) -> str:
    """A README with its links as they lead on the site; what is no page of it is named by its path."""
    text = re.sub(r"\]\(\.\./\.\./\.\./docs/", "](../", text)
    text = re.sub(r"\]\(\.\./(\w+)/README\.md", r"](\1.md", text)
    text = re.sub(r"\[([^\]\[]+)\]\(\.\./\.\./\.\./([^)\s]+)\)", r"\1 (`\2`)", text)
    return re.sub(r"\[([^\]\[]+)\]\(([\w.]+\.yaml)\)", rf"\1 (`{RECIPES}/{name}/\2`)", text)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What lies beside the documentation in the repository is named by its path there."""
    if page.file.src_uri.startswith("recipes/"):
        return markdown
    markdown = TO_RECIPE.sub(r"](recipes/\1.md", markdown)
    return OUTSIDE.sub(lambda link: f"{link[1]} (`{link[2].removeprefix('../')}`)", markdown)
