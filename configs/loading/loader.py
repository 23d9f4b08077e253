"""From a recipe and the command line to a validated config.

Layers, lowest first: the files that a recipe `extends`, the recipe, the overrides. They are merged as they
were written, and the schema's defaults fill the rest last, so that choosing another `kind` drops the lower
layers' keys of the other one. Every complaint names the file and line of the key, or the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from polyturn.configs.errors import ConfigError, did_you_mean, nearest
from polyturn.configs.loading import upstream, yaml_tree
from polyturn.configs.loading.origins import DEFAULT, annotated
from polyturn.configs.loading.validation import (
    KIND,
    Shape,
    Variants,
    explain,
    field_paths,
    is_text,
    select,
    shape_of,
    takes_text,
)
from polyturn.configs.loading.yaml_tree import Tree
from polyturn.configs.models import LAYOUT_NAME, PRESET, preset_directory
from polyturn.configs.schema.run import RunConfig

__all__ = [
    "ConfigError",
    "dump_config",
    "find_shipped",
    "json_schema",
    "load_config",
    "load_section",
    "read_section",
    "shipped_names",
    "show_origins",
]

COMMAND_LINE = "command line"
PYTHON = "Python"
EXTENDS = "extends"
RUN_RECIPE = "config.yaml"
"""In the directory of a run."""
ALGORITHMS = "algorithms/"
"""Begins the name of a shipped algorithm in `extends`: a part of a recipe."""
CONFIGS_DIRECTORY = Path(__file__).parent.parent

S = TypeVar("S", bound=BaseModel)


def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()
) -> RunConfig:
    """Load a run's config.

    `recipe` is a YAML file or the name of a shipped one; an override is `a.b.c=value`, its value YAML. `options` are
    the same, given by a program in Python. Raises ConfigError, one line for each thing that is wrong.
    """
    return _load_config(recipe, overrides, options)[0]


def show_origins(recipe: str | Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> str:
    """The resolved config as YAML, where each value was written behind it. Takes and raises what `load_config` does."""
    config, tree = _load_config(recipe, overrides, options)
    return annotated(config.model_dump(mode="json"), tree)


def _load_config(
    recipe: str | Path, overrides: Sequence[str], options: Sequence[str]
) -> tuple[RunConfig, Tree]:
    config, tree = _load(RunConfig, find_shipped("recipe", recipe), overrides, options)
    problems = []
    for section, device in (("sglang", config.engines.device), ("megatron", config.trainer.device)):
        problems += _problems(tree, section, getattr(config, section), device)
    problems += _problems(tree, upstream.ROUTER, config.engines.router.options, config.engines.device)
    if problems:
        raise ConfigError("\n".join(problems))
    return config, tree


def _problems(tree: Tree, section: str, values: Mapping[str, Any], device: str) -> list[str]:
    """What the installed package says against a free section, with file and line."""
    found = []
    for key, problem in upstream.find_problems(section, values, device=device):
        node = tree
        for part in f"{section}.{key}".split("."):
            node = node.value[part]
        found.append(f"{node.origin}: {problem}")
    return found


def load_section(section: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Load a YAML file with its layers and overrides as any pydantic section."""
    return _load(section, path, overrides)[0]


def _load(
    section: type[S], path: Path, overrides: Sequence[str], options: Sequence[str] = ()
) -> tuple[S, Tree]:
    tree = read_layers(path, section, ())
    for given, origin in ((overrides, COMMAND_LINE), (options, PYTHON)):
        for override in given:
            tree = merge(tree, read_override(override, section, origin), section)
    tree = name_default_kinds(tree, section)
    return read_section(section, tree), tree


def read_section(section: type[S], tree: Tree) -> S:
    """What was written, as a pydantic section. Raises ConfigError, one line for each thing that is wrong."""
    problems = list(unknown_keys(tree, section, section, ""))
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        # JSON mode is strict about numbers and text, yet takes text for a path.
        return section.model_validate_json(json.dumps(tree.plain()), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(explain(error, tree, section))) from error


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; loading it gives an equal config."""
    return yaml_tree.write(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors and other tools."""
    schema = RunConfig.model_json_schema()
    file_names = {
        "type": "string",
        "description": "A YAML file below this one, relative to it, a shipped recipe, preset:NAME or algorithms/NAME.",
    }
    schema["properties"][EXTENDS] = {"anyOf": [file_names, {"type": "array", "items": file_names}]}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def shipped_names(what: str) -> list[str]:
    """The names of the YAML files that the package ships as `recipe`, `suite` or `algorithm`."""
    return sorted(_shipped(what))


def _shipped(what: str) -> dict[str, Path]:
    """By name, which is the file's: the folder that a recipe shares with its variants is no part of it."""
    return {path.stem: path for path in (CONFIGS_DIRECTORY / f"{what}s").rglob("*.yaml")}


