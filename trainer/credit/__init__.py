"""What a step is worth: from episodes and their rewards to a number for each token."""
