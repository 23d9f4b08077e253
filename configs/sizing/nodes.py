"""The nodes that a run is planned for: those of a host file, or pretended ones."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from polyturn.configs.addresses import LOOPBACK, without_brackets
from polyturn.configs.errors import ConfigError, machine_fault

MANY_CPUS = 1 << 20
"""Of a node about whose CPUs nothing is known."""
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
IGNORED = {"max_slots", "max-slots"}
"""Of the forms that mpirun takes: how often a node may be oversubscribed, which never happens here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node and all that it has, used or not."""

    address: str
    """By which the others know it: numeric, or of a plan for another machine a name."""
    num_cpus: int
    num_gpus: int

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """From an entry of `ray.nodes()`."""
        resources = entry.get("Resources", {})
        return cls(
            address=str(entry["NodeManagerAddress"]),
            num_cpus=int(resources.get("CPU", 0)),
            num_gpus=int(resources.get("GPU", 0)),
        )

    def __str__(self) -> str:
        cpus = "" if self.num_cpus == MANY_CPUS else f"{self.num_cpus} CPUs, "
        return f"{self.address} ({cpus}{self.num_gpus} GPUs)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A line of a host file."""

    name: str
    """A numeric address, or a name."""
    num_gpus: int
    where: str
    """`file:line`."""

    def as_node(self) -> Node:
        """For a plan, in which nothing is known of its CPUs."""
        return Node(address=self.name, num_cpus=MANY_CPUS, num_gpus=self.num_gpus)


def read_hosts(path: Path, *, default_gpus: int) -> list[Host]:
    """The hosts of a file, a line each: `host`, `host slots=8` (mpirun, DeepSpeed) or `host:8`; `#` begins a comment.

    Addresses of IPv6 stand bare, or in brackets where `:8` follows.

    Args:
        default_gpus: of a host of which the file does not say.

    Raises:
        ConfigError: with file and line, of all lines that are wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cluster.hosts: {machine_fault(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cluster.hosts: {path} is not UTF-8 text") from error
    hosts: dict[str, Host] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        try:
            name, num_gpus = _read_line(words)
            if name in hosts:
                raise ValueError(f"{name} stands already in line {hosts[name].where.rpartition(':')[2]}")
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        hosts[name] = Host(name=name, num_gpus=default_gpus if num_gpus is None else num_gpus, where=where)
    if problems:
        raise ConfigError("\n".join(problems))
    if not hosts:
        raise ConfigError(f"cluster.hosts: {path} names no host")
    return list(hosts.values())


def _read_line(words: Sequence[str]) -> tuple[str, int | None]:
    """The host of a line, and its GPUs where it says so. Raises `ValueError`."""
    first, *options = words
    name, count = _split_count(first)
    slots = None if count is None else _number(count, first)
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in ({"slots"} | IGNORED):
            raise ValueError(f"{option!r} is not understood; a line is like `{name} slots=8`")
        if key == "slots":
            if slots is not None:
                raise ValueError(f"{' '.join(words)!r} gives the number of GPUs twice")
            slots = _number(value, option)
    return name, slots


def _split_count(word: str) -> tuple[str, str | None]:
    """`host:8` as host and count; a bare address of IPv6 has colons of its own."""
    if word.startswith("["):
        name, bracket, rest = word[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{word!r} is no address; write [::1]:8 or `::1 slots=8`")
        return _address(name, word), rest[1:] if rest else None
    if word.count(":") > 1:
        return _address(word, word), None
    name, colon, count = word.partition(":")
    if re.fullmatch(r"[0-9.]+", name):
        return _address(name, word), count if colon else None
    if not NAME.fullmatch(name):
        raise ValueError(f"{word!r} is no address and no name of a host")
    return name, count if colon else None


def _address(text: str, word: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError(f"{word!r} is no address") from None


def _number(text: str, word: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 1024:
        raise ValueError(f"{word!r} must give a number of GPUs")
    return int(text)


def resolve(hosts: Sequence[Host], address_of: Mapping[str, str]) -> list[Host]:
    """The hosts by their numeric addresses.

    Raises:
        ConfigError: two lines name one host.
    """
    found: dict[str, Host] = {}
    for host in hosts:
        address = address_of.get(host.name, without_brackets(host.name))
        if address in found:
            raise ConfigError(
                f"{host.where}: {host.name} is {address}, which {found[address].where} names already"
            )
        found[address] = Host(name=address, num_gpus=host.num_gpus, where=host.where)
    return list(found.values())


def pretended_nodes(count: int, *, num_gpus: int) -> list[Node]:
    """So many nodes of a cluster of which nothing is known; a single one is this machine."""
    if count == 1:
        return [Node(address=LOOPBACK, num_cpus=MANY_CPUS, num_gpus=num_gpus)]
    return [Node(address=f"node{number}", num_cpus=MANY_CPUS, num_gpus=num_gpus) for number in range(count)]
