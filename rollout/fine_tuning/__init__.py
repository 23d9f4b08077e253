"""Fine-tuning on conversations: rows of files, their tokens, and the steps that a run is trained on."""
