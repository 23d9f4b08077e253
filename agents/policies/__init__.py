"""Policies that speak in messages, and how they are named."""
