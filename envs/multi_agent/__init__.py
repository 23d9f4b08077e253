"""Several agents in one episode, all played by one policy."""
