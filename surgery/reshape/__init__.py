"""Changing what a model is made of: dense to mixture of experts and back, fewer layers, more width."""
