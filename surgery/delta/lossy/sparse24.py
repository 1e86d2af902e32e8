"""Two of four: of every four neighbours in a row the two largest are kept, in 2 to 4 bits with a scale per group.

The pattern that sparse tensor cores compute with (DeltaZip, arXiv:2312.05215). Which two is one of six pairs, in 3 bits. The
gain is corrected per row. With the Gram matrix of a layer's inputs, as published: errors of dropping and rounding are fed back.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing, scales
from surgery.delta.lossy.common import Array, Codec, Parts, rows_of
from surgery.delta.lossy.group import GROUP, best_scales, group_of, grouped, odd, quantise
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.sign import spread

_PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])
_CODE = np.zeros((4, 4), np.uint8)
_CODE[_PAIRS[:, 0], _PAIRS[:, 1]] = np.arange(6)
_CLIPS = {2: (1.0, 0.85, 0.7), 3: (1.0, 0.9, 0.8), 4: (1.0, 0.92, 0.84)}


@lossy
class Sparse24(Codec):
    name = "sparse24/1"
    calibrated = True
    options = MappingProxyType(
        {
            "bits": {"enum": [2, 3, 4], "default": 4, "description": "bits per kept element"},
            "group": {**GROUP, "description": "kept elements that share a scale"},
            "scale": scales.SCALE,
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        bits, group = options["bits"], options["group"]
        rows, length = rows_of(x.shape)
        fours = grouped(x.reshape(rows, length).astype(np.float64), 4)
        pair = np.sort(np.argsort(-np.abs(fours), axis=-1, kind="stable")[..., :2], axis=-1)
        kept = np.take_along_axis(fours, pair, axis=-1).reshape(rows, -1)
        groups = grouped(kept, group)
        payload, exponent, rounded = scales.to_half(best_scales(groups, bits, _CLIPS[bits]).reshape(-1))
        steps = rounded.reshape(groups.shape[:2])
        if inputs is not None:
            pair, q = _fed_back(x, steps, bits, group, inputs)
            gain = np.ones(rows)
        else:
            q = quantise(groups, steps, bits)
            made = (odd(q, bits) * (steps[..., None] / 2)).reshape(rows, -1)[:, : kept.shape[1]]
            gain = scales.factor(options["scale"], np.square(fours).sum((1, 2)), (made * kept).sum(1), np.square(made).sum(1))
        parts = {
            "pairs": packing.pack(_CODE[pair[..., 0], pair[..., 1]], 3),
            "codes": packing.pack(q.reshape(rows, -1)[:, : kept.shape[1]], bits),
            "scales": payload,
            "gains": gain.astype("<f4").tobytes(),
        }
        return parts, {"width": bits, "group": group, "exponent": exponent}

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        facts, parts = coded.facts, coded.parts
        bits, group = facts["width"], facts["group"]
        if bits not in _CLIPS or type(group) is not int or group < 1:
            raise ValueError(f"width {bits!r}, group {group!r}")
        rows, length = rows_of(shape)
        fours = -(-length // 4)  # per row
        first, last = start // length, -(-stop // length)
        a, b = first * fours, last * fours  # whole rows
        if last - first == 1:
            a, b = first * fours + (start - first * length) // 4, first * fours - (-(stop - first * length) // 4)
        pair = packing.unpack(parts["pairs"], 3, rows * fours, a, b)
        if pair.max() > 5:
            raise ValueError("a pair that is none")
        q = packing.unpack(parts["codes"], bits, rows * fours * 2, 2 * a, 2 * b)
        per = -(-2 * fours // group)
        of = group_of(2 * fours, group, 2 * a, 2 * b)
        low = int(of[0])
        scale = scales.from_half(parts["scales"], facts["exponent"], rows * per, low, int(of[-1]) + 1) * 0.5
        gains = scales.singles(parts["gains"], rows).astype(np.float64)
        values = odd(q, bits) * scale[of - low] * spread(gains, 2 * fours, 2 * a, 2 * b)
        made = np.zeros((b - a, 4))
        np.put_along_axis(made, _PAIRS[pair], values.reshape(-1, 2), axis=1)
        if last - first == 1:
            skip = start - first * length - 4 * (a - first * fours)
            return made.reshape(-1)[skip : skip + stop - start].astype(np.float32)
        whole = made.reshape(last - first, 4 * fours)[:, :length].reshape(-1)
        return whole[start - first * length : stop - first * length].astype(np.float32)


def _fed_back(x: Array, steps: Array, bits: int, group: int, inputs: Inputs) -> tuple[Array, Array]:
    """(pairs, codes) with feedback: of four neighbours those are dropped that the others can make up for best (SparseGPT,
    arXiv:2301.00774). Where neighbours are outputs, they cannot make up for one another: the smallest are dropped."""
    rows, length = x.shape
    count = -(-length // 4)
    pair, codes = np.zeros((rows, count, 2), np.int64), np.zeros((rows, 2 * count), np.int64)
    place = np.arange(2 * count) // group
    if inputs.axis == 0:

        def line(rest: Array, i: int) -> Array:
            fours = grouped(rest[:1], 4)[0]  # (count, 4)
            pair[i] = np.sort(np.argsort(-np.abs(fours), axis=-1, kind="stable")[:, :2], axis=-1)
            kept, by = np.take_along_axis(fours, pair[i], axis=-1).reshape(-1), steps[i][place]
            codes[i] = quantise(kept[:, None], by, bits)[:, 0]
            made = np.zeros_like(fours)
            np.put_along_axis(made, pair[i], (odd(codes[i], bits) * by / 2).reshape(-1, 2), axis=1)
            return made.reshape(-1)[:length]

        feed_back(x.T, inputs, line, in_order=False)
        return pair, codes
    innovation = np.diag(inputs.natural)

    def column(rest: Array, j: int) -> Array:
        four, at = divmod(j, 4)
        if at == 0:
            score = np.full((4, rows), -1.0)
            some = min(4, length - j)
            score[:some] = np.square(rest[:some] / innovation[j : j + some, None])
            pair[:, four] = np.sort(np.argsort(-score, axis=0, kind="stable")[:2], axis=0).T
        slot = np.where(pair[:, four, 0] == at, 0, np.where(pair[:, four, 1] == at, 1, -1))
        live = np.flatnonzero(slot >= 0)
        where = 2 * four + slot[live]
        by = steps[live, place[where]]
        codes[live, where] = quantise(rest[0][live, None], by, bits)[:, 0]
        made = np.zeros(rows)
        made[live] = odd(codes[live, where], bits) * by / 2
        return made

    feed_back(x, inputs, column, in_order=False)
    return pair, codes
