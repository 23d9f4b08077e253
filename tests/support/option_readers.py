"""Which options the code reads: a small inference of which expressions are sections of the config.

An expression is a section where a parameter or attribute is annotated as one, or where it is reached from one by its
fields; assignments, loops and comprehensions pass it on. A field that is read from such an expression is read.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import polyturn.configs
from polyturn.configs.loading import yaml_tree
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.section import Section

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("agents", "configs", "envs", "rollout", "tools", "trainer", "viewer", "src/polyturn/cli")
Sections = frozenset[type[Section] | str]
"""What an expression may be: sections, and by their names classes of ours that keep some in attributes."""
NONE: Sections = frozenset()
Function = ast.FunctionDef | ast.AsyncFunctionDef
Option = tuple[type[Section], str]


def all_sections() -> list[type[Section]]:
    """The sections that can stand in a recipe."""
    found: dict[type[Section], None] = {}
    waiting: list[type[Section]] = [RunConfig]
    while waiting:
        section = waiting.pop()
        if section not in found:
            found[section] = None
            for field in section.model_fields.values():
                waiting.extend(sections_in(field.annotation))
    return list(found)


def sections_in(annotation: Any) -> frozenset[type[Section]]:
    """The sections in a type: of a union all, of a list or mapping those that it holds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return frozenset([annotation])
    origin = get_origin(annotation)
    if origin is Annotated:
        return sections_in(get_args(annotation)[0])
    if origin in (Union, types.UnionType) or origin is not None:
        return frozenset(found for part in get_args(annotation) for found in sections_in(part))
    return frozenset()


def written_values(text: str) -> dict[str, Any]:
    """The plain values of a recipe by their dotted keys."""
    values: dict[str, Any] = {}

    def walk(tree: Any, prefix: str) -> None:
        for key, child in tree.value.items():
            if key == "extends":
                continue
            if isinstance(child.value, dict):
                walk(child, f"{prefix}{key}.")
            else:
                values[f"{prefix}{key}"] = child.plain()

    walk(yaml_tree.read_document(text, "a recipe"), "")
    return values


