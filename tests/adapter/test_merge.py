"""Adapters as deltas in recipes, and merging them in Core Space and KnOTS, against float64 references from the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import Pairs, dense, pairs, write_adapter
from helpers import llama, llama_tensors, read_checkpoint, recipe, run
from helpers import surgery as command

import surgery
from surgery.errors import Refused

core, lora_delta, ops = surgery.steps.core, surgery.steps.lora_delta, surgery.ops


@pytest.fixture
def two(tmp_path: Path) -> tuple[Any, Any, Pairs, Pairs]:
    one, other = pairs(1, rank=2), pairs(2, rank=3, targets=("self_attn.q_proj",))
    a = surgery.open(write_adapter(tmp_path / "a", one, lora_alpha=4))
    b = surgery.open(write_adapter(tmp_path / "b", other, lora_alpha=1.5))
    return a, b, one, other


def value(checkpoint: Any, name: str) -> np.ndarray:
    return checkpoint[name].compute().double().numpy()


def reference(found: list[tuple[np.ndarray, np.ndarray]], space: str, method: Any) -> np.ndarray:
    """METHODS: the published formulas, with full singular value decompositions. found: (s B, A) per adapter."""
    if space == "core":
        u = np.linalg.svd(np.hstack([b for b, _ in found]), full_matrices=False)[0]
        v = np.linalg.svd(np.vstack([a for _, a in found]), full_matrices=False)[2].T
        return u @ method([u.T @ b @ a @ v for b, a in found]) @ v.T
    u, s, vt = np.linalg.svd(np.hstack([b @ a for b, a in found]), full_matrices=False)
    keep = s > 1e-5
    u, s, vt = u[:, keep], s[keep], vt[keep]
    width = found[0][1].shape[1]
    return u @ method([s[:, None] * vt[:, i * width : (i + 1) * width] for i in range(len(found))])


def ties(parts: list[np.ndarray], density: float) -> np.ndarray:
    kept = []
    for x in parts:
        k = max(1, int(density * x.size))
        kept.append(np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-k], x, 0.0))
    sign = np.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [np.where(x * sign > 0, x, 0.0) for x in kept]
    count = sum((x != 0).astype(float) for x in agree)
    return sum(agree) / np.maximum(count, 1.0)


def scaled(one: Pairs, other: Pairs, module: str) -> list[tuple[np.ndarray, np.ndarray]]:
    (b, a), (d, c) = one[module], other[module]
    return [(2.0 * b.astype(float), a.astype(float)), (0.5 * d.astype(float), c.astype(float))]


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("weight", [[1.0, -1.0], [0.3, 0.7], [0.0, 2.0]])
def test_linear_methods_are_lossless(two: Any, space: str, weight: list[float]) -> None:
    a, b, one, other = two
    made = core(a, b, method="add", params={"weight": weight}, space=space)
    first, second = dense(one, 2.0), dense(other, 0.5)
    assert set(made) == set(first)
    for name in made:
        wanted = weight[0] * first[name] + weight[1] * second.get(name, 0.0)
        scale = max(np.abs(first[name]).max(), 1.0)
        np.testing.assert_allclose(value(made, name), wanted, atol=1e-6 * scale, rtol=0)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_ties_is_the_papers(two: Any, space: str) -> None:
    a, b, one, other = two
    made = core(a, b, method="ties", params={"density": 0.5, "trim": "tensor"}, space=space)
    for i in range(3):
        module = f"model.layers.{i}.self_attn.q_proj"
        wanted = reference(scaled(one, other, module), space, lambda parts: ties(parts, 0.5))
        np.testing.assert_allclose(value(made, f"{module}.weight"), wanted, atol=2e-5, rtol=1e-4)
        assert np.linalg.matrix_rank(wanted) <= 5


@pytest.mark.parametrize("method", ["tsv", "iso_c", "ties", "cart"])
@pytest.mark.parametrize("space", ["core", "knots"])
def test_the_result_is_low_rank_whatever_the_method(two: Any, method: str, space: str) -> None:
    a, b, _, _ = two
    made = core(a, b, method=method, space=space)
    for name in made:
        assert np.linalg.matrix_rank(value(made, name), tol=1e-4) <= 5
    assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in a.items()}


def test_factor_by_factor_is_not_merging(two: Any) -> None:
    """What merging B and A separately gives for weights [1, -1]: nothing like the difference."""
    rng = np.random.default_rng(0)
    (b, a), (d, c) = ((rng.standard_normal((64, 8)), rng.standard_normal((8, 64))) for _ in range(2))
    c, d = a + 0.1 * c, b + 0.1 * d
    wanted = b @ a - d @ c
    wrong = (b - d) @ (a - c)
    assert np.linalg.norm(wrong - wanted) > 0.9 * np.linalg.norm(wanted)


def test_core_results_can_be_computed_with(two: Any, tmp_path: Path) -> None:
    a, b, one, other = two
    base = surgery.open(llama(tmp_path / "base", 0, dtype=np.float32))
    merged = base + core(a, b, method="add", params={"weight": 0.5})
    first, second = dense(one, 1.0), dense(other, 0.25)
    for name, tensor in llama_tensors(0, dtype=np.float32).items():
        wanted = tensor + first.get(name, 0.0) + second.get(name, 0.0)
        np.testing.assert_allclose(value(merged, name), wanted, rtol=1e-5, atol=1e-5)


def test_a_core_of_cores(two: Any) -> None:
    a, b, _one, other = two
    inner = core(a, b, method="add")
    outer = core(inner, a, method="add", params={"weight": [1.0, -1.0]})
    for name, wanted in dense(other, 0.5).items():
        np.testing.assert_allclose(value(outer, name), wanted, atol=1e-5)


def test_recipes_run(tmp_path: Path) -> None:
    llama(tmp_path / "base", 0)
    one, other = pairs(1), pairs(2, rank=4)
    write_adapter(tmp_path / "a", one)
    write_adapter(tmp_path / "b", other, use_rslora=True)
    path = recipe(
        tmp_path,
        """
        first: {op: lora_delta, of: [base, a]}
        second: {op: lora_delta, of: [base, b]}
        both: {op: core, of: [first, second], method: ties, params: {density: 0.5, weight: [1, 0.5]}}
        deep: {op: lines, of: both, alpha: 0.1, beta: 0.9}
        out: {op: add, of: [base, deep], weight: 0.5}
        """,
        models=("base", "a", "b"),
    )
    run(path, tmp_path / "out")
    before, after = llama_tensors(0), read_checkpoint(tmp_path / "out")
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert changed == set(dense(one))
    config = (tmp_path / "out" / "config.json").read_text()
    assert "LlamaForCausalLM" in config and not (tmp_path / "out" / "adapter_config.json").exists()


def test_model_plus_lora_in_a_recipe(tmp_path: Path) -> None:
    llama(tmp_path / "base", 0)
    found, more = pairs(1), pairs(2)
    write_adapter(tmp_path / "a", found)
    write_adapter(tmp_path / "b", more)
    (tmp_path / "r.yaml").write_text("models: {m: base+a+b, base: base}\nsteps:\n  out: {op: lerp, of: [base, m], alpha: 0.5}\noutput: {from: out}\n")
    done = command("run", tmp_path / "r.yaml", "-o", tmp_path / "out", cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    after = read_checkpoint(tmp_path / "out")
    first, second = dense(found), dense(more)
    for name, tensor in llama_tensors(0).items():
        wanted = tensor.astype(float) + 0.5 * (first.get(name, 0.0) + second.get(name, 0.0))
        np.testing.assert_allclose(after[name].astype(float), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        "{op: ties, of: [a, b], density: 0.5}",
        "{op: dare, of: a, density: 0.5, seed: 1}",
        "{op: lines, of: a, alpha: 0.2, beta: 0.8}",
        "{op: scale, of: a, by: -1}",
        "{op: average, of: [a, b]}",
    ],
)
def test_adapters_are_deltas_for_every_operator(step: str, tmp_path: Path) -> None:
    llama(tmp_path / "base", 0)
    write_adapter(tmp_path / "a", pairs(1))
    write_adapter(tmp_path / "b", pairs(2, targets=("mlp.up_proj",)))
    models = ("base", "a", "b") if "b]" in step else ("base", "a")
    text = f"task: {step}\nout: {{op: add, of: [base, task]}}"
    run(recipe(tmp_path, text, models=models), tmp_path / "out")
    before, after = llama_tensors(0), read_checkpoint(tmp_path / "out")
    assert {n for n in before if before[n].tobytes() != after[n].tobytes()} == set(dense(pairs(1)))


def test_weights_and_unknown_methods_are_refused(two: Any, tmp_path: Path) -> None:
    a, b, _, _ = two
    base = surgery.open(llama(tmp_path / "base", 0))
    with pytest.raises(Refused, match="takes deltas"):
        core(base, a, method="add")
    with pytest.raises(Refused, match=r"`stock` is no operator on deltas"):
        core(a, b, method="stock").plan()
    with pytest.raises(Refused, match="no operator on deltas") as found:
        core(a, b, method="tie").plan()
    assert "ties" in str(found.value)
    with pytest.raises(Refused, match="no parameter `densty`"):
        core(a, b, method="ties", params={"densty": 0.5}).plan()
    with pytest.raises(Refused, match="space"):
        core(a, b, method="ties", space="cor")
    with pytest.raises(Refused, match="is not an adapter"):
        lora_delta(base, base)


def test_tensors_of_other_kinds_are_merged_as_they_are(tmp_path: Path) -> None:
    """Biases beside the factors take part in the same method, in the space of weights."""
    bias = {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": np.arange(8, dtype=np.float32)}
    a = surgery.open(write_adapter(tmp_path / "a", pairs(1), more=bias, lora_bias=True, lora_alpha=4))
    made = core(a, a, method="add", params={"weight": [1.0, 0.5]})
    np.testing.assert_allclose(value(made, "model.layers.0.self_attn.q_proj.bias"), 2.0 * 1.5 * np.arange(8))
