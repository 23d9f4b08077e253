"""A local page over runs, evaluations and their episodes; nothing here writes to what it shows."""
