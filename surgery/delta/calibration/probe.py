"""What a package does to a model's outputs, measured on texts.

    error   mean squared difference of outputs to the fine-tuned model's, over that of the base's: 0 the model, 1 the base
    kl      mean of KL(fine-tuned || rebuilt) over predictions, in nats
    agree   share of predictions whose most likely class or token is the fine-tuned model's

Outputs are logits, one prediction per token or text; for encoders without a head the last hidden states, and then there is only
an error. All three models are run in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.delta.calibration.data import Texts, Tuned
from surgery.delta.deltas import Deltas
from surgery.engine import convert
from surgery.errors import Refused


class Probe:
    """Collects what is rebuilt while a package is made (`see`), then compares (`conclude`). `tuned` must hold tuned weights."""

    def __init__(self, tuned: Tuned, texts: Texts, deltas: Deltas) -> None:
        import torch

        self._tuned, self._texts = tuned, texts
        paths = {id(p): path for path, p in tuned.live.model.named_parameters()}
        self._paths = {name: paths[id(p)] for name, p in tuned.parameters.items()}
        self._rebuilt: dict[str, Any] = {}
        self._deltas, self._torch = deltas, torch

    def see(self, name: str, dtype: Any, start: int, raw: Any) -> None:
        """Elements of a rebuilt tensor from `start` on, as bytes. Called from several threads, each with its own tensor."""
        if name not in self._paths:
            return
        if name not in self._rebuilt:
            self._rebuilt[name] = np.empty(int(np.prod(self._deltas.shape(name))), np.float32)
        values = convert.typed(raw, dtype).astype(np.float32)
        self._rebuilt[name][start : start + len(values)] = values

    def conclude(self) -> dict[str, Any]:
        """The manifest's `evaluation`."""
        torch = self._torch
        live = self._tuned.live
        made = {self._paths[n]: torch.from_numpy(v.reshape(self._deltas.shape(n))) for n, v in self._rebuilt.items()}
        below = {path: torch.from_numpy(self._deltas.base(n)) for n, path in self._paths.items() if n in self._deltas}
        away = off = kl = 0.0
        agree = count = 0
        classes = live.head in ("causal", "classes")
        for ids in self._texts.probe:
            with torch.no_grad():
                right, wrong, got = (outputs(live.model, ids, weights) for weights in ({}, below, made))
            away += float((wrong - right).square().sum())
            off += float((got - right).square().sum())
            if not classes:
                continue
            p, q = (torch.log_softmax(x.double(), -1) for x in (right, got))
            kl += float((p.exp() * (p - q)).sum())
            agree += int((right.argmax(-1) == got.argmax(-1)).sum())
            count += len(right)
        return {
            **self._texts.facts(self._texts.probe),
            "held_out": self._texts.held_out,
            "outputs": "logits" if classes else "hidden states",
            "error": off / away if away > 0.0 else None,
            "kl": max(0.0, kl) / count if count else None,
            "agree": agree / count if count else None,
        }


def outputs(model: Any, ids: Sequence[int], weights: Mapping[str, Any]) -> Any:
    """Predictions (or positions) by classes (or features) for one text, with some weights replaced. float32."""
    import torch

    found = torch.func.functional_call(model, dict(weights), (), {"input_ids": torch.tensor([list(ids)])})
    for key in ("logits", "prediction_logits", "last_hidden_state"):
        made = getattr(found, key, None)
        if made is not None:
            return made.reshape(-1, made.shape[-1]).float()
    raise Refused(f"{type(model).__name__}: gives neither logits nor hidden states", hint="leave --probe out")
