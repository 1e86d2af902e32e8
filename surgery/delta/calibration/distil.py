"""Training what a package can hold with little: scales, and a low-rank repair, so that outputs match the fine-tuned model's.

BitDelta's scale distillation (arXiv:2402.10193, section 3.2) trains the scales of sign masks by the mean squared difference of
logits; they begin unbiased here, which is most of the way. Low-rank repair (LREC of INT2.1, arXiv:2306.08162) freezes the coded
delta and trains two factors on top of it, which begin as the best low-rank part of what is left for each layer's outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from surgery.delta.calibration.data import Texts, Tuned
from surgery.delta.calibration.fit import Fitted
from surgery.delta.calibration.layers import in_order, inputs_of
from surgery.delta.calibration.training import QUIET, Step, Teacher, measured, train
from surgery.delta.codecs.base import Coded, lossy_codec
from surgery.delta.deltas import Deltas
from surgery.delta.lossy import lowrank
from surgery.delta.lossy.common import rows_of
from surgery.delta.lossy.hybrid import coded_with, joined

SCALED = ("sign/1", "ternary/1")  # codecs whose `scales` can be trained


def distil_scales(
    fitted: Fitted, deltas: Deltas, tuned: Tuned, texts: Texts, *, steps: int = 100, rate: float = 1e-2, step: Step = QUIET
) -> int:
    """Train the scales of sign and ternary codes in `fitted`, in place. rate: of their logarithms. Returns how many tensors."""
    import torch

    names = [n for n, (codec, coded) in fitted.codes.items() if codec.name in SCALED and n in tuned.parameters and coded.parts]
    if not names:
        return 0
    teacher = Teacher(tuned, deltas, names)
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

    train(teacher, texts, dict.fromkeys(logs.values(), rate), weights, steps=steps, step=step)
    for n in names:
        codec, coded = fitted.codes[n]
        scale = (first[n] * logs[n].detach().exp()).numpy().astype("<f4")
        trained = replace(coded, parts={**coded.parts, "scales": scale.tobytes()})
        fitted.codes[n] = codec, measured(codec, trained, deltas.delta(n), n)
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
    step: Step = QUIET,
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
    teacher = Teacher(tuned, deltas, names)
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
    train(teacher, texts, rates, weights, steps=steps, step=step)
    hybrid = lossy_codec("hybrid/1")
    for n in names:
        codec, coded = fitted.codes[n]
        parts, facts = lowrank.halves(left[n].detach().double().numpy(), right[n].detach().double().numpy().T)
        delta = deltas.delta(n)
        first = codec.decode(coded, delta.shape, n, 0, delta.size).reshape(delta.shape)
        second = measured(low, Coded(parts, facts), delta - first, n)
        fitted.codes[n] = hybrid, measured(hybrid, Coded(*joined([(codec, coded), (low, second)])), delta, n)
        tuned.hold(n, deltas.rebuilt(n, *fitted.codes[n]))
    return len(names)
