"""Delta packages: a fine-tuned model as what changed from its base, verified."""
