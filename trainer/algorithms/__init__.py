"""Advantages, losses, penalties and corrections as pure functions of tensors, by the names that configs use."""
