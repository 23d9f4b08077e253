"""Functions and classes that a user names by import path or file path, and whether they can be called as they must.

A plug-in is a function, which gets its options with every call as keyword arguments, or a class, which is made with
them and whose objects are called. What is wrong with one is told at start, with the signature that would be right.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

from polyturn.configs.errors import did_you_mean, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Signature:
    """How the plug-ins of one kind are called."""

    what: str
    """What messages call one: `policy loss`."""
    arguments: tuple[str, ...]
    """The names of its positional arguments."""
    text: str
    """As its author would write it, for messages."""
    may_be_async: bool = False
    wrong_results: tuple[type, ...] = (str, bytes, float, int, bool, NoneType)
    """Types that nothing of the kind returns: one as the annotation is a mistake."""

    @property
    def article(self) -> str:
        """What stands before `what`."""
        return "an" if self.what[0] in "aeiou" else "a"

    @property
    def right(self) -> str:
        """The end of every message about a wrong plug-in."""
        either = ", or the same with `async def`" if self.may_be_async else ""
        return f"{self.article} {self.what} is `{self.text}`{either}"

    @property
    def right_method(self) -> str:
        """The same of a class."""
        return f"{self.right}, in a class as the method __call__(self, {', '.join(self.arguments)})"


def load_plugin(signature: Signature, target: str, options: Mapping[str, Any] | None = None) -> Any:
    """The function, or an object of the class, that `module:name` or `path/to/file.py:name` names, with its options.

    Raises:
        ValueError: it cannot be loaded, or cannot be called so; the one sentence shows the right signature.
    """
    options = dict(options or {})
    try:
        found = load_object(target)
    except ValueError as error:
        raise ValueError(f"{error}; {signature.right}") from error
    if not inspect.isclass(found):
        if not callable(found):
            kind = type(found).__name__
            raise ValueError(f"{target} is of type {kind}, not a function or a class; {signature.right}")
        check_signature(signature, found, target, options)
        return functools.partial(found, **options) if options else found
    try:
        check_options(found, options, what=target)
    except ValueError as error:
        raise ValueError(f"{error}; {signature.right_method}") from error
    made = make_with_options(found, options, what=target)
    if not callable(made):
        raise ValueError(f"{target}: its objects cannot be called; {signature.right_method}")
    check_signature(signature, made, target)
    return made


def make_part(
    methods: Mapping[str, Signature],
    target: str,
    *arguments: Any,
    options: Mapping[str, Any],
    **given: Any,
) -> Any:
    """An object with several methods, of the class that `module:name` or `path/to/file.py:name` names.

    It is made as `Class(*arguments, **given, **options)`, of which `options` are the user's.

    Raises:
        ValueError: it cannot be loaded or made so, or a method is missing or cannot be called as its signature says.
    """
    make = load_object(target)
    if not callable(make):
        raise ValueError(f"{target} is of type {type(make).__name__}, not a class")
    for option in options:
        if option in given:
            raise ValueError(f"{target}: {option!r} is given by the run, and is no option")
    try:
        found = inspect.signature(make)
        found.bind(*arguments, **given, **options)
    except TypeError as error:
        names = ", ".join([*("..." for _ in arguments), *(f"{name}=..." for name in given), "**options"])
        raise ValueError(
            f"{target} cannot be made as {target.rpartition(':')[2]}({names}): {error}"
        ) from error
    made = make(*arguments, **given, **options)
    for name, signature in methods.items():
        method = getattr(made, name, None)
        if not callable(method):
            raise ValueError(f"{target} has no method {name!r}; {signature.right}")
        check_signature(signature, method, f"{target}.{name}")
    return made


def check_signature(
    signature: Signature, function: Any, name: str, options: Mapping[str, Any] | None = None
) -> None:
    """Raise `ValueError` unless the function, called `name` there, takes the arguments in order, and the options."""
    right = signature.right if inspect.isroutine(function) else signature.right_method
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: its signature cannot be read ({error}); {right}") from error
    try:
        found.bind(*signature.arguments, **(options or {}))
    except TypeError as error:
        raise ValueError(
            f"{name}{found} cannot be called as {signature.article} {signature.what}: {error}; {right}"
        ) from error
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in found.parameters.values() if parameter.kind in positional]
    for given, expected in zip(names, signature.arguments, strict=False):
        # Any other name is a matter of taste; one of ours in another place is a mistake that would run.
        if given != expected and given in signature.arguments:
            raise ValueError(f"{name}{found}: {given!r} stands where {expected!r} is passed; {right}")
    result = _result_type(function, found)
    if result in signature.wrong_results or typing.get_origin(result) in signature.wrong_results:
        written = found.return_annotation
        shown = written if isinstance(written, str) else inspect.formatannotation(written)
        raise ValueError(f"{name}{found} returns {shown}, which is no {signature.what}; {right}")


def check_options(make: Any, options: Mapping[str, Any], *, what: str) -> None:
    """Raise `ValueError` naming an option that `make` does not have, or lacks."""
    found = inspect.signature(make)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found.parameters.values())
    for option in options:
        if option not in found.parameters and not open_ended:
            near = nearest(option, found.parameters, count=1)
            known = ", ".join(found.parameters) or "none"
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {known}"
            raise ValueError(f"{what} has no option {option!r}; {hint}")
    try:
        found.bind(**options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def make_with_options(make: Any, options: Mapping[str, Any], *, what: str) -> Any:
    """`make(**options)`. Raises `ValueError` for options that it does not take, or not with these values."""
    check_options(make, options, what=what)
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}") from error


def load_object(target: str) -> Any:
    """What `module:name` or `path/to/file.py:name` names; the name may be dotted.

    A file is imported once; its own folder is not put on the import path.

    Raises:
        ValueError: there is no such module, file or name, or importing it fails.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(f"{target!r} is not of the form module:name or path/to/file.py:name")
    found: Any = load_module(where)
    for part in name.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [public for public in vars(found) if not public.startswith("_")])
            raise ValueError(f"{where} has no {part!r}{near}")
        found = getattr(found, part)
    return found


def load_module(where: str) -> ModuleType:
    """The module of a dotted name or of a path that ends in `.py`; a file as `load_object` does it.

    Raises `ValueError` where there is none, or importing it fails.
    """
    return _load_file(where) if where.endswith(".py") else _import(where)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        missing = isinstance(error, ModuleNotFoundError) and error.name and name.startswith(error.name)
        hint = "; for a file, write its path with .py" if missing else ""
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}{hint}") from error


def _load_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{path}: no such file")
    # A name of its own, so that two files called rewards.py do not meet; known to `sys.modules`, as dataclasses need.
    name = f"polyturn_plugin_{file.stem}_{hashlib.sha256(bytes(file)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's module may fail in any way while it is imported
        del sys.modules[name]
        raise ValueError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    return module


def _result_type(function: Any, signature: inspect.Signature) -> Any:
    """The annotated type of the result; a text where it cannot be evaluated and names no built-in type."""
    plain = inspect.unwrap(function)
    if not inspect.isroutine(plain):
        plain = type(plain).__call__
    try:
        return typing.get_type_hints(plain).get("return", signature.return_annotation)
    except (NameError, TypeError, AttributeError):  # a type that only type checkers import
        written = signature.return_annotation
        plain_types: dict[Any, type] = {kind.__name__: kind for kind in (str, bytes, float, int, bool)}
        return (
            {**plain_types, "None": NoneType}.get(written, written) if isinstance(written, str) else written
        )
