"""How tensors are dealt out to tasks: without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import plan, recipe, surgery, trio

from surgery.cluster import batches
from surgery.errors import Refused

DELTAS = "da: {op: diff, of: [a, base]}\ndb: {op: diff, of: [b, base]}\n"


def test_every_item_once_in_order_and_of_about_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "SMALLEST", 1)
    items = [(i, 1 + i % 7) for i in range(1000)]
    total = sum(work for _, work in items)
    made = list(batches.dealt(items, 4, total))
    assert [i for batch in made for i in batch] == list(range(1000))
    loads = [sum(1 + i % 7 for i in batch) for batch in made]
    assert 32 <= len(made) <= 34 and max(loads) <= total // 32 and min(loads[:-1]) > total // 32 - 7


def test_small_models_are_few_tasks_and_large_ones_not_too_large() -> None:
    assert len(list(batches.dealt([(i, 1000) for i in range(500)], 8, 500_000))) == 1
    huge = [(i, 10**9) for i in range(2000)]
    assert max(len(b) for b in batches.dealt(huge, 4, 2 * 10**12)) == batches.LARGEST // 10**9


def test_matrix_operators_weigh_what_they_take_and_fit_memory_by_fewer_threads(tmp_path: Path) -> None:
    trio(tmp_path, hidden=256, depth=1)
    made = plan(recipe(tmp_path, DELTAS + "t: {op: tsv, of: [da, db]}\nout: {op: add, of: [base, t]}"))
    matrix = next(p for p in made.programs if p.name.endswith("up_proj.weight"))
    assert matrix.whole and batches.work_of(matrix) == 5 * 4 * matrix.nbytes  # three reads and a write, 256 wide
    one = batches.fitting(made, [matrix], 1, 10**12, "x")[1]
    two = batches.fitting(made, [matrix], 2, 10**12, "x")[1]
    assert batches.fitting(made, [matrix], 8, two, "x") == (2, two) and two > one
    with pytest.raises(Refused, match=r"x: `model.layers.0.mlp.up_proj.weight` needs .* of one process"):
        batches.fitting(made, [matrix], 8, one - 1, "x")


def test_the_command_line_without_a_cluster(tmp_path: Path) -> None:
    """In a process of its own: no address, no cluster on this machine that it could know of."""
    trio(tmp_path, depth=1)
    path = recipe(tmp_path, "out: {op: average, of: [base, a, b]}")
    done = surgery("run", path, "-o", tmp_path / "out", "--engine", "ray", "--address", "127.0.0.1:1")
    assert done.returncode == 2 and "no cluster at 127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr
    done = surgery("run", path, "-o", tmp_path / "out", "--address", "127.0.0.1:1")
    assert done.returncode == 2 and "add --engine ray" in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
