"""Which tensors spectral operators take as matrices, odd matrices, and whole runs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spectral_reference as reference
import torch
from helpers import (
    BF16,
    llama,
    llama_config,
    llama_tensors,
    plan,
    read_checkpoint,
    recipe,
    run,
    same,
    surgery,
    write_checkpoint,
)

import surgery.ops as ops
from surgery.errors import Refused
from surgery.graph.expr import Read, walk
from surgery.ops.eager import apply_to_tensors
from surgery.ops.matrices import is_matrix

MERGERS = ("tsv", "iso_c", "iso_cts", "cart", "knots", "wudi", "wudi_solve")
SINGLE = ("tsv_compress", "truncate_rank")
mergers = pytest.mark.parametrize("name", MERGERS)
everything = pytest.mark.parametrize("name", [*MERGERS, "svc"])
QUICK: dict[str, dict[str, Any]] = {"wudi": {"steps": 3}, "knots": {"density": 1.0}}


def draw(shape: tuple[int, ...], count: int = 3, kind: Any = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape) + count)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(kind) for _ in range(count)]


@pytest.mark.parametrize(
    ("shape", "depth", "largest", "expected"),
    [
        ((4, 5), None, 16384, True),
        ((32000, 64), None, 16384, False),  # an embedding
        ((64, 32000), None, 16384, False),
        ((32000, 64), (0, 2), 16384, True),  # inside a block it is a matrix however long
        ((32000, 64), None, 32000, True),
        ((4, 5), None, 0, False),
        ((4, 5), (1, 2), 0, True),
        ((7,), (0, 2), 16384, False),
        ((), None, 16384, False),
        ((0, 4), None, 16384, False),
        ((8, 32, 16), None, 16384, True),  # stacked experts
        ((8, 32, 15), (0, 2), 16384, False),  # a convolution over time
        ((1, 197, 768), None, 16384, False),  # position embeddings
        ((16, 16, 3, 3), (0, 2), 16384, False),
    ],
)
def test_what_is_a_matrix(shape: tuple[int, ...], depth: Any, largest: float, expected: bool) -> None:
    assert is_matrix(shape, depth, largest) is expected


@mergers
@pytest.mark.parametrize("shape", [(7,), (1,), (), (0,), (0, 4), (6, 5, 3), (4, 3, 3, 3)], ids=str)
def test_other_tensors_get_the_mean(name: str, shape: tuple[int, ...]) -> None:
    deltas = draw(shape)
    expected = sum(deltas) / 3
    if name == "knots":
        expected = ops.ties(*deltas, density=1.0, trim="tensor")
    made = ops.registry[name](*deltas, **QUICK.get(name, {}))
    torch.testing.assert_close(made, expected)
    for alone in SINGLE:
        assert torch.equal(ops.registry[alone](deltas[0]), deltas[0])
    assert torch.equal(ops.svc(*deltas), deltas[0])


def test_long_tensors_outside_blocks_get_the_mean() -> None:
    deltas = draw((12, 6))
    mean = sum(deltas) / 3
    torch.testing.assert_close(ops.tsv(*deltas, largest=11), mean)
    torch.testing.assert_close(ops.tsv(*deltas, largest=0, alpha=2.0), 2 * mean)
    inside = apply_to_tensors(ops.registry["tsv"], deltas, {"largest": 0}, depth=(0, 3))
    assert torch.equal(inside, ops.tsv(*deltas)) and not torch.allclose(inside, mean)
    assert torch.equal(ops.truncate_rank(deltas[0], rank=1, largest=3), deltas[0])


@everything
def test_stacked_experts_are_merged_one_by_one(name: str) -> None:
    deltas = draw((3, 20, 16))
    made = ops.registry[name](*deltas, **QUICK.get(name, {}))
    for e in range(3):
        assert torch.equal(made[e], ops.registry[name](*[d[e] for d in deltas], **QUICK.get(name, {})))


ODD = {
    "one element": lambda: draw((1, 1)),
    "one row": lambda: draw((1, 9)),
    "one column": lambda: draw((9, 1)),
    "fewer rows than deltas": lambda: draw((2, 9)),
    "zeros": lambda: [torch.zeros(6, 5)] * 3,
    "one is zeros": lambda: [torch.zeros(6, 5), *draw((6, 5), 2)],
    "all the same": lambda: draw((6, 5), 1) * 3,
    "they cancel": lambda: [(x := draw((6, 5), 1)[0]), -x, torch.zeros(6, 5)],
    "rank one": lambda: [torch.outer(a, b) for a, b in zip(draw((6,)), draw((5,)), strict=True)],
    "ones": lambda: [torch.ones(6, 5)] * 3,
    "identities": lambda: [torch.eye(6)] * 3,
    "tiny": lambda: [x * 1e-30 for x in draw((6, 5))],
    "denormal": lambda: [x * 1e-42 for x in draw((6, 5))],
    "huge": lambda: [x * 1e30 for x in draw((6, 5))],
    "half": lambda: draw((6, 5), kind=torch.bfloat16),
    "double, far apart": lambda: [x * f for x, f in zip(draw((6, 5), kind=torch.float64), (1e-150, 1.0, 1e150), strict=True)],
}


@everything
@pytest.mark.parametrize("odd", ODD)
def test_odd_matrices(name: str, odd: str) -> None:
    deltas = ODD[odd]()
    made = ops.registry[name](*deltas, **QUICK.get(name, {}))
    assert made.shape == deltas[0].shape and torch.isfinite(made).all()
    bound = sum(float(d.double().norm()) for d in deltas)
    limit = 60 * bound if name == "svc" else (3 * bound + (3.1e-5 if name == "wudi" else 0))
    assert float(made.double().norm()) <= limit * (1 + 1e-6)
    if odd == "zeros":
        assert not made.any()


def test_a_matrix_with_fewer_rows_than_deltas_is_not_lost() -> None:
    """r < T makes k zero: by the formula nothing would be left."""
    deltas = draw((2, 9))
    torch.testing.assert_close(ops.tsv(*deltas), sum(deltas) / 3)
    assert not reference.tsv([d.double().numpy() for d in deltas]).any()


def test_a_zero_delta_takes_its_share_of_the_rank_and_nothing_else() -> None:
    a, b = draw((8, 8), 2)
    made = ops.tsv(a, b, torch.zeros(8, 8)).double().numpy()
    u = [np.linalg.svd(x.double().numpy()) for x in (a, b)]
    left = reference.polar(np.hstack([p[0][:, :2] for p in u]))
    right = reference.polar(np.vstack([p[2][:2] for p in u]))
    expected = left @ np.diag(np.concatenate([p[1][:2] for p in u])) @ right
    np.testing.assert_allclose(made, expected, atol=1e-5)


@everything
def test_what_is_not_finite_stays_visible(name: str) -> None:
    deltas = draw((6, 5))
    deltas[1][2, 3] = torch.nan
    deltas[2][0, 0] = torch.inf
    made = ops.registry[name](*deltas, **QUICK.get(name, {}))
    assert made[2, 3].isnan() and made[0, 0].isnan()
    assert int(made.isnan().sum()) == 2 and not made.isinf().any()


def test_memory_alignment_does_not_matter() -> None:
    deltas = draw((50, 40), kind=torch.float64)
    for name in ("tsv", "iso_c", "wudi_solve"):
        expected = ops.registry[name](*deltas)
        for shift in (1, 3):
            moved = []
            for d in deltas:
                room = torch.empty(d.numel() + shift, dtype=d.dtype)
                room[shift:] = d.reshape(-1)
                moved.append(room[shift:].reshape(d.shape))
            function = ops.registry[name].function
            params = ops.registry[name].complete({})
            assert torch.equal(function(moved, **params), expected)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("tsv_compress", {"ratio": 0.0}, "ratio"),
        ("tsv_compress", {"ratio": 1.5}, "ratio"),
        ("iso_cts", {"common": 1.1}, "common"),
        ("cart", {"share": 0.0}, "share"),
        ("svc", {"alpha": 0.0}, "alpha"),
        ("wudi", {"steps": -1}, "steps"),
        ("wudi_solve", {"ridge": -0.1}, "ridge"),
        ("truncate_rank", {"rank": -1}, "rank"),
        ("truncate_rank", {"energy": 2}, "energy"),
        ("knots", {"inner": "mean", "weight": [1, -1]}, "sum to zero"),
        ("knots", {"density": [0.1]}, "density"),
        ("svc", {"n": 1}, "no parameter"),
    ],
)
def test_bad_parameters(name: str, params: dict[str, Any], message: str) -> None:
    count = 1 if name in SINGLE else 2
    with pytest.raises(ValueError, match=message):
        ops.registry[name](*draw((4, 4), count), **params)


# -- whole runs --------------------------------------------------------------------------------------------------------


def numbers(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    return tensors[name].astype(np.float64)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 48 units and 40 tokens, and three fine-tunes of it."""
    folder = tmp_path_factory.mktemp("family")
    base = llama_tensors(0, hidden=48, vocab=40)
    config = llama_config(3, hidden=48, vocab=40)
    for i, name in enumerate(("base", "a", "b", "c")):
        noise = llama_tensors(i, hidden=48, vocab=40)
        tensors = {n: (x.astype(np.float32) + (0.1 * noise[n].astype(np.float32) if i else 0)).astype(BF16) for n, x in base.items()}
        write_checkpoint(folder / name, tensors, config=config)
    return folder


