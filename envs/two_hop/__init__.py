"""Search-R1 in miniature: a synthetic knowledge base and questions that take two searches in sequence."""
