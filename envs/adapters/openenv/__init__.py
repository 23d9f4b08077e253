"""Environments that servers of OpenEnv run (Meta and Hugging Face; needs `polyturn[openenv]`)."""
