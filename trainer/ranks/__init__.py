"""The ranks of the models: what each does in its actor, and the group of them seen from the driver."""
