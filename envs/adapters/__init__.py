"""Environments of other gyms as tool environments. Each needs the other gym's package, and says so where it lacks."""
