"""What a machine with one GPU is asked, in eight minutes: `python -m benchmarks.gpu_check` (docs/gpu_check.md)."""
