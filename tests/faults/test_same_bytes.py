"""One recipe, every way of spreading the work: the same tensors, and for equal shard sizes the same files."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from helpers import all_bytes, read_checkpoint, recipe, run, same, trio

from surgery.engine import pieces

DELTAS = "da: {op: diff, of: [a, base]}\ndb: {op: diff, of: [b, base]}\n"
RECIPES = {
    "average": "out: {op: average, of: [base, a, b], weight: [1, 2, 3]}",
    "ties": DELTAS + "t: {op: ties, of: [da, db], density: 0.3}\nout: {op: add, of: [base, t]}",
    "ties_global": DELTAS + "t: {op: ties, of: [da, db], density: 0.3, trim: global}\nout: {op: add, of: [base, t]}",
    "dare": DELTAS + "d: {op: dare, of: da, density: 0.4, seed: 7}\nout: {op: add, of: [base, d, db]}",
    "slerp": "s: {op: slerp, of: [a, b], t: 0.3}\nout: {op: average, of: [base, s]}",
    "stock": "out: {op: stock, of: [base, a, b]}",
}
THREADS, SEGMENTS, SHARDS = (1, 2, 8), (1, 3, 16), ("30kB", "100kB", "5GB")


@pytest.mark.parametrize("op", RECIPES)
def test_bytes_do_not_depend_on_how_the_work_is_spread(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """threads x runs of pieces that a worker takes at a time x shard sizes. Small pieces throughout, so that there are many."""
    monkeypatch.setattr(pieces, "PIECE", 1 << 10)
    trio(tmp_path, hidden=64, vocab=307, depth=2)
    first: Path | None = None
    for shards in SHARDS:
        path = recipe(tmp_path, RECIPES[op], output=f"{{from: out, shard_size: {shards}}}")
        files = None
        for threads, segment in product(THREADS, SEGMENTS):
            monkeypatch.setattr(pieces, "SEGMENT", segment)
            out = tmp_path / f"{shards}-{threads}-{segment}"
            run(path, out, threads=threads)
            files = files or all_bytes(out)
            assert all_bytes(out) == files, (shards, threads, segment)
            first = first or out
        same(read_checkpoint(out), read_checkpoint(first))
    counts = {len(list((tmp_path / f"{s}-1-1").glob("*.safetensors"))) for s in SHARDS}
    assert len(counts) == 3 and 1 in counts
