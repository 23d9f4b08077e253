"""From trajectories to new weights: the run, its ranks, what a step is worth, algorithms, Megatron and weight sync."""
