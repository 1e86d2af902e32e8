"""Training what a package can hold with little: scales, and a low-rank repair, so that outputs match the fine-tuned model's.

BitDelta's scale distillation (arXiv:2402.10193, section 3.2) trains the scales of sign masks by the mean squared difference of
logits; they begin unbiased here, which is most of the way. Low-rank repair (LREC of INT2.1, arXiv:2306.08162) freezes the coded
delta and trains two factors on top of it, which begin as the best low-rank part of what is left for each layer's outputs.
AdamW without weight decay, cosine decay; the weights that did best on the kept-back texts are taken, those of the start among
them, so training never makes it worse there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from surgery.delta.calibration.data import Texts, Tuned
from surgery.delta.calibration.fit import Fitted, coded_with
from surgery.delta.calibration.layers import in_order, inputs_of
from surgery.delta.calibration.probe import outputs
from surgery.delta.codecs.base import Coded, Lossy, lossy_codec
from surgery.delta.deltas import Deltas
from surgery.delta.lossy import lowrank
from surgery.delta.lossy.common import Codec, rows_of
from surgery.delta.lossy.hybrid import joined

SCALED = ("sign/1", "ternary/1")  # codecs whose `scales` can be trained
_BATCH, _CHECKS = 4, 8  # texts of a step; looks at the kept-back texts

Step = Callable[[int, int], None]
_QUIET: Step = lambda done, total: None  # noqa: E731


class _Teacher:
    """The fine-tuned model and the student: one module, run with different weights."""

    def __init__(self, tuned: Tuned, deltas: Deltas, names: Sequence[str]) -> None:
        import torch

        self.model = tuned.live.model
        paths = {id(p): path for path, p in self.model.named_parameters()}
        self.paths = {n: paths[id(tuned.parameters[n])] for n in names}
        self._right = {self.paths[n]: torch.from_numpy(deltas.tuned(n)) for n in names}
        for p in self.model.parameters():
            p.requires_grad_(False)

    def loss(self, ids: Sequence[int], weights: Mapping[str, Any]) -> Any:
        """Mean squared difference of outputs, as the logits' share of what tuning moved is (scale does not matter)."""
        import torch

        with torch.no_grad():
            right = outputs(self.model, ids, self._right)
        return (outputs(self.model, ids, weights) - right).square().mean()


