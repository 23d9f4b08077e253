"""The embedded sandbox backend: namespaces, landlock, seccomp, rlimits and cgroups, with nothing to install."""

from polyturn.tools.sandbox.embedded.backend import EmbeddedBackend
from polyturn.tools.sandbox.embedded.layers import Layers

__all__ = ["EmbeddedBackend", "Layers"]
