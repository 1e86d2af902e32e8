"""Recipes: YAML files read into graphs."""