def _train(
    teacher: _Teacher,
    texts: Texts,
    parameters: Mapping[Any, float],
    weights: Callable[[], dict[str, Any]],
    *,
    steps: int,
    step: Step,
) -> None:
    """AdamW on `parameters`, each with its rate; leaves in them the values that did best on the kept-back texts."""
    import torch

    def judged() -> float:
        with torch.no_grad():
            made = weights()
            return float(sum(teacher.loss(ids, made) for ids in texts.probe))

    best, kept = judged(), [p.detach().clone() for p in parameters]
    order = random.Random(0)
    optimiser = torch.optim.AdamW([{"params": [p], "lr": rate} for p, rate in parameters.items()], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    every = max(1, steps // _CHECKS)
    for i in range(1, steps + 1):
        optimiser.zero_grad()
        for _ in range(_BATCH):
            (teacher.loss(order.choice(texts.fit), weights()) / _BATCH).backward()
        optimiser.step()
        schedule.step()
        if i % every == 0 or i == steps:
            found = judged()
            if found < best:
                best, kept = found, [p.detach().clone() for p in parameters]
        step(i, steps)
    with torch.no_grad():
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)


def distil_scales(
    fitted: Fitted, deltas: Deltas, tuned: Tuned, texts: Texts, *, steps: int = 100, rate: float = 1e-2, step: Step = _QUIET
) -> int:
    """Train the scales of sign and ternary codes in `fitted`, in place. rate: of their logarithms. Returns how many tensors."""
    import torch

    names = [n for n, (codec, coded) in fitted.codes.items() if codec.name in SCALED and n in tuned.parameters and coded.parts]
    if not names:
        return 0
    teacher = _Teacher(tuned, deltas, names)
    signs, bases, logs, first = {}, {}, {}, {}
    for n in names:
        codec, coded = fitted.codes[n]
        shape = deltas.shape(n)
        scale = np.frombuffer(coded.parts["scales"], "<f4").copy()
        made = codec.decode(coded, shape, n, 0, int(np.prod(shape))).reshape(rows_of(shape))
        by = np.broadcast_to(scale[:, None] if len(scale) > 1 else scale[None], made.shape)
        unit = np.divide(made, by, out=np.zeros_like(made), where=by > 0)
        signs[n], bases[n] = torch.from_numpy(unit), torch.from_numpy(deltas.base(n))
        first[n] = torch.from_numpy(scale)
        logs[n] = torch.zeros(len(scale), requires_grad=True)

    def weights() -> dict[str, Any]:
        return {
            teacher.paths[n]: bases[n] + ((first[n] * logs[n].exp())[:, None] * signs[n]).reshape(bases[n].shape) for n in names
        }

    _train(teacher, texts, dict.fromkeys(logs.values(), rate), weights, steps=steps, step=step)
    for n in names:
        codec, coded = fitted.codes[n]
        scale = (first[n] * logs[n].detach().exp()).numpy().astype("<f4")
        trained = replace(coded, parts={**coded.parts, "scales": scale.tobytes()})
        fitted.codes[n] = codec, _measured(codec, trained, deltas.delta(n), n)
        tuned.hold(n, deltas.rebuilt(n, *fitted.codes[n]))
    return len(names)


def repair(
    fitted: Fitted,
    deltas: Deltas,
    tuned: Tuned,
    texts: Texts,
    *,
    rank: int,
    steps: int = 200,
    rate: float = 2e-2,
    step: Step = _QUIET,
) -> int:
    """Put a trained low-rank part on top of every coded matrix of a linear layer, in place. Returns how many.

    rate: of a factor, in units of its root mean square. The factors are stored as float16 (`lowrank/1`) in a second stage
    (`hybrid/1`): 16 rank (rows + columns) bits each.
    """
    import torch

    names = [n for n in fitted.codes if n in tuned.parameters and len(deltas.shape(n)) == 2]
    groups = in_order(tuned.live, texts.fit, set(names))
    if not groups:
        return 0
    found = {layer.name: inputs_of(tuned.live, texts.fit, group[0]) for group in groups for layer in group[:1]}
    inputs = {layer.name: found[group[0].name] for group in groups for layer in group}
    names = [n for n in names if n in inputs]
    teacher = _Teacher(tuned, deltas, names)
    low, below, left, right = lossy_codec("lowrank/1"), {}, {}, {}
    for n in names:
        built = deltas.rebuilt(n, *fitted.codes[n])
        rest = deltas.tuned(n) - built
        b, a = lowrank.factors(coded_with(low, rest, n, inputs[n], {"rank": rank, "factors": "float16"}), rest.shape)
        missing = min(rank, *rest.shape) - b.shape[1]
        if missing > 0:  # a part that is silent, and can learn
            b = np.concatenate([b, np.zeros((len(b), missing))], axis=1)
            a = np.concatenate([a, np.full((missing, a.shape[1]), 1e-4)])
        below[n] = torch.from_numpy(built)
        left[n], right[n] = (torch.from_numpy(np.ascontiguousarray(m, np.float32)).requires_grad_() for m in (b, a))

    def weights() -> dict[str, Any]:
        return {teacher.paths[n]: below[n] + left[n] @ right[n] for n in names}

    sides = [*left.values(), *right.values()]
    rates = {m: rate * max(float(m.detach().square().mean().sqrt()), 1e-8) for m in sides}
    _train(teacher, texts, rates, weights, steps=steps, step=step)
    hybrid = lossy_codec("hybrid/1")
    for n in names:
        codec, coded = fitted.codes[n]
        parts, facts = lowrank.halves(left[n].detach().double().numpy(), right[n].detach().double().numpy().T)
        delta = deltas.delta(n)
        first = codec.decode(coded, delta.shape, n, 0, delta.size).reshape(delta.shape)
        second = _measured(low, Coded(parts, facts), delta - first, n)
        fitted.codes[n] = hybrid, _measured(hybrid, Coded(*joined([(codec, coded), (low, second)])), delta, n)
        tuned.hold(n, deltas.rebuilt(n, *fitted.codes[n]))
    return len(names)


def _measured(codec: Lossy, coded: Coded, delta: Any, name: str) -> Coded:
    assert isinstance(codec, Codec)
    return codec.measured(np.ascontiguousarray(delta), coded, name)
