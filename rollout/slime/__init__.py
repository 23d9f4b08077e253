"""Hooks written for slime, with the signatures that they have there."""
