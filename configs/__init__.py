"""Typed schema of every option, the loader, and the shipped YAML and models."""