TASKS = "\n".join(f"d{m}: {{op: diff, of: [{m}, base]}}" for m in "abc")


def merge(folder: Path, step: str, out: Path, **options: Any) -> dict[str, np.ndarray]:
    steps = f"{TASKS}\ntask: {{{step}}}\nmerged: {{op: add, of: [base, task]}}"
    path = recipe(folder, steps, models=("base", "a", "b", "c"), output="{from: merged}")
    run(path, out, **options)
    return read_checkpoint(out)


def test_surgery_run_tsv(family: Path, tmp_path: Path) -> None:
    steps = f"{TASKS}\ntask: {{op: tsv, of: [da, db, dc], alpha: 0.9, largest: 16}}\nmerged: {{op: add, of: [base, task]}}"
    path = recipe(family, steps, models=("base", "a", "b", "c"), output="{from: merged}")
    planned = surgery("plan", path)
    assert planned.returncode == 0 and "TSV" in planned.stdout, planned.stderr
    done = surgery("run", path, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    made = read_checkpoint(tmp_path / "out")
    base, *tuned = (read_checkpoint(family / n) for n in ("base", "a", "b", "c"))
    assert made.keys() == base.keys()
    for name, value in made.items():
        deltas = [numbers(t, name) - numbers(base, name) for t in tuned]
        inside = ".layers." in name and value.ndim == 2
        delta = 0.9 * (reference.tsv(deltas) if inside else sum(deltas) / 3)
        exact = numbers(base, name) + delta
        assert value.dtype == BF16
        np.testing.assert_allclose(value.astype(np.float64), exact, rtol=2**-7, atol=1e-6)
        assert (value != exact.astype(BF16)).mean() < 2e-3, name  # off only where the exact value lies all but midway
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 48


@pytest.mark.parametrize("name", [*MERGERS, "svc"])
def test_runs_do_not_depend_on_threads(family: Path, tmp_path: Path, name: str) -> None:
    more = "".join(f", {k}: {v}" for k, v in QUICK.get(name, {}).items())
    one, two = (
        merge(family, f"op: {name}, of: [da, db, dc]{more}", tmp_path / str(threads), threads=threads) for threads in (1, 4)
    )
    same(one, two)
    base = read_checkpoint(family / "base")
    assert any((one[n] != base[n]).any() for n in base)


def test_numbers_may_vary_over_the_model(family: Path, tmp_path: Path) -> None:
    made = merge(family, 'op: tsv, of: [da, db, dc], alpha: {"*mlp*": 0, "*": [0, 1]}', tmp_path / "out")
    base = read_checkpoint(family / "base")
    changed = {n for n in base if (made[n] != base[n]).any()}
    assert changed and not any("mlp" in n or "layers.0." in n for n in changed)


def test_a_run_in_float64(family: Path, tmp_path: Path) -> None:
    steps = f"{TASKS}\ntask: {{op: iso_cts, of: [da, db, dc]}}"
    path = recipe(family, steps, models=("base", "a", "b", "c"), output="{from: task, precision: float64, dtype: float64}")
    run(path, tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    base, *tuned = (read_checkpoint(family / n) for n in ("base", "a", "b", "c"))
    name = "model.layers.1.mlp.up_proj.weight"
    expected = reference.iso_cts([numbers(t, name) - numbers(base, name) for t in tuned])
    np.testing.assert_allclose(made[name], expected, atol=1e-10)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", ["op: tsv, of: [da, db]", "op: svc, of: [da, db]", "op: knots, of: [da, db]"])
def test_nan_is_refused_by_name(tmp_path: Path, step: str, value: float) -> None:
    for seed, name in enumerate(("base", "a")):
        llama(tmp_path / name, seed)
    bad = llama_tensors(2)
    bad["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    write_checkpoint(tmp_path / "b", bad, config=llama_config())
    steps = f"da: {{op: diff, of: [a, base]}}\ndb: {{op: diff, of: [b, base]}}\nt: {{{step}}}\nout: {{op: add, of: [base, t]}}"
    with pytest.raises(Refused, match=r"b: `model.layers.1.mlp.up_proj.weight` holds (NaN|infinity)"):
        run(recipe(tmp_path, steps), tmp_path / "out")


def test_spaces_and_counts_are_checked_in_the_plan(family: Path, tmp_path: Path) -> None:
    for step, message in (("op: tsv, of: [a, b]", "takes deltas"), ("op: svc, of: [da]", "2 or more")):
        with pytest.raises(Refused, match=message):
            merge(family, step, tmp_path / "out")


def test_the_plan_knows_what_is_no_matrix(family: Path) -> None:
    """Norms and embeddings are sums that stream in pieces; the rest is computed as a whole."""
    plain = {"model.embed_tokens.weight", "lm_head.weight"}
    for step in ("op: tsv, of: [da, db, dc], largest: 16", "op: svc, of: [da, db, dc], largest: 16"):
        steps = f"{TASKS}\ntask: {{{step}}}\nmerged: {{op: add, of: [base, task]}}"
        made = plan(recipe(family, steps, models=("base", "a", "b", "c"), output="{from: merged}"))
        streamed = {p.name for p in made.programs if not p.whole}
        assert streamed == plain | {n for n in made.by_name if "norm" in n}
    alone = made.by_name["model.embed_tokens.weight"].expr
    assert {e.source.label for e in walk([alone]) if isinstance(e, Read)} == {"a"}  # base + (a - base)
