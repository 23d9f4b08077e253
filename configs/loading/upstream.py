"""The free sections `sglang:` and `megatron:`, checked against the installed packages' own arguments.

The packages are read as source, never imported: importing SGLang or Megatron-core takes seconds and torch. A package
that is not installed cannot be checked against; the run itself then says that it is missing. Of annotations read from
source what is not simple is accepted: upstream checks it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyturn.configs.errors import did_you_mean
from polyturn.configs.loading.megatron_options import (
    GROUPS,
    TRANSFORMER,
    Group,
    refuse_together,
    refuse_value,
)
from polyturn.configs.loading.router_options import OPEN_ROUTER, REFUSED_ROUTER, SET_ROUTER
from polyturn.configs.loading.sglang_options import BOUNDS, OPEN_SGLANG, REFUSED_SGLANG, set_by_polyturn
from polyturn.configs.loading.yaml_tree import describe

ROUTER = "engines.router.options"
_SIMPLE = {"bool": "true or false", "int": "an integer", "float": "a number", "str": "text"}
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence"}
_MAPPINGS = {"dict", "Dict", "Mapping"}


def accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether `value`, as YAML gives it, may be meant by the annotation."""
    options = _options(annotation)
    return any(_accepts_one(option, value) for option in options)


def describe_annotation(annotation: ast.expr) -> str:
    """The annotation in words."""
    words = []
    for option in _options(annotation):
        literals = _literals(option)
        if literals is not None:
            words.append("one of " + ", ".join(repr(value) for value in literals))
        elif _name(option) in _SIMPLE:
            words.append(_SIMPLE[_name(option)])
        elif _name(option) in _LISTS:
            words.append("a list")
        elif _name(option) in _MAPPINGS:
            words.append("a section")
    return " or ".join(dict.fromkeys(words)) or ast.unparse(annotation)


def _options(annotation: ast.expr) -> list[ast.expr]:
    """The members of Optional, Union or `|`; anything else alone."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _options(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _options(annotation.left) + _options(annotation.right)
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        if _name(annotation) == "Optional":
            return [*_options(inner), ast.Constant(None)]
        if _name(annotation) == "Union":
            members = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [option for member in members for option in _options(member)]
    return [annotation]


def _accepts_one(option: ast.expr, value: Any) -> bool:
    if isinstance(option, ast.Constant) and option.value is None:
        return value is None
    literals = _literals(option)
    if literals is not None:
        return value in literals
    name = _name(option)
    if name == "bool":
        return isinstance(value, bool)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if name == "str":
        # A section stands for the JSON text that such options take.
        return isinstance(value, str | dict)
    if name in _LISTS:
        return isinstance(value, list)
    if name in _MAPPINGS:
        return isinstance(value, dict)
    return True


def _literals(option: ast.expr) -> list[Any] | None:
    if not isinstance(option, ast.Subscript) or _name(option) != "Literal":
        return None
    members = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
    return [member.value for member in members if isinstance(member, ast.Constant)]


def _name(node: ast.expr) -> str:
    """`List` of `List[int]`, `typing.List[int]` and `List`."""
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of an upstream package, as its source declares it."""

    field: str
    annotation: ast.expr
    choices: tuple[Any, ...] = ()
    parsed: bool = False
    """It has a parser of its own, so that text may stand for any type."""


def find_problems(section: str, values: Mapping[str, Any], *, device: str) -> Iterator[tuple[str, str]]:
    """`(key, sentence)` for each key of `sglang`, `megatron` or `engines.router.options` that the run could not use.

    `device` is the one that the section's package runs on. Nothing is yielded about a package that is not
    installed, except for keys that are ours. A key below a key is written with a dot.
    """
    if section == "sglang":
        yield from _check_sglang(values, device)
        return
    if section == ROUTER:
        yield from _check_router(values)
        return
    below = {group.prefix.rstrip("."): group for group in GROUPS if group.prefix}
    flat = {key: value for key, value in values.items() if key not in below}
    problems = list(_check_megatron(TRANSFORMER, flat, device))
    for name, group in below.items():
        if isinstance(values.get(name, {}), Mapping):
            problems += _check_megatron(group, values.get(name, {}), device)
        else:
            problems.append((name, f"'megatron.{name}' must be a section, got {describe(values[name])}"))
    yield from problems
    if not problems:
        for key, reason in refuse_together(values, device=device):
            yield key, f"'megatron.{key}': {reason}"


