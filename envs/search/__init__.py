"""Questions that are answered by searching: Search-R1, and other projects' ways to the same."""
