"""The dither quantiser fitted to a layer's inputs: errors are made up for in columns that follow, so that what the layer's
outputs lose counts. Coded and decoded as `dither/1`; no weight's error is bounded.

Rounding with feedback alone (GPTQ, the codec `round`) also lowers a layer's output error, but a coarsely rounded model can say
something else than it should for all that: its errors depend on what is rounded. Under a dither they do not. But noise that is
fed back is coded, too: more than the deltas themselves where steps are coarse and inputs lie in few directions. Damping limits
that (noise cannot usefully exceed the signal in any direction: reverse water-filling); it is chosen by what outputs lose at the
rate asked for.
"""

from __future__ import annotations

import numpy as np

from surgery.delta.lossy import dither, integers
from surgery.delta.lossy.classes import Classes
from surgery.delta.lossy.common import Array, Parts, chunks
from surgery.delta.lossy.inputs import Inputs, feed_back
from surgery.delta.lossy.source import Source

_OUTPUTS = 192  # of a matrix that a rate is tried on
_DAMPS = (0.1, 1.0, 10.0)  # of the mean diagonal, to choose from


class FedBack:
    """One matrix and its inputs. Outputs do not influence one another, so that some of them tell what all will cost."""

    def __init__(self, x: Array, key: str, inputs: Inputs, seed: int) -> None:
        self._x, self._inputs, self._seed = np.ascontiguousarray(x, np.float32), inputs, seed
        self._k = dither.noise(seed, key, 0, x.size).reshape(x.shape)
        self._largest = float(np.abs(x).max())
        self._tries = dither.tries_of(Source.held(self._x))
        count = x.shape[0] if inputs.axis == 1 else x.shape[1]
        self._some = np.linspace(0, count - 1, min(count, _OUTPUTS)).astype(int)

    def within(self, bits: float) -> Parts | None:
        """Payloads and facts of at most `bits` per element; None where no step keeps to them."""
        least, largest = 2.0**-20 * self._largest, 8.0 * self._largest
        aim, best = 0.99 * bits, None
        tried = [self._tried(self._inputs.damped_by(damp), aim, least, largest) for damp in _DAMPS]
        harm, step, inputs = min(tried, key=lambda one: one[0])
        if harm == float("inf"):
            return None
        for _ in range(5):
            parts, facts = self.at(step, inputs)
            spent = 8.0 * sum(map(len, parts.values())) / self._x.size
            if spent <= bits and (best is None or spent > best[0]):
                best = spent, (parts, facts)
            if 0.97 * bits <= spent <= bits or step >= largest:
                break
            aim = max(aim - (spent - 0.99 * bits), 1e-3 * bits)
            step = dither.solve(lambda step: self._rate(inputs, step), aim, least, largest)
        return best[1] if best else None

    def at(self, step: float, inputs: Inputs | None = None) -> Parts:
        """Payloads and facts with a given step."""
        turned = self._quantised(inputs or self._inputs.damped_by(1.0), step, None)[0]
        q, k = np.ascontiguousarray(self._inputs.turned(turned)).reshape(-1), self._k.reshape(-1)
        return dither.coded(self._x.shape, self._table(q), step, self._seed, lambda a, b: (q[a:b], k[a:b]))

    def _quantised(self, inputs: Inputs, step: float, some: Array | None) -> tuple[Array, Array, Array]:
        """(q with the sign of u folded in, k, errors in units of the step) of all outputs or of some, each a row."""
        matrix, k = (inputs.turned(m) for m in (self._x, self._k))
        if some is not None:
            matrix, k = matrix[some], k[some]
        u, scaled = dither.U.take(k), matrix.astype(np.float64) / step
        made = feed_back(scaled, inputs.upright(), lambda left, j: np.rint(left[0] + u[:, j]) - u[:, j])
        q = np.rint(made + u)
        q *= dither.SIGN.take(k)
        if inputs.axis == 1:  # rows of zeros, which are restored as such
            q[~matrix.any(axis=1)] = 0.0
        return q.astype(np.int64), k, made - scaled

    def _rate(self, inputs: Inputs, step: float) -> float:
        """Bits per element, by some outputs."""
        q, k, _ = self._quantised(inputs, step, self._some)
        buckets = dither.buckets_for(1)
        where = dither.contexts(k.reshape(-1), np.zeros(k.size, np.uint8), buckets)
        return integers.cost(integers.counted([lambda: (q.reshape(-1), where)], buckets), self._x.size) / self._x.size

    def _tried(self, inputs: Inputs, bits: float, least: float, largest: float) -> tuple[float, float, Inputs]:
        """(what some outputs lose at that rate, infinite where no step keeps to it; the step; `inputs`)."""
        step = dither.solve(lambda step: self._rate(inputs, step), bits, least, largest)
        if self._rate(inputs, step) > 1.05 * bits:
            return float("inf"), step, inputs
        return self._inputs.upright().harm(step * self._quantised(inputs, step, self._some)[2]), step, inputs

    def _table(self, q: Array) -> Classes:
        """Scale classes by what is coded, which feedback has made larger than the delta here and there."""
        k, found = self._k.reshape(-1), []
        for one in self._tries:
            n = dither.buckets_for(one.count)
            ranges = [slice(*r) for r in chunks(self._x.shape)]
            blocks = [lambda r=r, one=one, n=n: (q[r], dither.contexts(k[r], one.of(r.start, r.stop), n)) for r in ranges]
            size = 8.0 * len(dither.side_of(one)) + integers.cost(integers.counted(blocks, n * one.contexts), q.size)
            found.append((size, one))
        return min(found, key=lambda pair: pair[0])[1]
