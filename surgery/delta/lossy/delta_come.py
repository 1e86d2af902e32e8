"""Singular vectors in groups of falling precision (Delta-CoMe, arXiv:2406.08903), with a search for the plan.

A plan says how many triples have 8, 4, 3, 2 and 1 bits, in order of falling singular value; the rest is dropped. Vectors are
rounded in groups of coordinates with a 12-bit scale per group. V is rounded first; U is then fitted to the rounded V
(least squares) and rounded.

The search: quantising a triple at b bits removes s_k^2 (1 - e_b) of the squared error and costs b bits per coordinate. Taking
the steps of best gain per bit first is optimal where gains are concave, as they are here. The plan found and the fixed ones of
the same cost (all triples at one precision; 8/3/2 and 8/4/3 in the original proportions) are tried and the best is kept, so a
searched plan is never worse than a fixed one.

With the Gram matrix of a layer's inputs, as published: vectors of the whitened delta; V is rounded with feedback under
that matrix, then U is fitted and rounded with feedback under the Gram matrix of what V makes of the inputs. Plans are
compared by the error of the layer's outputs.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np

from surgery.delta.codecs.base import Coded, lossy
from surgery.delta.lossy import packing
from surgery.delta.lossy.common import Array, Codec, Parts, number, one_of, rows_of, sliced
from surgery.delta.lossy.exact import Factors, cached
from surgery.delta.lossy.group import best_scales, grouped, odd
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.spectrum import Spectrum, whitened

BITS = (8, 4, 3, 2, 1)
# squared error left of a triple whose two vectors are rounded to b bits (Gaussian coordinates, groups of 128)
_LEFT = {0: 1.0, 1: 0.60, 2: 0.225, 3: 0.072, 4: 0.023, 8: 2e-4}
_CLIPS = {1: (1.0, 0.7, 0.5, 0.4, 0.3), 2: (1.0, 0.8, 0.65, 0.55), 3: (1.0, 0.85, 0.72), 4: (1.0, 0.9, 0.8), 8: (1.0,)}
_SCALE_BITS = 12

Plan = list[tuple[int, int]]  # (bits, triples)


@lossy
class DeltaCoMe(Codec):
    name = "delta_come/1"
    matrix = True
    calibrated = True
    options = MappingProxyType(
        {
            "bits": number("bits per element to spend at most; the plan is searched", exclusiveMinimum=0),
            "plan": {
                "type": ["array", "null"],
                "default": None,
                "description": "triples per precision in falling order: [[8, 2], [3, 32], [2, 968]]",
                "items": {
                    "type": "array",
                    "prefixItems": [{"enum": list(BITS)}, {"type": "integer", "minimum": 1}],
                    "minItems": 2,
                    "maxItems": 2,
                },
            },
            "group": {
                "type": "integer",
                "minimum": 8,
                "maximum": 4096,
                "default": 128,
                "description": "coordinates that share a scale",
            },
        }
    )

    def pack(self, x: Array, key: str, inputs: Inputs | None = None, **options: Any) -> Parts:
        what, value = one_of(self, key, bits=options["bits"], plan=options["plan"])
        group, shape = options["group"], rows_of(x.shape)
        found = whitened(x.reshape(shape), inputs)
        wide = x.reshape(shape).astype(np.float64)
        if what == "plan":
            return _rounded(found, wide, _cut([(int(b), int(n)) for b, n in value], found.values.size), group, inputs)
        best: tuple[float, Parts] | None = None
        for plan in candidates(found.values, shape, float(value), group):
            parts, facts = _rounded(found, wide, plan, group, inputs)
            if 8.0 * sum(map(len, parts.values())) > value * x.size:
                continue
            made = _factors(Coded(parts, facts), x.shape).elements(0, x.size) if parts else np.zeros(x.size)
            rest = made.reshape(shape) - wide
            error = float(np.square(rest).sum()) if inputs is None else inputs.harm(rest)
            if best is None or error < best[0]:
                best = error, (parts, facts)
        return best[1] if best else _rounded(found, wide, [], group, inputs)

    def unpack(self, coded: Coded, shape: tuple[int, ...], key: str, start: int, stop: int) -> Array:
        if not coded.facts["plan"]:
            return np.zeros(stop - start, np.float32)
        return cached(coded, shape, _factors).elements(start, stop)


def price(bits: int, shape: tuple[int, int], group: int) -> float:
    """Bits of one triple: codes and 16 bits per scale."""
    return float(sum(bits * n + 16 * -(-n // group) for n in shape)) if bits else 0.0


def search(values: Array, shape: tuple[int, int], budget: float, group: int) -> Plan:
    """The plan of least predicted error whose triples cost at most `budget` bits. values: singular values, descending."""
    steps = []
    for k, s in enumerate(values):
        at = 0
        for bits in _hull(shape, group):
            cost = price(bits, shape, group) - price(at, shape, group)
            steps.append((float(s) ** 2 * (_LEFT[at] - _LEFT[bits]) / cost, -k, cost, bits))
            at = bits
    chosen, spent = [0] * len(values), 0.0
    for _, k, cost, bits in sorted(steps, reverse=True):
        if spent + cost <= budget and bits > chosen[-k]:
            if chosen[-k] != _before(bits, shape, group):
                continue
            chosen[-k], spent = bits, spent + cost
    return [(b, chosen.count(b)) for b in BITS if b in chosen]


def candidates(values: Array, shape: tuple[int, int], bits: float, group: int) -> list[Plan]:
    """The searched plan and the fixed ones, each as large as the budget allows."""
    budget = bits * shape[0] * shape[1] - 64.0
    plans = [search(values, shape, budget, group)]
    for b in BITS:
        plans.append([(b, int(budget // price(b, shape, group)))])
    for mixed in (((8, 2), (3, 32), (2, 968)), ((8, 4), (4, 12), (3, 16))):
        share = budget / sum(n * price(b, shape, group) for b, n in mixed)
        plans.append([(b, max(1, int(n * share))) for b, n in mixed])
    found: list[Plan] = []
    for plan in plans:
        plan = _cut(plan, values.size)
        if plan and plan not in found:
            found.append(plan)
    return found


def _hull(shape: tuple[int, int], group: int) -> list[int]:
    """Precisions on the lower convex hull of error against price, ascending."""
    hull, rest = [0], sorted(BITS)
    while rest:
        at = hull[-1]
        gains = [(_LEFT[at] - _LEFT[b]) / (price(b, shape, group) - price(at, shape, group)) for b in rest]
        best = int(np.argmax(gains))
        hull.append(rest[best])
        rest = rest[best + 1 :]
    return hull[1:]


def _before(bits: int, shape: tuple[int, int], group: int) -> int:
    hull = [0, *_hull(shape, group)]
    return hull[hull.index(bits) - 1]


def _cut(plan: Plan, rank: int) -> Plan:
    """The plan for a matrix of this rank: triples that do not exist are left out."""
    made, room = [], rank
    for bits, count in sorted(plan, reverse=True):
        if (take := min(count, room)) > 0:
            made.append((bits, take))
            room -= take
    return made


def _rounded(found: Spectrum, wide: Array, plan: Plan, group: int, inputs: Inputs | None) -> Parts:
    rank = sum(n for _, n in plan)
    if rank == 0:
        return {}, {"plan": [], "group": group, "exponent": 0}
    root = np.sqrt(found.values[:rank])
    left, right = found.left[:, :rank] * root, found.right[:, :rank] * root
    if inputs is None:
        near = _Side(right, plan, group)
        solved, *_ = np.linalg.lstsq(near.made, wide.T, rcond=None)
        far = _Side(solved.T, plan, group)
    else:
        near = _Side(right if inputs.axis == 1 else left, plan, group, along=inputs.upright())
        both = inputs.damped @ near.made  # (inputs, rank)
        gram = Inputs(near.made.T @ both, damp=1e-6)
        far = _Side(np.linalg.solve(gram.damped, (inputs.turned(wide) @ both).T).T, plan, group, across=gram)
    sides = (far, near) if inputs is None or inputs.axis == 1 else (near, far)
    parts = {"left": sides[0].codes, "left_scales": sides[0].scales, "right": sides[1].codes, "right_scales": sides[1].scales}
    return parts, {"plan": [list(p) for p in plan], "group": group, "exponent": near.exponent + far.exponent}


class _Side:
    """Vectors rounded by plan. codes, scales: as stored; made: (length, rank), what they stand for; exponent: of the scales.

    along: feed errors back from coordinate to coordinate, given their Gram matrix; across: from vector to vector.
    """

    def __init__(
        self, columns: Array, plan: Plan, group: int, *, along: Inputs | None = None, across: Inputs | None = None
    ) -> None:
        vectors = np.ascontiguousarray(columns.T)
        length = vectors.shape[1]
        found, at = [], 0
        for bits, count in plan:
            found.append(best_scales(grouped(vectors[at : at + count], group), bits, _CLIPS[bits]))
            at += count
        scale = np.concatenate(found)
        self.exponent = int(np.frexp(float(scale.max()))[1]) - _SCALE_BITS
        whole = np.minimum(np.rint(np.ldexp(scale, -self.exponent)), 2**_SCALE_BITS - 1)
        self._steps = np.repeat(np.ldexp(whole, self.exponent), group, axis=1)[:, :length]
        self._half = np.repeat([2.0 ** (b - 1) for b, _ in plan], [n for _, n in plan])[:, None]
        if along is not None:
            fed = feed_back(vectors, along, lambda rest, j: self._value(rest[0], self._steps[:, j], self._half[:, 0]))
        elif across is not None:
            fed = feed_back(vectors.T, across, lambda rest, k: self._value(rest[0], self._steps[k], self._half[k])).T
        else:
            fed = self._value(vectors, self._steps, self._half)
        q, codes, at = self._code(fed, self._steps, self._half), [], 0
        for bits, count in plan:
            codes.append(packing.pack(q[at : at + count], bits))
            at += count
        self.codes, self.scales, self.made = b"".join(codes), whole.astype("<u2").tobytes(), fed.T

    @staticmethod
    def _code(values: Array, steps: Array, half: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(steps > 0.0, values / steps, 0.0)
        made: Array = np.clip(np.floor(t + half), 0, 2 * half - 1)
        return made

    def _value(self, values: Array, steps: Array, half: Array) -> Array:
        made: Array = (2.0 * self._code(values, steps, half) - (2 * half - 1)) * steps / 2
        return made


def _factors(coded: Coded, shape: tuple[int, ...]) -> Factors:
    facts, parts = coded.facts, coded.parts
    rows, columns = rows_of(shape)
    group, plan = facts["group"], facts["plan"]
    if type(group) is not int or not 1 <= group <= 4096 or any(b not in BITS or type(n) is not int or n < 1 for b, n in plan):
        raise ValueError(f"plan {plan!r}, group {group!r}")
    rank = sum(n for _, n in plan)
    if rank > min(rows, columns):
        raise ValueError(f"a plan of {rank} triples for a matrix {rows} x {columns}")
    sides = [_integers(parts[s], parts[f"{s}_scales"], n, plan, group) for s, n in (("left", rows), ("right", columns))]
    return Factors.checked(np.ascontiguousarray(sides[0].T), sides[1], facts["exponent"] - 2)


def _integers(payload: Any, scale: Any, length: int, plan: Plan, group: int) -> Array:
    """(rank, length) of odd code times integer scale: twice the vector, in units of the scales' exponent."""
    per, at, row, made = -(-length // group), 0, 0, []
    whole = sliced(scale, "<u2", sum(n for _, n in plan) * per).reshape(-1, per).astype(np.float64)
    for bits, count in plan:
        size = packing.size(count * length, bits)
        codes = packing.unpack(memoryview(payload)[at : at + size], bits, count * length, 0, count * length)
        made.append(odd(codes.reshape(count, length), bits) * np.repeat(whole[row : row + count], group, axis=1)[:, :length])
        at, row = at + size, row + count
    if at != len(payload):
        raise ValueError("codes are left over")
    return np.concatenate(made)