def _check_sglang(values: Mapping[str, Any], device: str) -> Iterator[tuple[str, str]]:
    known = sglang_arguments() or {}
    owned = {**REFUSED_SGLANG, **set_by_polyturn(device)}
    bad = set()
    for key, problem in _check("sglang", "SGLang server's arguments", values, known, owned):
        bad.add(key)
        yield key, problem
    for key, value in values.items():
        field = known[key].field if key in known else key
        if key in bad or not known:
            continue
        if field not in OPEN_SGLANG:
            yield (
                key,
                f"'sglang.{key}' is not open: whether it changes what the engines sample has not been decided here",
            )
        elif field in BOUNDS and isinstance(value, int | float):
            least, most = BOUNDS[field]
            if not least <= value <= most:
                upper = "" if most == float("inf") else f" and at most {most:g}"
                yield key, f"'sglang.{key}' must be at least {least:g}{upper}, got {describe(value)}"


def _check_router(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = router_arguments() or {}
    bad = set()
    for key, problem in _check(
        ROUTER, "sglang-router's arguments", values, known, {**REFUSED_ROUTER, **SET_ROUTER}
    ):
        bad.add(key)
        yield key, problem
    for key in values:
        if known and key not in bad and key not in OPEN_ROUTER:
            yield key, f"'{ROUTER}.{key}' is not open: whether it may be set has not been decided here"


def _check_megatron(group: Group, values: Mapping[str, Any], device: str) -> Iterator[tuple[str, str]]:
    if not values:
        return
    known = megatron_arguments(group.class_name) or {}
    section = f"megatron.{group.prefix}".rstrip(".")
    package = f"Megatron-core {group.class_name}'s fields"
    bad = set()
    for key, problem in _check(section, package, values, known, group.owned):
        bad.add(key)
        yield group.prefix + key, problem
    for key, value in values.items():
        if key in bad:
            continue
        if key not in group.open:
            yield (
                group.prefix + key,
                f"'{section}.{key}' is not open: whether it changes what the model computes has not been decided here",
            )
            continue
        reason = refuse_value(group.open[key], value, device=device)
        if reason is not None:
            yield group.prefix + key, f"'{section}.{key}' cannot be {describe(value)}: {reason}"


def _check(
    section: str,
    package: str,
    values: Mapping[str, Any],
    known: Mapping[str, Argument],
    owned: Mapping[str, str],
) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        argument = known.get(key)
        reason = owned.get(argument.field if argument else key)
        if reason is not None:
            yield key, f"'{section}.{key}' is not yours to set: {reason}"
        elif not known:
            continue
        elif argument is None:
            hint = did_you_mean(key, known, f"{section}.") or f"; see the installed {package}"
            yield key, f"unknown key '{section}.{key}'{hint}"
        elif argument.choices and value is not None and value not in argument.choices:
            listed = ", ".join(repr(choice) for choice in argument.choices)
            yield key, f"'{section}.{key}' must be one of {listed}, got {describe(value)}"
        elif not accepts(argument.annotation, value) and not (argument.parsed and isinstance(value, str)):
            expected = describe_annotation(argument.annotation)
            yield key, f"'{section}.{key}' must be {expected}, got {describe(value)}"


@functools.cache
def sglang_arguments() -> Mapping[str, Argument] | None:
    """The SGLang server's arguments by name, aliases included; None where SGLang is not installed."""
    root = _package_directory("sglang")
    if root is None:
        return None
    declared: dict[str, Argument] = {}
    fields = root / "srt" / "arg_groups" / "fields"
    for path in sorted(fields.glob("*.py")) if fields.is_dir() else []:
        for node in _classes(path).values():
            if any(_assigned_name(statement) == "_NS_PATH" for statement in node.body):
                declared.update(_sglang_fields(node))
    server_args = root / "srt" / "server_args.py"
    if not declared and server_args.is_file():
        declared.update(_sglang_fields(_classes(server_args)["ServerArgs"]))
    return declared or None


@functools.cache
def router_arguments() -> Mapping[str, Argument] | None:
    """sglang-router's arguments by name; None where it is not installed."""
    root = _package_directory("sglang_router")
    source = root / "router_args.py" if root else None
    if source is None or not source.is_file():
        return None
    fields = _annotated_fields(_classes(source)["RouterArgs"])
    return {name: Argument(name, statement.annotation) for name, statement in fields}


_MEGATRON_SOURCES = (
    "model_parallel_config.py",
    "transformer/transformer_config.py",
    "distributed/distributed_data_parallel_config.py",
    "optimizer/optimizer_config.py",
)


@functools.cache
def megatron_arguments(class_name: str = "TransformerConfig") -> Mapping[str, Argument] | None:
    """The fields of one of Megatron-core's config classes and its bases; None where it is not installed."""
    root = _package_directory("megatron")
    core = root / "core" if root else None
    if core is None or not all((core / source).is_file() for source in _MEGATRON_SOURCES):
        return None
    classes = {name: node for source in _MEGATRON_SOURCES for name, node in _classes(core / source).items()}
    declared: dict[str, Argument] = {}
    pending = [class_name]
    while pending:
        node = classes.get(pending.pop())
        if node is None:
            continue
        pending.extend(base.id for base in node.bases if isinstance(base, ast.Name))
        for name, statement in _annotated_fields(node):
            declared.setdefault(name, Argument(name, statement.annotation))
    return declared


def _package_directory(package: str) -> Path | None:
    """Where a top-level package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    for location in locations:
        if Path(location).is_dir() and (package != "megatron" or (Path(location) / "core").is_dir()):
            return Path(location)
    return None


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _assigned_name(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _annotated_fields(node: ast.ClassDef) -> Iterator[tuple[str, ast.AnnAssign]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            if not name.startswith("_") and "ClassVar" not in ast.dump(statement.annotation):
                yield name, statement


def _sglang_fields(node: ast.ClassDef) -> Iterator[tuple[str, Argument]]:
    """Fields written `name: A[type, help or Arg(...)]`, by the names of the command line."""
    for name, statement in _annotated_fields(node):
        annotation, keywords = statement.annotation, dict[str, ast.expr]()
        if isinstance(annotation, ast.Subscript) and _is_named(annotation.value, "A", "Annotated"):
            assert isinstance(annotation.slice, ast.Tuple)
            annotation, *metadata = annotation.slice.elts
            for item in metadata:
                if isinstance(item, ast.Call) and _is_named(item.func, "Arg"):
                    keywords.update({k.arg: k.value for k in item.keywords if k.arg})
        if _literal(keywords.get("no_cli")) is True:
            continue
        choices = _literal(keywords.get("choices"))
        argument = Argument(
            name,
            annotation,
            choices=tuple(choices) if isinstance(choices, list) else (),
            parsed="type_parser" in keywords or "action" in keywords,
        )
        aliases = _literal(keywords.get("aliases"))
        for flag in (
            _literal(keywords.get("cli_name")) or name,
            *(aliases if isinstance(aliases, list) else ()),
        ):
            yield flag.lstrip("-").replace("-", "_"), argument


def _is_named(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _literal(node: ast.expr | None) -> Any:
    """The value of a literal expression; None for anything that only running the code could tell."""
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
