"""Who takes part in `train_step.py`."""
