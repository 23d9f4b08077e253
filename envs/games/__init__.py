"""Text games, made from a seed."""
