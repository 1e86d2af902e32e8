"""A few weak columns in float16, all others in another codec: mixed precision by input (OWQ, arXiv:2306.02272; QEFT,
arXiv:2410.08661).

Inputs that are much larger than others make errors of their columns count for more. Weak are the columns j with the largest

    H_jj |e_j|^2,    e_j the error of column j when everything is coded,    H the Gram matrix of the layer's inputs (else I).

With H the others are rounded with feedback under H_rr - H_rw H_ww^-1 H_wr, what is left of H when the weak columns w make up
for errors E of the rest r; they do: D_w - E H_rw H_ww^-1 is what is stored. QEFT takes the same columns in every layer, which
its kernels ask for; a file does not, and each matrix has its own.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, Lossy, lossy
from surgery.delta.lossy.common import Array, Parts, number, one_of, rows_of, sliced
from surgery.delta.lossy.hybrid import STAGE, Hybrid, coded_with, joined
from surgery.delta.lossy.inputs import Inputs

_SHARE = 0.03


@lossy
class Columns(Hybrid):
    name = "columns/1"
    matrix = True
    options = MappingProxyType(
        {
            "count": number("weak columns", type=["integer", "null"], minimum=1),
            "share": number(f"share of the columns that is weak; default {_SHARE}", exclusiveMinimum=0, maximum=1),
            "quantiser": {
                **STAGE,
                "default": {"codec": "group/1", "bits": 4},
                "description": "codec of the other columns, with its options",
            },
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        what, value = one_of(self, key, ("share", _SHARE), count=options["count"], share=options["share"])
        quantiser, given = self._stage(key, options["quantiser"])
        seen = None if inputs is None else inputs.upright()
        axis = 1 if inputs is None else inputs.axis
        wide = (x.reshape(rows_of(x.shape)) if axis == 1 else x.T).astype(np.float64)
        count = min(int(value) if what == "count" else max(1, round(value * wide.shape[1])), wide.shape[1])
        weak = self._weak(x, key, quantiser, given, count, inputs)
        rest = wide.copy()
        rest[:, weak] = 0.0
        stored = np.ascontiguousarray(rest if axis == 1 else rest.T, np.float32).reshape(x.shape)
        coded = coded_with(quantiser, stored, key, None if inputs is None else _left(inputs, weak), given)
        values = wide[:, weak]
        if seen is not None:
            error = self._decoded(quantiser, coded, x, key, axis) - wide
            error[:, weak] = 0.0
            values = values - np.linalg.solve(seen.damped[np.ix_(weak, weak)], (error @ seen.damped[:, weak]).T).T
        top = float(np.abs(values).max(initial=0.0))
        exponent = int(np.frexp(top)[1]) - 14 if top > 0.0 else 0
        parts, facts = joined([(quantiser, coded)])
        parts["columns"] = weak.astype("<u4").tobytes()
        parts["values"] = np.ldexp(values, -exponent).astype("<f2").tobytes()
        return parts, {**facts, "axis": axis, "weak": len(weak), "exponent": exponent}

    def _weak(self, x: Array, key: str, codec: Lossy, given: dict[str, Any], count: int, inputs: Inputs | None) -> Array:
        """The columns, ascending; of equal ones the first."""
        axis = 1 if inputs is None else inputs.axis
        coded = codec.encode(np.ascontiguousarray(x), key=key, **given)
        wide = x.reshape(rows_of(x.shape)) if axis == 1 else x.T
        harm = np.square(self._decoded(codec, coded, x, key, axis) - wide.astype(np.float64)).sum(axis=0)
        if inputs is not None:
            harm *= np.diag(inputs.gram)
        return np.sort(np.argsort(-harm, kind="stable")[:count])

    def _decoded(self, codec: Lossy, coded: Coded, x: Array, key: str, axis: int) -> Array:
        """(outputs, inputs) in float64 of what was coded."""
        made = codec.decode(coded, x.shape, key, 0, x.size).astype(np.float64)
        return made.reshape(rows_of(x.shape)) if axis == 1 else made.reshape(x.shape).T

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, parts = coded.facts, coded.parts
        rows, length = rows_of(shape)
        count, axis, exponent = facts["weak"], facts["axis"], facts["exponent"]
        lines, wide = (rows, length) if axis == 1 else (length, rows)
        if axis not in (0, 1) or type(count) is not int or not 1 <= count <= wide or len(facts["stages"]) != 1:
            raise ValueError(f"axis {axis!r}, {count!r} weak columns, {len(facts['stages'])} stages")
        if type(exponent) is not int or not -200 <= exponent <= 200:
            raise ValueError(f"exponent {exponent!r}")
        weak = sliced(parts["columns"], "<u4", count).astype(np.int64)
        if weak[-1] >= wide or np.any(np.diff(weak) <= 0):
            raise ValueError("columns that are none, or out of order")
        half = sliced(parts["values"], "<f2", lines * count).reshape(lines, count)
        if not np.isfinite(half).all():
            raise ValueError("values that are not finite")
        made = super().unpack(coded, shape, key, start, stop)
        at = np.arange(start, stop)
        row, column = np.divmod(at, length)
        line, place = (row, column) if axis == 1 else (column, row)
        found = np.minimum(np.searchsorted(weak, place), count - 1)
        here = weak[found] == place
        made[here] = np.ldexp(half[line[here], found[here]].astype(np.float64), exponent)
        return made


def _left(inputs: Inputs, weak: Array) -> Inputs:
    """What counts of errors in other columns when the weak ones make up for them."""
    full = inputs.damped
    made = full - full[:, weak] @ np.linalg.solve(full[np.ix_(weak, weak)], full[weak])
    made[weak], made[:, weak] = 0.0, 0.0
    return Inputs(made, axis=inputs.axis, damp=1e-6) if np.trace(made) > 0.0 else inputs
