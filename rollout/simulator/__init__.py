"""What a scheduling policy does to a cluster, in virtual time: the real scheduler over mock engines."""
