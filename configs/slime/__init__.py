"""Launch scripts of slime, as recipes."""
