"""Adapters: low-rank deltas as what they are."""
