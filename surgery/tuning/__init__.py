"""Fine-tuning on transformers' Trainer, with masked updates, pulls towards the base and averages on top."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.tuning.call import Tuned, tune
    from surgery.tuning.levi import LayerwiseEnsemble

__all__ = ["LayerwiseEnsemble", "Tuned", "tune"]


def __getattr__(name: str) -> Any:
    # Imported on first use: a mistake in a tune file is said without waiting for torch.
    if name == "LayerwiseEnsemble":
        from surgery.tuning.levi import LayerwiseEnsemble

        return LayerwiseEnsemble
    if name in __all__:
        from surgery.tuning import call

        return getattr(call, name)
    raise AttributeError(f"module 'surgery.tuning' has no attribute {name!r}")