class Readers:
    """Reads of options in all modules of the package."""

    def __init__(self) -> None:
        self.read: set[Option] = set()
        self._named = _named_types()
        self._attributes: dict[tuple[str, str], Sections] = {}
        self._bases: dict[str, list[str]] = {}
        self._returns: dict[str, Sections] = {}
        functions: list[tuple[Function, str | None]] = []
        trees: list[ast.Module] = []
        for folder in FOLDERS:
            for path in sorted((ROOT / folder).rglob("*.py")):
                text = path.read_text()
                if "config" in text and path.name not in KEEPING:
                    trees.append(ast.parse(text))
        for tree in trees:
            self._note_classes(tree)
        for tree in trees:
            functions += self._module(tree)
        # What an attribute holds may be known only after the function that sets it was read.
        for _ in range(2):
            for function, owner in functions:
                self._function(function, owner)

    def _note_classes(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and self._section_named(node.name) is None:
                self._bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]

    def _module(self, tree: ast.Module) -> list[tuple[Function, str | None]]:
        """Note what is annotated; the module's functions, each with the class that it is a method of."""
        functions: list[tuple[Function, str | None]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self._class(node)
                functions += [(inner, node.name) for inner in node.body if isinstance(inner, Function)]
            elif isinstance(node, Function):
                self._returns[node.name] = self._returns.get(node.name, NONE) | self._annotated(node.returns)
        return functions + [(node, None) for node in tree.body if isinstance(node, Function)]

    def _class(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self._keep(node.name, statement.target.id, self._annotated(statement.annotation))
            if isinstance(statement, ast.FunctionDef) and statement.decorator_list:
                self._keep(node.name, statement.name, self._annotated(statement.returns))

    def _keep(self, owner: str, name: str, found: Sections) -> None:
        self._attributes[owner, name] = self._attributes.get((owner, name), NONE) | found

    def _function(self, node: Function, owner: str | None) -> None:
        known: dict[str, Sections] = {}
        nodes = list(ast.walk(node))
        for inner in nodes:
            if isinstance(inner, Function | ast.Lambda):
                arguments = inner.args
                for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                    known[argument.arg] = known.get(argument.arg, NONE) | self._annotated(argument.annotation)
        if owner is not None and (section := self._section_named(owner)) is not None:
            known["self"] = frozenset([section])
        bindings = [binding for inner in nodes for binding in _bindings(inner)]
        for _ in range(2):
            for target, value in bindings:
                self._bind(target, value, known, owner)
        if not any(known.values()) and owner is None:
            return
        for inner in nodes:
            if isinstance(inner, ast.Attribute | ast.Call):
                self._resolve(inner, known, owner)

    def _bind(self, target: ast.expr, value: ast.expr, known: dict[str, Sections], owner: str | None) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self._bind(one, other, known, owner)
            return
        found = self._resolve(value, known, owner)
        for name in target.elts if isinstance(target, ast.Tuple) else [target]:
            if isinstance(name, ast.Name):
                known[name.id] = known.get(name.id, NONE) | found
            elif isinstance(name, ast.Attribute) and _is_self(name.value) and owner is not None:
                self._keep(owner, name.attr, found)

    def _resolve(self, node: ast.expr, known: dict[str, Sections], owner: str | None) -> Sections:
        """Which sections an expression may be; what is read on the way is noted."""
        match node:
            case ast.Name():
                return known.get(node.id, NONE)
            case ast.Attribute():
                return self._attribute(node, known, owner)
            case ast.Call(func=ast.Attribute(attr="model_dump" | "model_dump_json" | "describe") as function):
                for section in self._resolve(function.value, known, owner):
                    if not isinstance(section, str):
                        self._read_all(section)
                return NONE
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(name)), *_]):
                return self._field(self._resolve(value, known, owner), name)
            case ast.Call(func=ast.Name(id=name)):
                passed = [self._resolve(a, known, owner) for a in node.args] if name in PASSING else []
                named = self._section_named(name)
                made = NONE if named is None else frozenset([named])
                return self._returns.get(name, NONE).union(made, *passed)
            case ast.Call(func=ast.Attribute(attr=name) as function):
                inner = self._resolve(function.value, known, owner)
                return self._returns.get(name, NONE) | (inner if name in PASSING else NONE)
            case ast.IfExp():
                return self._resolve(node.body, known, owner) | self._resolve(node.orelse, known, owner)
            case ast.BoolOp():
                return NONE.union(*(self._resolve(value, known, owner) for value in node.values))
            case ast.Subscript():
                return self._resolve(node.value, known, owner)
            case ast.List() | ast.Tuple():
                return NONE.union(*(self._resolve(value, known, owner) for value in node.elts))
            case ast.Dict():
                return NONE.union(*(self._resolve(value, known, owner) for value in node.values))
            case ast.NamedExpr() | ast.Await() | ast.Starred():
                return self._resolve(node.value, known, owner)
        return NONE

    def _attribute(self, node: ast.Attribute, known: dict[str, Sections], owner: str | None) -> Sections:
        found = self._field(self._resolve(node.value, known, owner), node.attr)
        if _is_self(node.value) and owner is not None:
            found |= self._held(owner, node.attr)
        return found

    def _held(self, owner: str, name: str) -> Sections:
        """What a class, or what it is derived from, keeps in an attribute."""
        found = self._attributes.get((owner, name), NONE)
        return found.union(*(self._held(base, name) for base in self._bases.get(owner, ()) if base != owner))

    def _field(self, sections: Sections, name: str) -> Sections:
        found = NONE
        for section in sections:
            if isinstance(section, str):
                found |= self._held(section, name)
                continue
            if name in section.model_fields:
                self.read.add((section, name))
                found |= sections_in(section.model_fields[name].annotation)
            found |= self._attributes.get((section.__name__, name), NONE)
        return found

    def _read_all(self, section: type[Section]) -> None:
        for name, field in section.model_fields.items():
            self.read.add((section, name))
            for inner in sections_in(field.annotation):
                self._read_all(inner)

    def _annotated(self, annotation: ast.expr | None) -> Sections:
        if annotation is None:
            return NONE
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
        names += [node.attr for node in ast.walk(annotation) if isinstance(node, ast.Attribute)]
        classes = frozenset(name for name in names if name in self._bases)
        return classes.union(*(self._named.get(name, NONE) for name in names))

    def _section_named(self, name: str) -> type[Section] | None:
        named = self._named.get(name, NONE)
        return next((found for found in named if isinstance(found, type) and found.__name__ == name), None)


KEEPING = ("identity.py", "resume.py", "loader.py", "run_directory.py")
"""Modules that show, keep and compare options, which is not to do what they say."""
PASSING = (
    "list",
    "tuple",
    "sorted",
    "enumerate",
    "zip",
    "reversed",
    "values",
    "items",
    "get",
    "replace",
    "model_copy",
)
"""Calls that give what they are given."""


def _named_types() -> dict[str, Sections]:
    """Sections and unions of them by the names that modules of the schema give them."""
    named: dict[str, Sections] = {}
    for module in pkgutil.walk_packages(polyturn.configs.__path__, "polyturn.configs."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) or get_origin(value) is not None:
                named[name] = named.get(name, NONE) | sections_in(value)
    return named


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    match node:
        case ast.Assign():
            for target in node.targets:
                yield target, node.value
        case ast.AnnAssign(value=ast.expr()) | ast.NamedExpr():
            yield node.target, node.value  # type: ignore[misc]
        case ast.For() | ast.AsyncFor() | ast.comprehension():
            yield node.target, node.iter
