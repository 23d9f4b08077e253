"""A ticket desk between islands."""
