"""Deltas that are read in ranges: the same bytes as from memory, in bounded memory, and refusals of what cannot be bounded."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BF16, surgery, write_checkpoint
from test_lossy_codecs import CASES, heavy

from surgery.delta import spool
from surgery.delta.codecs.base import LOSSY, lossy_codec
from surgery.delta.lossy.common import rows_of
from surgery.delta.lossy.source import Source
from surgery.delta.lossy.ternary import Largest

STREAMING = [(n, o) for n, o in CASES if getattr(lossy_codec(n), "streams", False)]
every = pytest.mark.parametrize(("name", "options"), STREAMING, ids=[f"{n}-{o}"[:50] for n, o in STREAMING])


def ranged(x: np.ndarray) -> Source:
    """The array in ranges; every read is a fresh copy, and nothing else of it can be had."""
    flat = x.reshape(-1)
    return Source(x.shape, lambda a, b: flat[a:b].copy())


def test_elementwise_codecs_stream() -> None:
    plain = {"dither", "dare", "sign", "ternary", "group", "hadamard", "nf4", "quantile", "sparse", "plain", "two_level"}
    assert {n for n, _ in STREAMING} == plain
    assert all(
        codec.streams or codec.matrix or name.startswith(("hybrid", "sparse24", "round", "sum", "vq")) for name, codec in LOSSY.items()
    )


@every
@pytest.mark.parametrize("shape", [(96, 80), (7, 3, 11), (1, 1), (3, 2, 2, 5)], ids=str)
def test_ranges_give_the_same_bytes(name: str, options: dict, shape: tuple[int, ...]) -> None:
    x = heavy(shape)
    codec = lossy_codec(name)
    held, streamed = (codec.encode(d, key="t", **options) for d in (x, ranged(x)))
    assert {n: bytes(p) for n, p in held.parts.items()} == {n: bytes(p) for n, p in streamed.parts.items()}
    assert held.facts == streamed.facts


@every
def test_large_payloads_lie_on_disk_and_are_the_same(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy((600, 300))
    codec = lossy_codec(name)
    held = codec.encode(x, key="t", **options)
    monkeypatch.setattr(spool, "HELD", 256)
    spooled = codec.encode(x, key="t", **options)
    assert any(isinstance(p, spool.Spool) for p in spooled.parts.values())
    assert {n: bytes(p) for n, p in held.parts.items()} == {n: bytes(p) for n, p in spooled.parts.items()}
    a, b = (codec.decode(c, x.shape, "t", 70_001, 99_999) for c in (held, spooled))
    np.testing.assert_array_equal(a, b)


def test_memory_is_bounded() -> None:
    """Two million elements more are 8 MB more as float32: a codec's memory hardly grows beyond what it writes."""

    def read(a: int, b: int) -> np.ndarray:
        i = np.arange(a, b, dtype=np.uint32) * np.uint32(2654435761)
        return (i >> 8).astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)

    for name, options in [("dither", {"step": 3.0}), ("sign", {}), ("group", {"bits": 2}), ("ternary", {"density": 0.01})]:
        peaks = []
        for rows in (512, 1536):
            tracemalloc.start()
            coded = lossy_codec(name).encode(Source((rows, 2048), read), key="t", measure=False, **options)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] - peaks[0] < 2e6 + 3 * coded.nbytes, (name, peaks)
        assert lossy_codec(name).room((128_256, 8192)) < 1e9


@pytest.mark.parametrize("density", [1e-6, 0.01, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["heavy", "ties", "zeros", "few"])
def test_the_largest_are_those_of_a_stable_sort(kind: str, density: float) -> None:
    x = {
        "heavy": heavy((80, 60)),
        "ties": np.round(heavy((80, 60)), 4),
        "zeros": np.zeros((80, 60), np.float32),
        "few": np.where(np.arange(4800).reshape(80, 60) % 97 == 0, np.float32(-3), np.float32(0)),
    }[kind].astype(np.float32)
    keep = max(1, round(density * x.size))
    expected = np.zeros(x.size, bool)
    expected[np.argsort(-np.abs(x.reshape(-1)), kind="stable")[:keep]] = True
    np.testing.assert_array_equal(Largest(Source.held(x), density).mask(x.reshape(-1), 0), expected)


def test_ties_are_counted_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.delta.lossy import common

    monkeypatch.setattr(common, "CHUNK", 64)
    x = np.ones((10, 60), np.float32)
    top = Largest(Source.held(x), 0.25)  # 150 of 600 that are all the same
    made = np.concatenate([top.mask(x.reshape(-1)[a:b], a) for a, b in common.chunks(x.shape)])
    assert made[:150].all() and not made[150:].any()


def wide(folder: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    base = {"model.layers.0.a.weight": rng.standard_normal((300, 400)).astype(BF16)}
    tuned = {n: (v.astype(np.float32) + 1e-2 * rng.standard_normal(v.shape)).astype(BF16) for n, v in base.items()}
    return write_checkpoint(folder / "base", base), write_checkpoint(folder / "tuned", tuned)


def test_matrix_codecs_state_their_need_and_refuse_before_they_begin(tmp_path: Path) -> None:
    base, tuned = wide(tmp_path)
    out = tmp_path / "x.delta.safetensors"
    common: list[Any] = ["delta", "pack", "--base", base, "--model", tuned, "-o", out, "--memory", "5MB"]
    found = surgery(*common, "--codec", "svd_wf", "--bits", "1")
    assert found.returncode == 2 and len(found.stderr.strip().splitlines()) <= 2
    assert "`model.layers.0.a.weight` (300 × 400): svd_wf/1 holds whole matrices and needs about 0.00" in found.stderr
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
    assert surgery(*common, "--codec", "dither", "--bits", "1").returncode == 0


def test_stated_needs_are_near_the_truth() -> None:
    shape = (200, 260)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for name, options in [("svd_wf", {"bits": 1.0}), ("lowrank", {"rank": 9}), ("delta_come", {"bits": 1.0})]:
        codec = lossy_codec(name)
        tracemalloc.start()
        codec.encode(x, key="t", **options)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 0.3 * peak < codec.room(rows_of(shape)) < 4 * peak, (name, peak)
