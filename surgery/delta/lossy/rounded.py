"""Uniform quantiser without dither, entropy-coded: what rounding with feedback from calibration writes.

    q = rint(d / step), an integer;   d' = q step'

Without inputs it is plain rounding: most of a small delta becomes zero, and step' is the step times the gain correction. With
the Gram matrix of a layer's inputs errors are fed back (`inputs`), so that what vanishes here is made up for there: at a step
of several standard deviations a few large values stand for many small ones, which is what an entropy coder likes. Feedback
makes errors independent of the delta as dither does, without adding any; then step' = step.

Contexts are the scale classes of rows and columns (`classes`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import classes as scale_classes
from surgery.delta.lossy import integers
from surgery.delta.lossy.classes import Classes
from surgery.delta.lossy.common import Array, Codec, Parts, chunks, number, one_of, overlapping, rows_of, sliced
from surgery.delta.lossy.dither import solve
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.memo import remembered

_ROWS = 192  # of a matrix that a rate is tried on


@lossy
class Rounded(Codec):
    name = "round/1"
    calibrated = True
    options = MappingProxyType(
        {
            "bits": number("bits per element to spend at most; the step is searched", exclusiveMinimum=0),
            "step": number("width of a quantiser step", exclusiveMinimum=0),
            "scale": {
                "enum": ["gain", "l2"],
                "default": "gain",
                "description": "without inputs: gain: <R, D> = <D, D>, nothing is shrunk; l2: values as they were rounded",
            },
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        what, value = one_of(self, key, bits=options["bits"], step=options["step"])
        matrix = x.reshape(rows_of(x.shape))
        largest = float(np.abs(matrix).max())
        if largest == 0.0:
            return {}, {"step": 0.0, "classes": 1, "chunks": []}
        if what == "step":
            if largest / value > integers.LARGEST / 8:
                raise self.refuse(key, f"a step of {value:.3g} is too fine for values up to {largest:.3g}")
            return self._at(x, matrix, float(value), inputs, options["scale"])
        aim, best = 0.99 * float(value), None
        step_for = self._search(matrix, largest, inputs)
        for _ in range(5):
            step = step_for(aim)
            parts, facts = self._at(x, matrix, step, inputs, options["scale"])
            spent = 8.0 * sum(map(len, parts.values())) / x.size
            if spent <= value and (best is None or spent > best[0]):
                best = spent, (parts, facts)
            if 0.97 * value <= spent <= value or step >= 8.0 * largest:
                break
            aim = max(aim - (spent - 0.99 * value), 1e-3 * value)
        return best[1] if best else ({}, {"step": 0.0, "classes": 1, "chunks": []})

    def _search(self, matrix: Array, largest: float, inputs: Inputs | None) -> Callable[[float], float]:
        """bits -> the step at which a sample of outputs costs that much. Outputs do not influence one another."""
        turned = matrix if inputs is None else inputs.turned(matrix)
        picked = np.linspace(0, len(turned) - 1, min(len(turned), _ROWS)).astype(int)
        some = turned[picked]
        known: dict[float, float] = {}

        def spent(step: float) -> float:
            if step not in known:
                q = quantised(some, step, None if inputs is None else inputs.upright())
                counts = integers.counted([lambda: (q.reshape(-1), np.zeros(q.size, np.uint8))], 1)
                known[step] = integers.cost(counts, matrix.size) / matrix.size
            return known[step]

        return lambda bits: solve(spent, bits, largest * 2.0**-20, 8.0 * largest)

    def _at(self, x: Array, matrix: Array, step: float, inputs: Inputs | None, scale: str) -> Parts:
        q = quantised(matrix, step, inputs)
        table, blocks = _contexts(q, x.shape)
        packed = integers.pack(blocks, table.contexts)
        if inputs is None and scale == "gain":
            dd, dr = float(np.square(matrix, dtype=np.float64).sum()), float((matrix.astype(np.float64) * q).sum())
            step = dd / dr if dr > 0.0 else 0.0
        side = table.to_bytes() if table.rows.any() or table.columns.any() else b""
        parts = {"classes": side, "tables": packed.tables, "codes": packed.codes}
        return {n: p for n, p in parts.items() if p}, {"step": step, "classes": table.count, "chunks": packed.lengths}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, parts = coded.facts, coded.parts
        step = float(facts["step"])
        if not np.isfinite(step) or step < 0.0:
            raise ValueError(f"step {step}")
        made = np.zeros(stop - start, np.float32)
        if not parts:
            sliced(b"", np.uint8, len(facts["chunks"]))
            return made
        side = parts.get("classes", b"")
        table = remembered(
            "classes", side, (shape, facts["classes"]), lambda: Classes.from_bytes(side, shape, facts["classes"])
        )
        packed = integers.Packed(parts["tables"], parts["codes"], facts["chunks"])
        for i, a, b in overlapping(shape, start, stop):
            values = (integers.unpack(packed, i, table.of(a, b)) * step).astype(np.float32)
            lo, hi = max(a, start), min(b, stop)
            made[lo - start : hi - start] = values[lo - a : hi - a]
        return made


def rounded_rate(delta: Array) -> Callable[[float], float]:
    """step -> bits per element of plain rounding, measured on a sample of rows of a matrix."""
    matrix = delta.reshape(rows_of(delta.shape))
    some = matrix[np.linspace(0, len(matrix) - 1, min(len(matrix), _ROWS)).astype(int)].astype(np.float64)

    def measured(step: float) -> float:
        q = quantised(some, step, None)
        counts = integers.counted([lambda: (q.reshape(-1), np.zeros(q.size, np.uint8))], 1)
        return integers.cost(counts, matrix.size) / matrix.size

    return measured


def quantised(matrix: Array, step: float, inputs: Inputs | None) -> Array:
    """q (int64) of a matrix, with feedback where inputs are known."""
    if inputs is None:
        return np.rint(matrix.astype(np.float64) / step).astype(np.int64)
    scaled = inputs.turned(matrix).astype(np.float64) / step
    return np.ascontiguousarray(inputs.turned(feed_back(scaled, inputs, lambda left, _: np.rint(left[0])))).astype(np.int64)


def _contexts(q: Array, shape: tuple[int, ...]) -> tuple[Classes, list[integers.Block]]:
    """The scale classes that make q cheapest, their own size included, and q in blocks with them."""
    flat = q.reshape(-1)
    best: tuple[float, Any, Any] | None = None
    of = scale_classes.powers(lambda a, b: flat[a:b].astype(np.float32), shape)
    for table in (scale_classes.plain(shape), *(scale_classes.measured(of, columns=c) for c in (False, True))):
        blocks = [lambda r=r, t=table: (flat[r[0] : r[1]], t.of(*r)) for r in chunks(shape)]
        side = len(table.to_bytes()) if table.rows.any() or table.columns.any() else 0
        spent = 8.0 * side + integers.cost(integers.counted(blocks, table.contexts), q.size)
        if best is None or spent < best[0]:
            best = spent, table, blocks
    assert best is not None
    return best[1], best[2]
