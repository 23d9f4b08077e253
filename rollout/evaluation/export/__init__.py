"""Stored episodes in the formats of others: files that the programs they are made for read."""
