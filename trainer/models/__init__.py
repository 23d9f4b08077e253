"""Models as they lie on disk: Hugging Face directories, and what Megatron-core has to know of each family."""
