"""Who takes part in `evaluation_overhead.py`, a program each, and the endpoint that all of them ask."""
