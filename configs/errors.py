"""What a user is told when something they wrote is wrong, or when a run ends before its last step."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(ValueError):
    """Bad input. The message is for the user: a sentence a line, with where, what, and what is right."""


class Interrupted(Exception):
    """The run was asked to stop; what is finished is saved."""

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}; `resume=true run_dir={directory}` goes on from there")
        self.directory = directory


class RunFailure(RuntimeError):
    """A run ended before its last step; the message is for users."""


@contextmanager
def as_config_error(place: str = "") -> Iterator[None]:
    """Bad input that is found within is the config's: the sentence begins with the place in it."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}{error}") from error


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like `name`, best first. Case does not count; a beginning is like the whole."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)
    matches += [candidate for candidate in by_lower if len(name) > 1 and candidate.startswith(name.lower())]
    return [by_lower[match] for match in dict.fromkeys(matches)][:count]


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`, did you mean 'x'?` for the nearest known name, or nothing when none is near."""
    matches = nearest(name, known, count=1)
    return f", did you mean '{prefix}{matches[0]}'?" if matches else ""


WAYS_OUT = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "give permission, or choose another place",
    errno.EPERM: "give permission, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "a link there points to itself",
    errno.EIO: "the disk fails: copy what is there to another",
}


def machine_fault(error: OSError) -> str:
    """What the machine refused, where, and what can be done about it, in one line."""
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or str(error) or type(error).__name__
    way_out = WAYS_OUT.get(error.errno or 0)
    return f"{where}{what}" + (f"; {way_out}" if way_out else "")
