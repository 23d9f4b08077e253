"""Ranks on this machine, tiny models of every family, and the runs that are compared across ranks."""
