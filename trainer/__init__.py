"""From trajectories to new weights: algorithms, batches, Megatron, weight sync and the training loop."""
