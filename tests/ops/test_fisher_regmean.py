"""Fisher averaging and RegMean against their formulas in float64, their properties, and how their statistics reach them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BF16, llama, read_checkpoint, recipe, run, write_file
from hypothesis import given
from hypothesis import strategies as st

import surgery
import surgery.ops as ops
from surgery.ops.regmean import input_axis, solve
from surgery.statistics.manifest import Manifest

SHAPES = [(), (1,), (0,), (7,), (5, 3), (0, 3), (4, 3, 3, 3), (70, 90)]


def tensors(seed: int, shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


# -- Fisher ------------------------------------------------------------------------------------------------------------


def fisher_reference(
    ws: list[np.ndarray], fs: list[np.ndarray], lam: list[float], floor: float, norm: bool
) -> np.ndarray:
    above, below = np.zeros(np.shape(ws[0])), np.zeros(np.shape(ws[0]))
    for w, f, a in zip(ws, fs, lam, strict=True):
        size = math.sqrt(math.fsum((f * f).reshape(-1))) if norm else 1.0
        c = a / (size or 1.0) * np.maximum(f, floor)
        above += c * w
        below += c
    return above / below


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_fisher(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ws = tensors(1, shape, 3, dtype)
    for scale in (1.0, 1e-7, 1e4, 0.0):
        fs = [f.double().square().mul(scale).float() for f in tensors(2, shape, 3)]
        for lam, floor, norm in (([1.0] * 3, 1e-6, False), ([0.2, 0.0, 3.0], 1e-9, True), ([1.0, 2.0, 3.0], 0.5, True)):
            made = ops.registry["fisher"](*ws, *fs, weight=lam, floor=floor, normalize=norm)
            expected = fisher_reference([w.double().numpy() for w in ws], [f.double().numpy() for f in fs], lam, floor, norm)
            np.testing.assert_allclose(made.double().numpy(), expected, rtol=0, atol=1e-5)


def test_fisher_follows_the_one_that_knows_and_averages_equals() -> None:
    a, b = tensors(3, (20, 30), 2)
    ones, nothing = torch.ones(20, 30), torch.zeros(20, 30)
    fisher = ops.registry["fisher"]
    torch.testing.assert_close(fisher(a, b, ones * 1e9, nothing, floor=1e-12), a)
    torch.testing.assert_close(fisher(a, b, ones, ones), (a + b) / 2)
    assert torch.equal(fisher(a, a, ones * 0.3, ones * 7), a)
    assert torch.equal(fisher(a, torch.rand(20, 30)), a)
    torch.testing.assert_close(fisher(a, b, ones, 5 * ones, normalize=True), (a + b) / 2)


# -- RegMean -----------------------------------------------------------------------------------------------------------


def gram(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.T @ x / len(x)).float()


def regmean_reference(ws: list[np.ndarray], gs: list[np.ndarray], a: float) -> np.ndarray:
    """The published closed form, by a general solver, without our ridge and our shift by the mean."""
    shrunk = [a * g + (1 - a) * np.diag(np.diag(g)) for g in gs]
    return np.linalg.solve(sum(shrunk), sum(g @ w.T for g, w in zip(shrunk, ws, strict=True))).T


def data(seed: int, rows: int, n: int) -> np.ndarray:
    """Inputs with correlated features of different sizes."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, n)) @ rng.standard_normal((n, n)) * np.logspace(-1, 1, n)


