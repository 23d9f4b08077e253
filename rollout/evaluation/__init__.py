"""Scoring a policy on held-out tasks: in a run, and on suites of environments."""
