"""Operators computed block by block give the bytes that they give piece by piece, and that numpy gives without kernels."""

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import write_file

import surgery
import surgery.ops as ops
from surgery.engine import blocks
from surgery.engine.blocks import Blocks
from surgery.ops import fast
from surgery.ops.blocks import Magnitudes, Squares
from surgery.ops.statistics import gram, l1

pytest.importorskip("numba")
SHAPES = {"pieces": (1100, 520), "rows": (97, 688), "vector": (5000,), "filters": (40, 3, 5, 5), "one": (), "none": (0, 7)}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def models(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[Any]:
    """A base and three fine-tunes: deltas of few distinct values, with zeros, some tensors of some equal to the base's."""
    folder, rng = tmp_path_factory.mktemp("blocks"), np.random.default_rng(3)
    kind = ml_dtypes.bfloat16 if request.param == "bfloat16" else np.float16
    base = {name: rng.standard_normal(shape).astype(np.float32) * np.float32(0.02) for name, shape in SHAPES.items()}
    made = []
    for i in range(4):
        tensors = {}
        for name, x in base.items():
            step = rng.standard_normal(x.shape).astype(np.float32) * np.float32(0.002 if i else 0.0)
            moved = np.where(rng.random(x.shape) < 0.9, step, 0) if i != 2 or name != "vector" else 0
            tensors[name] = np.asarray(x.astype(kind).astype(np.float32) + moved, kind)
        write_file(folder / f"m{i}" / "model.safetensors", tensors)
        made.append(surgery.open(folder / f"m{i}"))
    return made


def merged(models: list[Any], name: str) -> Any:
    """A merge of every way to compute in blocks: with and without statistics, nested, of rows and of elements."""
    base, *tuned = models
    t = [m - base for m in tuned]
    dare = [ops.dare(t[0], density=0.3, seed=1), ops.dare(t[1], density=0.5, rescale="l1"), ops.dare(t[2], density=1.0)]
    della = [ops.della(t[0], density=0.4), ops.della(t[1], density=0.6, rescale="l1", seed=2), ops.della(t[2], rescale="none")]
    crumbs = [
        ops.breadcrumbs(t[0], density=0.7, gamma=0.05),
        ops.breadcrumbs(t[1], density=0.3, rescale="l1"),
        ops.breadcrumbs(t[2], density=1e-9),
        ops.breadcrumbs(t[0], density=0.5, gamma=0.0),
        ops.breadcrumbs(t[0], density=1.0),
    ]
    parts = {
        "dare": dare,
        "della": della,
        "breadcrumbs": crumbs,
        "ties": [
            ops.ties(t, density=0.3),
            ops.ties(t, density=[0.2, 1.0, 0.5], weight=[0.5, 1.0, -0.3], like="mergekit"),
            ops.ties(t[:2], density=0.4, elect="count", like="peft", normalize=False),
        ],
        "sce": [ops.sce(t, topk=0.3), ops.sce(t), ops.sce(t[:2], topk=0.98), ops.sce(t, topk=0.0), ops.sce(t[:1], topk=0.5)],
        "nested": [ops.ties([*della, *dare], density=0.5, like="mergekit"), ops.ties(crumbs[:3], density=0.6)],
    }[name]
    return ops.add(base, *parts, weight=[0.4 / len(parts)] * len(parts))


@pytest.mark.parametrize("name", ["dare", "della", "breadcrumbs", "ties", "sce", "nested"])
def test_same_bytes(models: list[Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["surgery.ops.select"], "_WHOLE", 1 << 15)  # thresholds of large tensors are bracketed
    used = []

    def counted(self: Blocks, *args: Any) -> Any:
        used.append(output(self, *args))
        return used[-1]

    def saved(label: str, **params: Any) -> bytes:
        merged(models, name).save(tmp_path / label, dtype="bfloat16", **params)
        return (tmp_path / label / "model.safetensors").read_bytes()

    output = Blocks.output
    monkeypatch.setattr(fast, "_loaded", None)
    fast.load()
    monkeypatch.setattr(Blocks, "output", counted)
    want = saved("blocks", threads=2)
    assert any(used) and False not in used  # none: rows of one element
    monkeypatch.setattr(blocks, "BLOCK", 1 << 13)
    assert saved("small", threads=1) == want
    monkeypatch.setattr(Blocks, "of", staticmethod(lambda *a, **k: None))
    monkeypatch.setattr(Blocks, "of_sum", staticmethod(lambda *a, **k: None))
    used.clear()
    assert saved("pieces", threads=1) == want and not used
    monkeypatch.setattr(fast, "_loaded", None)
    assert saved("plain", threads=1) == want


@pytest.mark.parametrize("op", ["dare", "ties", "sce", "breadcrumbs"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(op: str, bad: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["surgery.ops.select"], "_WHOLE", 64)
    rng = np.random.default_rng(0)
    for i in range(3):
        x = rng.standard_normal(70_000).astype(ml_dtypes.bfloat16)
        if i == 2:
            x[69_999] = bad
        write_file(tmp_path / f"m{i}" / "model.safetensors", {"w": x})
    base, a, b = (surgery.open(tmp_path / f"m{i}") for i in range(3))
    fast.load()
    made = ops.registry[op](*([a - base, b - base] if op in ("ties", "sce") else [b - base]), **({"topk": 0.5} if op == "sce" else {}))
    with pytest.raises(surgery.Refused, match=r"m2.*`w` holds.*flat index 69999"):
        (base + made).save(tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20, 0.0])
@pytest.mark.parametrize("size", [0, 5, 4096, 20_000])
def test_sums_of_blocks_are_sums(size: int, scale: float) -> None:
    fast.load()
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32) * np.float32(scale)
    magnitudes, squares = Magnitudes(), Squares()
    for start in range(0, size, 8192):
        magnitudes.add(x[start : start + 8192])
        squares.add(x[start : start + 8192])
    assert magnitudes.total == l1(x)
    assert squares.total == gram([x])[0, 0]


def test_a_model_wide_statistic_comes_after_those_of_all_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for i in range(3):
        write_file(
            tmp_path / f"m{i}" / "model.safetensors",
            {name: rng.standard_normal(60).astype(np.float32) for name in ("a", "b", "c")},
        )
    base, one, two = (surgery.open(tmp_path / f"m{i}") for i in range(3))
    sparse = ops.dare(one - base, density=0.5, rescale="l1")
    made = ops.ties(sparse, two - base, density=0.5, trim="global")
    made.save(tmp_path / "out")
    xs = [{n: d[n].compute().double().numpy() for n in "abc"} for d in (sparse, two - base)]
    limits = [np.sort(np.abs(np.concatenate([*x.values()])))[-90] for x in xs]
    out = surgery.open(tmp_path / "out")
    for name in "abc":
        kept = [np.where(np.abs(x[name]) >= limit, x[name], 0) for x, limit in zip(xs, limits, strict=True)]
        sign = np.where(sum(kept) >= 0, 1, -1)
        agree = [k * sign > 0 for k in kept]
        mean = sum(k * a for k, a in zip(kept, agree, strict=True)) / np.maximum(sum(agree), 1)
        np.testing.assert_allclose(out[name].compute().numpy(), mean, atol=1e-6)
