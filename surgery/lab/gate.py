"""A gate between two models: which of them speaks, prediction by prediction. Learned from what both say, or told by labels.

Jin et al. 2024, Collaborative decoding of critical tokens for boosting factuality of large language models, arXiv 2402.17982: a
classifier tells which next tokens the pretrained model should give and which the fine-tuned one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surgery.checkpoint.sidecar import write_json
from surgery.errors import Refused
from surgery.lab.outcome import Array
from surgery.version import __version__

FORMAT = "surgery-gate/1"
FEATURES = ("predictions", "hidden", "both")
SAID = (
    "entropy of the tuned model",
    "entropy of the base",
    "largest probability of the tuned model",
    "largest probability of the base",
    "KL(tuned || base)",
    "KL(base || tuned)",
    "log-probability that the tuned model gives to the base's first choice",
    "log-probability that the base gives to the tuned model's first choice",
    "1 where both have the same first choice",
)
_LEAST = -30.0  # of log-probabilities among the features: a class that is ruled out is -inf


def said_by(tuned: Any, base: Any) -> Any:
    """Features of what two models predict. tuned, base: log-probabilities (…, classes). Gives (…, 9): `SAID`, in nats."""
    import torch

    p, q = tuned.clamp(min=_LEAST), base.clamp(min=_LEAST)
    ours, theirs = tuned.exp(), base.exp()
    first, other = p.argmax(-1, keepdim=True), q.argmax(-1, keepdim=True)
    made = [
        -(ours * p).sum(-1),
        -(theirs * q).sum(-1),
        ours.amax(-1),
        theirs.amax(-1),
        (ours * (p - q)).sum(-1),
        (theirs * (q - p)).sum(-1),
        p.gather(-1, other)[..., 0],
        q.gather(-1, first)[..., 0],
        (first == other)[..., 0].to(p.dtype),
    ]
    return torch.stack(made, dim=-1)


@dataclass(frozen=True)
class Gate:
    """A logistic classifier of predictions: the tuned model speaks where `((x - mean) / scale) · weights + bias >= 0`.

    features: "predictions" (`said_by`), "hidden" (what the base's output layer sees) or "both", hidden last. mean, scale,
    weights: (k,) float64. fitted: what it was fitted on, for the reader.
    """

    features: str
    mean: Array
    scale: Array
    weights: Array
    bias: float
    fitted: Mapping[str, Any] = field(default_factory=dict)

    def tuned(self, x: Any) -> Any:
        """Whether the tuned model speaks (…,), for features (…, k)."""
        import torch

        mean, scale, weights = (torch.from_numpy(a).to(x.device) for a in (self.mean, self.scale, self.weights))
        return (((x.double() - mean) / scale) * weights).sum(-1) + self.bias >= 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; the same gate is the same bytes."""
        numbers = {n: getattr(self, n).tolist() for n in ("mean", "scale", "weights")}
        said = {"format": FORMAT, "features": self.features, **numbers, "bias": self.bias, "fitted": dict(self.fitted)}
        scratch = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        try:
            write_json(scratch, {**said, "version": __version__})
            scratch.replace(path)
        except OSError as problem:
            scratch.unlink(missing_ok=True)
            raise Refused(f"{path}: cannot be written: {problem.strerror}") from None

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Gate:
        """Read what `save` wrote. Raises Refused."""
        try:
            said = json.loads(Path(path).read_text("utf-8"))
        except (OSError, ValueError) as problem:
            raise Refused(f"{path}: no gate: {problem}", hint="surgery eval PAIR.yaml --keep-gate FILE writes one") from None
        if not isinstance(said, dict) or said.get("format") != FORMAT:
            raise Refused(f"{path}: no gate: its `format` is not {FORMAT!r}")
        rows = [said.get(n) for n in ("mean", "scale", "weights")]
        numbers = all(isinstance(r, list) and all(_is_number(v) for v in r) for r in rows) and _is_number(said.get("bias"))
        if not numbers or said.get("features") not in FEATURES:
            raise Refused(f"{path}: not a whole gate: needs `features`, `mean`, `scale`, `weights` and `bias`, all finite")
        mean, scale, weights = (np.array(r, np.float64) for r in rows)
        if not len(mean) == len(scale) == len(weights) or (scale <= 0).any():
            raise Refused(f"{path}: not a whole gate: {len(weights)} weights, {len(mean)} means, {len(scale)} scales above 0")
        if said["features"] == "predictions" and len(weights) != len(SAID):
            raise Refused(f"{path}: not a whole gate: {len(weights)} weights for {len(SAID)} features")
        return Gate(said["features"], mean, scale, weights, float(said["bias"]), dict(said.get("fitted") or {}))


def fit(features: str, x: Array, gain: Array, share: Array, penalty: float, fitted: Mapping[str, Any]) -> Gate:
    """The gate that loses least of what choosing well is worth.

    x: (n, k) features. gain: (n,) what the tuned model is better by at each prediction. share: (n,) weights of predictions.
    Logistic regression on the sign of `gain`, each prediction weighted by `share |gain|`; `penalty` times half the squared norm
    of the weights of standardised features is added to the mean loss. Convex and solved by L-BFGS: no chance is involved. Where
    one model alone gains more on these predictions than the gate does, the gate is that model.
    """
    from scipy.optimize import minimize

    x, gain = np.asarray(x, np.float64), np.asarray(gain, np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    z, sign, weight = (x - mean) / scale, np.where(gain > 0, 1.0, -1.0), share * np.abs(gain)
    weight = weight / max(float(weight.sum()), 1e-300)

    def loss(v: Array) -> tuple[float, Array]:
        margin = sign * (z @ v[:-1] + v[-1])
        slope = -weight * sign / (1.0 + np.exp(np.clip(margin, -700, 700)))
        value = float(weight @ np.logaddexp(0.0, -margin)) + 0.5 * penalty * float(v[:-1] @ v[:-1])
        return value, np.append(z.T @ slope + penalty * v[:-1], slope.sum())

    found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    weights, bias = found[:-1], float(found[-1])
    value = share * gain  # always the base: 0
    gated = float(value[z @ weights + bias >= 0].sum())
    best = max(0.0, float(value.sum()))
    alone = None
    if gated < best:
        weights, bias = np.zeros_like(weights), 1.0 if best > 0.0 else -1.0
        alone = "tuned" if bias > 0 else "base"
    chosen = z @ weights + bias >= 0
    report = {"predictions": len(gain), "tuned": round(float(chosen.mean()), 6), "alone": alone, **fitted}
    return Gate(features, mean, scale, weights, bias, report)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
