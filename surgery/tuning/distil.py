"""Learning what the model said before training: its outputs in floating point are the target.

    loss = (1 - share) task loss + share T^2 KL(softmax(z0 / T) || softmax(z / T)),   z0 of the model as it was

So a rounded model, or an adapter beside rounded weights, makes up for the rounding on any text (INT2.1, Chai et al. 2023, arXiv
2306.08162; EfficientDM, He et al. 2024, arXiv 2310.03270). Labels say nothing but where logits count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from surgery.errors import Refused


class Teacher:
    """The model as it is now, made again out of the live one whenever it is asked. model: without adapter. share, temperature:
    of the loss."""

    def __init__(self, model: Any, *, share: float, temperature: float) -> None:
        self.share, self._temperature = share, temperature
        self._start = {id(p): (p, p.detach().clone()) for p in model.parameters()}
        self._slots: list[tuple[Any, str, Any]] = []
        self._live = model

    def watch(self, model: Any) -> None:
        """The model as it will be trained, with its adapter. Only what can differ from the start is kept."""
        self._live = model
        self._start = {i: (p, s) for i, (p, s) in self._start.items() if p.requires_grad or not torch.equal(p, s.to(p.device))}
        self._slots = [
            (module, key, p) for module in model.modules() for key, p in module._parameters.items()
            if p is not None and id(p) in self._start
        ]  # fmt: skip

    def loss(self, model: Any, inputs: dict[str, Any], outputs: Any, items: Any = None) -> Any:
        """model: what the Trainer calls. items: labels in all batches of the step, where the loss is a sum over them."""
        logits = _logits(outputs)
        with torch.no_grad(), self._as_it_was(model):
            before = _logits(model(**inputs))
        kept, past = _counted(logits, inputs.get("labels")), _counted(before, inputs.get("labels"))
        t = self._temperature
        now, then = (F.log_softmax(z.float() / t, -1) for z in (kept, past))
        each = F.kl_div(now, then, reduction="sum", log_target=True)
        return each * t**2 / (len(kept) if items is None else items)

    @contextmanager
    def _as_it_was(self, model: Any) -> Iterator[None]:
        was = model.training
        model.eval()
        for module, key, p in self._slots:
            module._parameters[key] = self._start[id(p)][1].to(p.device)
        try:
            with self._live.disable_adapter() if hasattr(self._live, "peft_config") else nullcontext():
                yield
        finally:
            for module, key, p in self._slots:
                module._parameters[key] = p
            model.train(was)


def _logits(outputs: Any) -> Any:
    found = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", None)
    if not torch.is_tensor(found):
        raise Refused("distil: the model gives no logits")
    return found


def _counted(logits: Any, labels: Any) -> Any:
    """(places, classes): those whose label counts; of a language model shifted to the next token."""
    if torch.is_tensor(labels) and logits.ndim == 3 and labels.ndim == 2:
        return logits[:, :-1][labels[:, 1:] != -100]
    return logits.reshape(-1, logits.shape[-1])
