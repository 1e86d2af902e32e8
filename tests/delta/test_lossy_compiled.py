"""The compiled loops of the lossy codecs give the bytes that numpy gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from surgery.delta.lossy import compiled, dither, rans

kernels = pytest.importorskip("surgery.delta.lossy.rans_kernels", reason="needs numba (pip install '.[fast]')")


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], list[Any]]:
    def run(make: Callable[[], Any]) -> list[Any]:
        made = []
        for loaded in (False, kernels):
            monkeypatch.setattr(compiled, "_loaded", loaded)
            made.append(make())
        return made

    return run


@pytest.mark.parametrize(
    ("count", "contexts", "symbols", "skew"), [(70_000, 7, 200, 0.02), (5000, 4, 9, 1.0), (33, 3, 5, 2.0), (1, 1, 1, 0.0)]
)
def test_entropy_coder(both: Any, count: int, contexts: int, symbols: int, skew: float) -> None:
    rng = np.random.default_rng(0)
    c, p = rng.integers(0, contexts, count).astype(np.uint8), np.exp(-skew * np.arange(symbols))
    s = rng.choice(symbols, count, p=p / p.sum()).astype(np.uint8)
    s[c == 0] = 3 % symbols  # a context of one symbol alone
    tables = rans.Tables.fit(rans.count(s, c, contexts))
    plain, fast = both(lambda: rans.encode(s, c, tables))
    assert plain == fast
    for found in both(lambda: rans.decode(plain, c, tables)):
        np.testing.assert_array_equal(found, s)


def test_damaged_streams_are_refused(both: Any) -> None:
    rng = np.random.default_rng(1)
    s, c = rng.integers(0, 9, 3000).astype(np.uint8), np.zeros(3000, np.uint8)
    tables = rans.Tables.fit(rans.count(s, c, 1))
    stream = rans.encode(s, c, tables)

    def refused(damaged: bytes) -> bool:
        try:
            return not np.array_equal(rans.decode(damaged, c, tables), s)
        except ValueError:
            return True

    for cut in (2, 4, 100):
        assert both(lambda cut=cut: refused(stream[:-cut])) == [True, True]
    for at in rng.integers(2, len(stream), 100):
        damaged = bytearray(stream)
        damaged[at] ^= 1 << int(rng.integers(8))
        assert both(lambda d=bytes(damaged): refused(d)) == [True, True]


@pytest.mark.parametrize("step", [1e-3, 0.3, 7.0])
def test_quantiser(both: Any, step: float) -> None:
    rng = np.random.default_rng(2)
    d, k = rng.standard_normal(10_000).astype(np.float32), rng.integers(0, 256, 10_000).astype(np.uint8)
    plain, fast = both(lambda: dither.quantise(d, k, step))
    np.testing.assert_array_equal(plain, fast)
    plain, fast = (made.tobytes() for made in both(lambda: dither.restore(plain, k, step)))
    assert plain == fast


def test_small_work_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", None)
    monkeypatch.setattr(compiled, "_done", 0)
    assert compiled.kernels(1000) is None and compiled._loaded is None
    assert compiled.kernels(1 << 23) is kernels
    monkeypatch.setattr(compiled, "_loaded", None)
    monkeypatch.setenv("SURGERY_KERNELS", "0")
    assert compiled.kernels(1 << 23) is None and compiled.kernels(1) is None
