"""Low-rank expressions: the same bits however they are cut, and the right numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import dense, pairs, write_adapter
from helpers import BF16, llama, read_checkpoint, recipe, run, write_file
from hypothesis import given
from hypothesis import strategies as st

import surgery
from surgery.adapter import lowrank
from surgery.adapter.lowrank import Factor, LowRank, Stacked
from surgery.adapter.values import Values
from surgery.adapter.weights import Dora, RowsReplaced
from surgery.checkpoint.source import open_source
from surgery.graph.expr import Read


def stored(folder: Path, **arrays: np.ndarray) -> dict[str, Read]:
    source = open_source(str(write_file(folder / "x.safetensors", arrays)))
    return {name: Read(source, tensor, None) for name, tensor in source.tensors.items()}


def in_pieces(expr: lowrank.Derived, cuts: list[int], work: type) -> np.ndarray:
    values = Values([expr])
    edges = sorted({0, expr.numel, *(c % (expr.numel + 1) for c in cuts)})
    fetch = values.fetch(wide=work is np.float64)
    found = [np.array(expr.piece(fetch, a, b, work)).reshape(-1) for a, b in itertools.pairwise(edges)]
    values.close()
    return np.concatenate(found) if found else np.empty(0, work)


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[lowrank.Derived, np.ndarray]]:
    """name -> (expression, its value in float64)."""
    rng = np.random.default_rng(5)
    b, a = rng.standard_normal((150, 5)).astype(np.float32), rng.standard_normal((5, 33)).astype(np.float32)
    sb, sa = rng.standard_normal((7, 2 * 3)).astype(BF16), rng.standard_normal((2 * 3, 4)).astype(BF16)
    w = rng.standard_normal((150, 33)).astype(np.float32)
    wt = np.ascontiguousarray(w.T)
    m, rows = rng.uniform(0.5, 2, 150).astype(np.float32), rng.standard_normal((2, 33)).astype(np.float32)
    x = stored(tmp_path_factory.mktemp("some"), b=b, a=a, sb=sb, sa=sa, w=w, wt=wt, m=m, rows=rows)
    plain = LowRank(Factor.rows_of(x["b"]), Factor.columns_of(x["a"]), 0.7, None)
    turned = LowRank(Factor.columns_of(x["a"]), Factor.rows_of(x["b"]), 0.7, None)
    lines = [Factor(x["sb"], 7, 2, 6, 3, e) for e in range(3)]
    columns = [Factor(x["sa"], 4, 2, 1, 4, e * 8) for e in range(3)]
    experts = [LowRank(i, j, 2.0, None) for i, j in zip(lines, columns, strict=True)]
    ba = b.astype(float) @ a.astype(float) * 0.7
    tuned = w + ba
    table = w.astype(float).copy()
    table[[140, 3]] = rows
    stack = np.einsum("ore,eri->eoi", sb.astype(float).reshape(7, 2, 3), sa.astype(float).reshape(3, 2, 4)) * 2.0
    return {
        "plain": (plain, ba),
        "turned": (turned, ba.T),
        "stacked": (Stacked(experts, experts[0].dtype, None), stack),
        "a part of rows": (LowRank(lines[1].part(2, 3), columns[1], 2.0, None), stack[1, 2:5]),
        "dora": (Dora(x["w"], plain, x["m"], None, transposed=False), tuned * (m / np.linalg.norm(tuned, axis=1))[:, None]),
        "rows replaced": (RowsReplaced(x["w"], x["rows"], [140, 3], None), table),
    }


NAMES = ["plain", "turned", "stacked", "a part of rows", "dora", "rows replaced"]


@pytest.mark.parametrize("name", NAMES)
@given(cuts=st.lists(st.integers(0, 10**6), max_size=6))
def test_the_bits_do_not_depend_on_the_cut(name: str, some: dict[str, tuple[lowrank.Derived, np.ndarray]], cuts: list[int]) -> None:
    expr, wanted = some[name]
    for work, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        whole = in_pieces(expr, [], work)
        np.testing.assert_allclose(whole.reshape(wanted.shape), wanted, rtol=tolerance, atol=tolerance)
        assert in_pieces(expr, cuts, work).tobytes() == whole.tobytes()


def test_rows_longer_than_a_tile(
    some: dict[str, tuple[lowrank.Derived, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "COLUMNS", 8)
    expr, wanted = some["plain"]
    whole = in_pieces(expr, [], np.float32)
    np.testing.assert_allclose(whole.reshape(wanted.shape), wanted, rtol=1e-5, atol=1e-5)
    assert in_pieces(expr, [5, 20, 33 * 70 + 9, 33 * 70 + 30, 4000], np.float32).tobytes() == whole.tobytes()


def test_dora_of_a_zero_row_is_zero_and_transposed_norms_run_over_columns(tmp_path: Path) -> None:
    w = np.array([[3.0, 0.0], [4.0, 0.0]], np.float32)
    x = stored(tmp_path, w=w, b=np.zeros((2, 1), np.float32), a=np.ones((1, 2), np.float32), m=np.array([10.0, 5.0], np.float32))
    low = LowRank(Factor.rows_of(x["b"]), Factor.columns_of(x["a"]), 1.0, None)
    across = in_pieces(Dora(x["w"], low, x["m"], None, transposed=False), [], np.float32).reshape(2, 2)
    np.testing.assert_array_equal(across, [[10.0, 0.0], [5.0, 0.0]])
    down = Dora(x["w"], low, x["m"], None, transposed=True)
    assert down.whole
    np.testing.assert_allclose(in_pieces(down, [], np.float32).reshape(2, 2), [[6.0, 0.0], [8.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float64])
def test_every_storage_type(dtype: type, tmp_path: Path) -> None:
    found = pairs(1, dtype=dtype)
    delta = surgery.open(write_adapter(tmp_path / "a", found, lora_alpha=3))
    for name, wanted in dense(found, 1.5).items():
        tensor = delta[name].compute()
        assert tensor.dtype == (torch.float64 if dtype is np.float64 else torch.float32)
        np.testing.assert_allclose(tensor.numpy(), wanted, rtol=1e-12 if dtype is np.float64 else 2e-6, atol=1e-5)


def test_threads_and_shards_do_not_change_the_bytes(tmp_path: Path) -> None:
    llama(tmp_path / "base", 0, hidden=32)
    write_adapter(tmp_path / "a", pairs(1, hidden=32))
    path = recipe(tmp_path, "out: {op: add, of: [base, a], weight: 0.3}", models=("base", "a"))
    run(path, tmp_path / "one", threads=1)
    run(path, tmp_path / "two", threads=2)
    one, two = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two")
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in two.items()}
