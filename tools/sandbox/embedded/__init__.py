"""The embedded sandbox backend: namespaces, landlock, seccomp, rlimits and cgroups, with nothing to install."""

from polyturn.tools.sandbox.embedded.backend import EmbeddedBackend
from polyturn.tools.sandbox.embedded.layers import Layers
from polyturn.tools.sandbox.embedded.probe import Finding, probe, summary

__all__ = ["EmbeddedBackend", "Finding", "Layers", "probe", "summary"]
