"""What a `with` block closes at its end."""

from __future__ import annotations

from typing import Self


class Closing:
    """Something that is open from its making to `close`, or to the end of a `with` block."""

    def close(self) -> None:
        """Free what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
