"""Things on the host that no sandbox may reach, laid out so that reaching them is easy and is noticed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SETTINGS = ("kernel/core_pattern", "kernel/hostname", "kernel/domainname", "vm/overcommit_memory")
VARIABLE = "POLYTURN_TEST_SECRET"


@dataclass(frozen=True, kw_only=True, slots=True)
class Baits:
    """What was laid out."""

    folder: Path
    """Everybody may write here."""
    secret: str
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    abstract: socket.socket
    listing: tuple[str, ...]
    settings: tuple[str, ...]

    def fill_in(self, code: str) -> str:
        """A snippet's code with the addresses of the baits."""
        abstract_name = self.abstract.getsockname()
        values = {
            "CANARY_FILE": str(self.folder / "canary"),
            "CANARY_FOLDER": str(self.folder),
            "UNIX_SOCKET": str(self.folder / "socket"),
            "ABSTRACT": abstract_name[1:].decode(),
            "TCP_PORT": str(self.tcp.getsockname()[1]),
            "UDP_PORT": str(self.udp.getsockname()[1]),
            "HOST_ADDRESS": _own_address(),
        }
        for name, value in values.items():
            code = code.replace(f"@{name}@", value)
        return code

    def assert_untouched(self) -> None:
        """Nobody connected, sent, wrote, or changed a setting of the kernel."""
        for listener in (self.tcp, self.unix, self.abstract):
            with contextlib.suppress(BlockingIOError):
                raise AssertionError(f"somebody connected: {listener.accept()}")
        with contextlib.suppress(BlockingIOError):
            raise AssertionError(f"somebody sent a datagram: {self.udp.recvfrom(100)}")
        assert (self.folder / "canary").read_text() == self.secret
        assert _listing(self.folder) == self.listing
        assert _settings() == self.settings

    def forget_visits(self) -> None:
        """Accepts what has come, where a test has let it through on purpose."""
        for listener in (self.tcp, self.unix, self.abstract):
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
        with contextlib.suppress(BlockingIOError):
            while self.udp.recvfrom(100):
                pass


@contextlib.contextmanager
def lay_out_baits() -> Iterator[Baits]:
    """Files, sockets, an inheritable descriptor and an environment variable, for as long as the block lasts."""
    secret = f"canary-{secrets.token_hex(16)}"
    # Not below pytest's own folder, which nobody else may enter.
    folder = Path(tempfile.mkdtemp(prefix="polyturn-baits-"))
    folder.chmod(0o777)
    (folder / "canary").write_text(secret)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        tcp = stack.enter_context(_listener(socket.AF_INET, ("0.0.0.0", 0)))
        unix = stack.enter_context(_listener(socket.AF_UNIX, str(folder / "socket")))
        (folder / "socket").chmod(0o777)
        abstract = stack.enter_context(_listener(socket.AF_UNIX, f"\0polyturn-bait-{secrets.token_hex(8)}"))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        udp.setblocking(False)
        inherited = os.open(folder / "canary", os.O_RDWR)
        stack.callback(os.close, inherited)
        os.set_inheritable(inherited, True)
        os.environ[VARIABLE] = secret
        stack.callback(os.environ.pop, VARIABLE)
        yield Baits(
            folder=folder,
            secret=secret,
            tcp=tcp,
            udp=udp,
            unix=unix,
            abstract=abstract,
            listing=_listing(folder),
            settings=_settings(),
        )


def _listener(family: int, address: str | tuple[str, int]) -> socket.socket:
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()
    listener.setblocking(False)
    return listener


def _own_address() -> str:
    """The address that others reach this machine by; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _listing(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(os.listdir(folder)))


def _settings() -> tuple[str, ...]:
    return tuple(Path(f"/proc/sys/{name}").read_text() for name in SETTINGS)
