"""The figures of a run: every metric's name and meaning, and the dozen that tell most."""