@pytest.mark.parametrize("m,n", [(6, 4), (4, 6), (5, 5), (1, 3), (3, 1), (40, 64)])
@pytest.mark.parametrize("a", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_regmean(m: int, n: int, a: float, dtype: torch.dtype) -> None:
    ws = tensors(5, (m, n), 3, dtype)
    gs = [gram(data(i, 5 * n, n)) for i in range(3)]
    made = ops.registry["regmean"](*ws, *gs, a=a)
    assert made.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = regmean_reference([w.double().numpy() for w in ws], [g.double().numpy() for g in gs], a)
    np.testing.assert_allclose(made.double().numpy(), expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("n", [4, 6])
def test_weights_stored_in_by_out_need_no_transposition(n: int) -> None:
    """GPT-2's Conv1D: recognised by size, or where square by the Gram's third axis."""
    ws = [w.T.contiguous() for w in tensors(6, (6, n), 2)]
    gs = [gram(data(i, 50, n)) for i in range(2)]
    expected = regmean_reference([w.T.double().numpy() for w in ws], [g.double().numpy() for g in gs], 0.9).T
    marked = ops.registry["regmean"](*ws, *[g[:, :, None] for g in gs])
    np.testing.assert_allclose(marked.numpy(), expected, rtol=0, atol=1e-4)
    if n != 6:
        assert torch.equal(ops.registry["regmean"](*ws, *gs), marked)


def test_which_axis_a_gram_speaks_of() -> None:
    assert input_axis((6, 4), (4, 4)) == 1 and input_axis((4, 6), (4, 4)) == 0
    assert input_axis((4, 4), (4, 4)) == 1 and input_axis((4, 4), (4, 4, 1)) == 0
    for shape, bad in (((6, 4), (5, 5)), ((6, 4), (4, 6)), ((6, 4), (4, 4, 1)), ((4,), (4, 4)), ((6, 4), (4, 4, 2)), ((), ())):
        assert input_axis(shape, bad) is None


def test_one_model_is_returned_and_equal_grams_give_the_mean() -> None:
    a, b = tensors(7, (12, 9), 2)
    g, regmean = gram(data(1, 40, 9)), ops.registry["regmean"]
    assert torch.equal(regmean(a, g), a)
    assert torch.equal(regmean(a, a, g, gram(data(2, 40, 9))), a)
    torch.testing.assert_close(regmean(a, b, g, g), (a + b) / 2, rtol=1e-6, atol=1e-6)


def test_outputs_that_can_all_be_kept_are() -> None:
    """Two models on inputs from orthogonal subspaces: one weight reproduces both; the average reproduces neither."""
    rng = np.random.default_rng(8)
    a, b = tensors(8, (7, 10), 2)
    xa, xb = np.zeros((60, 10)), np.zeros((60, 10))
    xa[:, :5], xb[:, 5:] = rng.standard_normal((60, 5)), rng.standard_normal((60, 5))
    made = ops.registry["regmean"](a, b, gram(xa), gram(xb), a=1.0).double().numpy()
    for x, w in ((xa, a), (xb, b)):
        wanted = x @ w.double().numpy().T
        assert np.linalg.norm(x @ made.T - wanted) < 1e-4 * np.linalg.norm(wanted)
        assert np.linalg.norm(x @ ((a + b) / 2).double().numpy().T - wanted) > 0.3 * np.linalg.norm(wanted)


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 8))
def test_no_other_weight_keeps_the_outputs_better(seed: int, m: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    xs = [data(seed + i, 3 * n, n) for i in range(3)]
    ws = [rng.standard_normal((m, n)) for _ in xs]

    def loss(w: np.ndarray) -> float:
        return sum(float(np.square(x @ w.T - x @ v.T).sum()) for x, v in zip(xs, ws, strict=True))

    grams = [torch.from_numpy(x.T @ x) for x in xs]
    made = ops.registry["regmean"](*map(torch.from_numpy, ws), *grams, a=1.0, ridge=0.0).numpy()
    for _ in range(5):
        step = rng.standard_normal((m, n))
        assert loss(made) <= loss(made + 1e-3 * step) * (1 + 1e-9) and loss(made) <= loss(made - 1e-3 * step) * (1 + 1e-9)
    assert all(loss(made) <= loss(w) for w in (*ws, sum(ws) / 3))


def test_what_no_data_speaks_of_is_the_mean() -> None:
    a, b = tensors(9, (6, 8), 2)
    xs = [data(i, 30, 8) for i in range(2)]
    for x in xs:
        x[:, [2, 5]] = 0  # features that never occur
    mean = (a + b) / 2
    for ridge in (1e-6, 0.0):
        made = ops.registry["regmean"](a, b, *map(gram, xs), ridge=ridge)
        torch.testing.assert_close(made[:, [2, 5]], mean[:, [2, 5]], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(made, mean, atol=1e-3)
    nothing = torch.zeros(8, 8)
    torch.testing.assert_close(ops.registry["regmean"](a, b, nothing, nothing), mean)


def test_fewer_tokens_than_features_stay_finite_and_keep_what_was_seen() -> None:
    """With a = 1 the Gram matrices have no full rank, and all outputs that were seen can be kept."""
    a, b = tensors(10, (20, 50), 2)
    xs = [data(i, 10, 50) for i in range(2)]
    for shrink in (0.5, 0.9, 1.0):
        made = ops.registry["regmean"](a, b, *map(gram, xs), a=shrink)
        assert torch.isfinite(made).all() and float(made.abs().max()) < 500
    for x, w in zip(xs, (a, b), strict=True):
        wanted = x @ w.double().numpy().T
        assert np.linalg.norm(x @ made.double().numpy().T - wanted) < 0.01 * np.linalg.norm(wanted)


def test_solve_falls_back_to_the_least_norm() -> None:
    """The second and third features are one and the same, the fourth never occurs."""
    matrix = torch.tensor([[2.0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    right = torch.tensor([[1.0], [2.0], [2.0], [0.0]], dtype=torch.float64)
    made = solve(matrix, right, 0.0)
    np.testing.assert_allclose(made.numpy().ravel(), [0.5, 1.0, 1.0, 0.0], atol=1e-12)
    assert solve(torch.full((2, 2), math.nan).double(), torch.ones(2, 1).double(), 0.0).isnan().all()


def test_wrong_inputs_are_refused() -> None:
    a, b = tensors(11, (6, 4), 2)
    g, regmean, fisher = torch.eye(4), ops.registry["regmean"], ops.registry["fisher"]
    for bad in (torch.eye(5), torch.ones(4, 6), torch.ones(6, 4)):
        with pytest.raises(ValueError, match="shape"):
            regmean(a, b, g, bad)
    for op in (regmean, fisher):
        with pytest.raises(ValueError, match=r"one .* statistics checkpoint"):
            op(a, b, a)
    with pytest.raises(ValueError, match="sum to zero"):
        fisher(a, b, a, b, weight=0.0)
    with pytest.raises(ValueError, match=r"2 inputs|weight"):
        fisher(a, b, a, b, weight=[1.0, 2.0, 3.0])


def test_inputs_are_left_alone() -> None:
    ws, gs = tensors(12, (6, 4), 2, torch.float64), [gram(data(i, 20, 4)).double() for i in range(2)]
    before = [x.clone() for x in (*ws, *gs)]
    ops.registry["regmean"](*ws, *gs)
    ops.registry["fisher"](*ws, *ws)
    assert all(torch.equal(x, y) for x, y in zip((*ws, *gs), before, strict=True))


# -- as inputs of recipes ----------------------------------------------------------------------------------------------


def statistics(folder: Path, kind: str, tensors: dict[str, np.ndarray], content: str = "") -> Path:
    write_file(folder / "model.safetensors", tensors)
    Manifest(kind, 4, 40, 10, 0, model={"source": "elsewhere", "content": content} if content else {}).write(folder)
    return folder


def world(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Two small bf16 models, Grams for their matrices outside the embeddings, Fishers for everything."""
    made: dict[str, dict[str, np.ndarray]] = {}
    for i, name in enumerate("ab"):
        made[name] = read_checkpoint(llama(folder / name, i))
        rng = np.random.default_rng(20 + i)
        grams, fishers = {}, {}
        for key, w in made[name].items():
            fishers[key] = np.square(rng.standard_normal(w.shape)).astype(np.float32)
            if w.ndim == 2 and "proj" in key:
                grams[key] = gram(data(i, 60, w.shape[1])).numpy()
        made[f"g{name}"], made[f"f{name}"] = grams, fishers
        statistics(folder / f"g{name}", "gram", grams)
        statistics(folder / f"f{name}", "fisher", fishers)
    return made


def test_regmean_in_a_recipe(tmp_path: Path) -> None:
    made = world(tmp_path)
    run(recipe(tmp_path, "m: {op: regmean, of: [a, b, ga, gb], a: 0.8}", models=("a", "b", "ga", "gb"), output="{from: m}"), tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == made["a"].keys()
    for key, w in found.items():
        assert w.dtype == BF16
        pair = [made[m][key].astype(np.float64) for m in "ab"]
        if key in made["ga"]:
            expected = regmean_reference(pair, [made[g][key].astype(np.float64) for g in ("ga", "gb")], 0.8)
            assert not np.allclose(expected, sum(pair) / 2, atol=0.05)
        else:
            expected = sum(pair) / 2
        np.testing.assert_allclose(w.astype(np.float64), expected, rtol=2**-8, atol=1e-5)
    a, b, ga, gb = (surgery.open(tmp_path / n) for n in ("a", "b", "ga", "gb"))
    eager = ops.regmean([a, b, ga, gb], a=0.8)
    key = "model.layers.1.mlp.up_proj.weight"
    direct = ops.regmean(*[c[key].compute() for c in (a, b, ga, gb)], a=0.8)
    assert torch.equal(eager[key].compute(), direct.bfloat16())
    assert "mean for 6 tensors without statistics" in str(eager.plan())


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher_in_a_recipe_with_deltas(tmp_path: Path, normalize: bool) -> None:
    """Over the whole model, of deltas: base + fisher(a - base, b - base) is fisher(a, b)."""
    made = world(tmp_path)
    llama(tmp_path / "base", 5)
    said = f"weight: [1.0, 2.0], normalize: {str(normalize).lower()}"
    steps = f"""da: {{op: diff, of: [a, base]}}
    db: {{op: diff, of: [b, base]}}
    t: {{op: fisher, of: [da, db, fa, fb], {said}}}
    m: {{op: add, of: [base, t]}}"""
    run(recipe(tmp_path, steps, models=("base", "a", "b", "fa", "fb"), output="{from: m, dtype: float32}"), tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    norms = [math.sqrt(sum(float(np.square(f.astype(np.float64)).sum()) for f in made[n].values())) for n in ("fa", "fb")]
    for key, w in found.items():
        pair = [made[m][key].astype(np.float64) for m in "ab"]
        fs = [np.maximum(made[f][key].astype(np.float64), 1e-6) for f in ("fa", "fb")]
        lam = [c / (n if normalize else 1.0) for c, n in zip((1.0, 2.0), norms, strict=True)]
        expected = sum(c * f * x for c, f, x in zip(lam, fs, pair, strict=True)) / sum(c * f for c, f in zip(lam, fs, strict=True))
        np.testing.assert_allclose(w, expected, rtol=0, atol=1e-5)


def test_a_tensor_without_statistics_gets_the_weighted_mean(tmp_path: Path) -> None:
    made = world(tmp_path)
    key = "model.norm.weight"
    del made["fb"][key]
    statistics(tmp_path / "fb", "fisher", made["fb"])
    a, b, fa, fb = (surgery.open(tmp_path / n) for n in ("a", "b", "fa", "fb"))
    merged = ops.fisher([a, b, fa, fb], weight=[1.0, 3.0], normalize=True)
    expected = 0.25 * made["a"][key].astype(np.float64) + 0.75 * made["b"][key].astype(np.float64)
    np.testing.assert_allclose(merged[key].compute().double().numpy(), expected, rtol=2**-8)
    assert "mean for 1 tensors" in str(merged.plan())


def test_a_deselected_tensor_of_a_delta_counts_as_zero(tmp_path: Path) -> None:
    made = world(tmp_path)
    llama(tmp_path / "base", 5)
    base, a, b, ga, gb = (surgery.open(tmp_path / n) for n in ("base", "a", "b", "ga", "gb"))
    merged = ops.regmean([(a - base).drop("*q_proj*"), b - base, ga, gb])
    key = "model.layers.0.self_attn.q_proj.weight"
    delta = made["b"][key].astype(np.float64) - read_checkpoint(tmp_path / "base")[key].astype(np.float64)
    expected = regmean_reference([delta * 0, delta], [made[g][key].astype(np.float64) for g in ("ga", "gb")], 0.9)
    np.testing.assert_allclose(merged[key].compute().double().numpy(), expected, rtol=0, atol=1e-4)


def test_statistics_that_do_not_fit_are_refused_at_plan(tmp_path: Path) -> None:
    made = world(tmp_path)
    a, b, ga, gb, fa = (surgery.open(tmp_path / n) for n in ("a", "b", "ga", "gb", "fa"))
    for inputs, words in (
        ([a, b, ga], "2 models and 1 statistics"),
        ([a, ga, b, gb], "models, then one gram statistics"),
        ([ga, gb, a, b], "models, then one gram statistics"),
        ([a, b], "2 models and 0 statistics"),
        ([a, b, ga, fa], "fa holds fisher"),
    ):
        with pytest.raises(surgery.Refused, match=words):
            ops.regmean(inputs)
    with pytest.raises(surgery.Refused, match="`ga` is statistics"):
        ops.slerp(a, ga, t=0.5)
    with pytest.raises(surgery.Refused, match="`ga` is statistics"):
        ops.ties([a - b, ga])
    key = next(iter(made["gb"]))
    statistics(tmp_path / "wrong", "gram", made["gb"] | {key: np.eye(5, dtype=np.float32)})
    with pytest.raises(surgery.Refused, match=r"wrong: .*q_proj.*shape \[8, 8\].*\[5, 5\]"):
        ops.regmean([a, b, ga, surgery.open(tmp_path / "wrong")]).plan()
    statistics(tmp_path / "strange", "gram", {"h.0.w": np.eye(8, dtype=np.float32)})
    with pytest.raises(surgery.Refused, match="no tensor of the models has statistics in strange"):
        ops.regmean([a, b, ga, surgery.open(tmp_path / "strange")]).plan()
    statistics(tmp_path / "half", "gram", {key: made["gb"][key].astype(np.float16)})
    with pytest.raises(surgery.Refused, match="gram statistics are F32, F64"):
        ops.regmean([a, b, ga, surgery.open(tmp_path / "half")]).plan()


def test_statistics_of_other_weights_are_refused(tmp_path: Path) -> None:
    from surgery.checkpoint.source import open_source
    from surgery.statistics.manifest import content_digest

    made = world(tmp_path)
    llama(tmp_path / "base", 5)
    for name in "ab":
        statistics(tmp_path / f"g{name}", "gram", made[f"g{name}"], content_digest(open_source(str(tmp_path / name))))
    base, a, b, ga, gb = (surgery.open(tmp_path / n) for n in ("base", "a", "b", "ga", "gb"))
    ops.regmean([a, b, ga, gb]).plan()
    ops.regmean([a - base, b - base, ga, gb * 2.0]).plan()
    with pytest.raises(surgery.Refused, match=r"gb was collected from other weights .elsewhere. than those of a"):
        ops.regmean([a, b, gb, ga]).plan()


def test_nan_in_statistics_is_refused_by_name(tmp_path: Path) -> None:
    made = world(tmp_path)
    key = "model.layers.2.mlp.up_proj.weight"
    for prefix, op in (("g", "regmean"), ("f", "fisher")):
        bad = {k: v.copy() for k, v in made[f"{prefix}b"].items()}
        bad[key][1, 2] = np.nan
        statistics(tmp_path / "bad", "gram" if prefix == "g" else "fisher", bad)
        a, b, good, spoilt = (surgery.open(tmp_path / n) for n in ("a", "b", f"{prefix}a", "bad"))
        with pytest.raises(surgery.Refused, match=r"bad: `model\.layers\.2\.mlp\.up_proj\.weight` holds NaN"):
            getattr(ops, op)([a, b, good, spoilt]).save(tmp_path / f"out-{op}")


def test_a_foreign_statistics_json_is_no_statistics_checkpoint(tmp_path: Path) -> None:
    llama(tmp_path / "m", 1)
    (tmp_path / "m" / "statistics.json").write_text(json.dumps({"mean": 0.1}))
    assert surgery.open(tmp_path / "m").space == "weights"
    for broken, words in (({"format": "surgery-statistics/9"}, "surgery-statistics/9"), ({"format": "surgery-statistics/1"}, "kind")):
        (tmp_path / "m" / "statistics.json").write_text(json.dumps(broken))
        with pytest.raises(surgery.Refused, match=words):
            surgery.open(tmp_path / "m")
