"""Fine-tuning on transformers' Trainer, with what weight surgery needs on top: masked updates, pulls towards the base, averages."""

from surgery.tuning.call import Tuned, tune

__all__ = ["Tuned", "tune"]
