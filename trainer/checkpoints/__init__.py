"""Checkpoints as they lie on disk: what marks them as whole, tells them apart and says of which model they are."""
