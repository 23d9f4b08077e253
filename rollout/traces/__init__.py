"""Reading what is stored of episodes, lazily: which files there are, which episodes are wanted, what they come to."""
