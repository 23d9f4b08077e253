"""Simulated users: who an agent talks with, and whether they keep to their script."""
