"""Episodes that a program plays: it asks for completions as from any endpoint, and every token of them is recorded."""
