"""Frozen records that every other package shares. Units are in the names."""
