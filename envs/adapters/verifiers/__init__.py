"""Tasksets of verifiers (Prime Intellect, version 1 of its API; needs `polyturn[verifiers]`)."""
