"""The options that a launch script of slime gives to `train.py`, read without running it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_ARRAY = re.compile(r"^[ \t]*(\w+)(\+?)=\(([^()]*)\)", re.MULTILINE)
_VARIABLE = re.compile(r"^[ \t]*(?:export[ \t]+)?(\w+)=([^\s(#]*)[ \t]*$", re.MULTILINE)
_SOURCE = re.compile(r"^[ \t]*(?:source|\.)[ \t]+(\S+)[ \t]*$", re.MULTILINE)
_SEQUENCE = re.compile(r"\$\(seq (\d+) (\d+) (\d+)\)")
_REFERENCE = re.compile(r"\$\{(\w+)(?::?-([^{}]*))?\}|\$(\w+)")
_SPREAD = re.compile(r"\"?\$\{(\w+)\[@\]\}\"?")
_PROGRAM = re.compile(r"(?:[\s/]|^)train(_async)?\.py\"?[ \t]+((?:--|\"?\$).*)$", re.MULTILINE)
_GOING_ON = re.compile(r"\s*\n\s*(\"?\$\{\w+\[@\]\}.*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What a script starts."""

    folder: Path
    """Where the script stands."""
    options: Mapping[str, tuple[str, ...]]
    """By option, the values behind it: none for a flag. The last of several holds, as in argparse."""
    is_async: bool = False
    """Whether it starts `train_async.py`."""
    notes: tuple[str, ...] = ()
    """What could not be read: a sourced file that is not there, a variable of the shell's."""


@dataclass
class _Shell:
    arrays: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_script(path: Path) -> Launch:
    """Read a script, and the files that it sources where they stand beside it.

    Raises:
        ValueError: it is not there, or starts no `train.py`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such script")
    shell = _Shell()
    text = _read(path, shell)
    found = _PROGRAM.search(text)
    if found is not None:
        written = found[2]
        if (behind := _GOING_ON.match(text, found.end())) is not None:
            shell.notes.append(
                f"its command ends before {behind[1].split()[0]}, for want of a backslash: read as if it went on"
            )
            written += f" {behind[1]}"
        arguments = [word for given in _words(written) for word in _expanded(given, shell)]
        options = _options([_resolved(argument, shell) for argument in arguments])
        return Launch(
            folder=path.resolve().parent,
            options=options,
            is_async=found[1] is not None,
            notes=tuple(dict.fromkeys(shell.notes)),
        )
    raise ValueError(f"{path}: it starts neither train.py nor train_async.py")


def _read(path: Path, shell: _Shell) -> str:
    """The script with its lines joined; its arrays and variables go into `shell`."""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\\\n", " ")
    text = _SEQUENCE.sub(lambda m: " ".join(map(str, range(int(m[1]), int(m[3]) + 1, int(m[2])))), text)
    text = "\n".join(re.sub(r"(^|\s)#.*$", "", line) for line in text.splitlines())
    for match in _VARIABLE.finditer(text):
        shell.variables.setdefault(match[1], match[2].strip("\"'"))
    for match in _SOURCE.finditer(text):
        named = match[1].strip("\"'")
        beside = path.parent / re.sub(r"\$\{?\w+\}?/?", "", named)
        if beside.is_file():
            _read(beside, shell)
        else:
            shell.notes.append(f"{named} is sourced, and not there")
    for match in _ARRAY.finditer(text):
        if match[2] != "+":
            shell.arrays[match[1]] = []
        shell.arrays.setdefault(match[1], []).extend(_words(match[3]))
    return text


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an unfinished quote: a line of something else
        return []


def _expanded(word: str, shell: _Shell) -> list[str]:
    spread = _SPREAD.fullmatch(word)
    if spread is None:
        return [word]
    if spread[1] not in shell.arrays:
        shell.notes.append(f"the array {spread[1]} is used, and not set")
    return shell.arrays.get(spread[1], [])


def _resolved(word: str, shell: _Shell) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        known = shell.variables.get(name)
        if known is not None and f"${{{name}" not in known:
            return known
        if known is not None and (inner := _REFERENCE.fullmatch(known)) and inner[2]:
            return inner[2].strip("\"'")
        if default:
            return default
        shell.notes.append(f"${name} is the shell's, and not known here")
        return match[0]

    return _REFERENCE.sub(value, word)


def _options(arguments: list[str]) -> dict[str, tuple[str, ...]]:
    options: dict[str, tuple[str, ...]] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            options[name] = (value,) if equals else ()
        elif name:
            options[name] = (*options[name], argument)
    return options
