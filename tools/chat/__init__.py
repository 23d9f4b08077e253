"""Asking a model behind an OpenAI-compatible endpoint: as a policy, as a simulated user, as a judge."""