def find_shipped(what: str, name: str | Path) -> Path:
    """The YAML file called `name`, or the shipped recipe, suite or algorithm of that name. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = _shipped(what)
    stem = str(name).removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    if (path / RUN_RECIPE).is_file():
        raise ConfigError(
            f"'{name}' is the directory of a run; its recipe is {path / RUN_RECIPE}, with resume=true it goes on"
        )
    if path.is_dir():
        raise ConfigError(f"'{name}' is a directory; a {what} is a YAML file")
    hint = nearest_or_all(stem, sorted(shipped))
    raise ConfigError(f"there is no {what} '{name}', neither a file nor a shipped one; {hint}")


def nearest_or_all(name: str, known: list[str]) -> str:
    near = nearest(Path(name).name, known)
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    return f"shipped: {', '.join(known) or 'none'}"


def merge(lower: Tree, upper: Tree, shape: Shape) -> Tree:
    """`upper` over `lower`: mappings key by key, the rest replaced. Another `kind` drops the lower keys."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    if (
        isinstance(shape, Variants)
        and KIND in upper.value
        and shape.kind_of(lower.value) != shape.kind_of(upper.value)
    ):
        return upper
    children = dict(lower.value)
    section = select(shape, {**lower.value, **upper.value})
    for key, child in upper.value.items():
        below = shape_of(section.model_fields[key]) if section and key in section.model_fields else None
        children[key] = merge(children[key], child, below) if key in children else child
    return Tree(children, lower.origin)


def read_layers(path: Path, section: type[BaseModel], chain: tuple[Path, ...]) -> Tree:
    """A file over the files that it extends; `chain` are those that led here."""
    tree = yaml_tree.read_file(path)
    children = dict(tree.value)
    extends = children.pop(EXTENDS, None)
    tree = Tree(children, tree.origin)
    if extends is None:
        return tree
    chain = (*chain, path.resolve())
    bases = extends.value if isinstance(extends.value, list) else [extends]
    below = Tree({}, tree.origin)
    for base in bases:
        if not isinstance(base.value, str):
            given = yaml_tree.describe(base.value)
            raise ConfigError(
                f"{base.origin}: 'extends' must name a YAML file or a list of them, got {given}"
            )
        base_path = _find_base(base, path)
        if base_path.resolve() in chain:
            names = " -> ".join(yaml_tree.shown_path(p) for p in (*chain, base_path))
            raise ConfigError(f"{base.origin}: 'extends' goes in a circle: {names}")
        below = merge(below, read_layers(base_path, section, chain), section)
    return merge(below, tree, section)


def _find_base(base: Tree, path: Path) -> Path:
    if base.value.startswith(PRESET):
        try:
            return preset_directory(base.value) / LAYOUT_NAME
        except ConfigError as error:
            raise ConfigError(f"{base.origin}: 'extends': {error}") from error
    beside = path.parent / base.value
    if beside.is_file():
        return beside
    try:
        if base.value.startswith(ALGORITHMS):
            return find_shipped("algorithm", base.value.removeprefix(ALGORITHMS))
        return find_shipped("recipe", base.value)
    except ConfigError as error:
        raise ConfigError(f"{base.origin}: 'extends': {error}") from error


def read_override(override: str, section: type[BaseModel], origin: str = COMMAND_LINE) -> Tree:
    """`a.b.c=value` as a tree."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"{origin}: '{override}' is not of the form key=value, as in trainer.num_steps=10")
    field = dict(field_paths(section)).get(key.strip())
    if field is not None and is_text(field):
        tree = yaml_tree.read_text(text, origin, key.strip())
    else:
        tree = yaml_tree.read_value(text, origin, key.strip())
        if field is not None and takes_text(field) and tree.text is not None and tree.value is not None:
            tree = Tree(tree.text, origin)
    for part in reversed(parts):
        tree = Tree({part: tree}, origin)
    return tree


def name_default_kinds(tree: Tree, shape: Shape) -> Tree:
    """Write the default `kind` into every choice that leaves it out."""
    if not isinstance(tree.value, dict):
        return tree
    children = dict(tree.value)
    if isinstance(shape, Variants) and KIND not in children and shape.default_kind is not None:
        children = {KIND: Tree(shape.default_kind, DEFAULT), **children}
    section = select(shape, children)
    if section is not None:
        for key in children.keys() & section.model_fields.keys():
            children[key] = name_default_kinds(children[key], shape_of(section.model_fields[key]))
    return Tree(children, tree.origin)


def unknown_keys(tree: Tree, shape: Shape, root: type[BaseModel], prefix: str) -> Iterator[str]:
    """One sentence for each key that the schema does not have, in the order of the file."""
    if isinstance(tree.value, list):
        for index, item in enumerate(tree.value):
            yield from unknown_keys(item, shape, root, f"{prefix}{index}.")
    section = select(shape, tree.value) if isinstance(tree.value, dict) else None
    if section is None:
        return
    for key, child in tree.value.items():
        path = f"{prefix}{key}"
        if key in section.model_fields:
            yield from unknown_keys(child, shape_of(section.model_fields[key]), root, f"{path}.")
            continue
        yield f"{child.origin}: unknown key '{path}'{_hint(key, prefix, shape, section, root)}"


def _hint(key: str, prefix: str, shape: Shape, section: type[BaseModel], root: type[BaseModel]) -> str:
    """What the user may have meant: another kind's key, a sibling, or a key of that name elsewhere."""
    if isinstance(shape, Variants):
        kinds = [kind for kind, variant in shape.sections.items() if key in variant.model_fields]
        if kinds:
            own = next(kind for kind, variant in shape.sections.items() if variant is section)
            return f" for kind '{own}'; kind '{kinds[0]}' has it (set '{prefix}{KIND}')"
    sibling = did_you_mean(key, section.model_fields, prefix)
    if sibling:
        return sibling
    elsewhere = [path for path, _ in field_paths(root) if path.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f", did you mean '{elsewhere[0]}'?"
    return f"; known here: {', '.join(section.model_fields)}"
