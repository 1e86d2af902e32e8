"""Lossy coding with data: what texts say of a model's layers, fitted codes, and what a package does to outputs."""
