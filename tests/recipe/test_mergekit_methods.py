"""What mergekit's merge methods come to: against their formulas in float64, written here from the definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import HIDDEN, VOCAB, llama, llama_config, llama_tensors, plan, read_checkpoint, run, write_checkpoint

from surgery.ops import registry
from surgery.recipe.mergekit.lower import _LOWERINGS
from surgery.recipe.mergekit.methods import METHODS
from surgery.recipe.mergekit.read import read_dialect

Array = np.ndarray
AB = "models:\n  - {model: a, parameters: {weight: 0.7}}\n  - {model: b, parameters: {weight: 0.4}}\n"
PLAIN = "models: [{model: a}, {model: b}]\n"
BASE = "base_model: base\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, and a and b near it, so that angles and deltas are those of fine-tunes."""
    folder = tmp_path_factory.mktemp("methods")
    base = llama_tensors(0, dtype=np.float32)
    write_checkpoint(folder / "base", base, config=llama_config())
    for seed, name in ((1, "a"), (2, "b"), (3, "c")):
        noise = llama_tensors(seed, dtype=np.float32)
        tuned = {n: (v + 0.1 * noise[n]).astype(np.float32) for n, v in base.items()}
        write_checkpoint(folder / name, tuned, config=llama_config())
    return folder


def ran(folder: Path, out: Path, text: str) -> dict[str, Array]:
    path = folder / f"{out.name}.yaml"
    path.write_text(text)
    run(path, out, overwrite=True)
    return read_checkpoint(out)


def trimmed(delta: Array, density: float) -> Array:
    flat = np.abs(delta).ravel()
    kept = np.argsort(-flat, kind="stable")[: max(1, int(density * flat.size))]
    mask = np.zeros(flat.size, bool)
    mask[kept] = True
    return np.where(mask.reshape(delta.shape), delta, 0.0)


def breadcrumbs(delta: Array, density: float, gamma: float) -> Array:
    flat = np.abs(delta).ravel()
    n, kept, top = flat.size, int(density * flat.size), int(gamma * flat.size)
    bottom = max(0, n - kept - top)
    mask = np.zeros(n, bool)
    mask[np.argsort(flat, kind="stable")[bottom : bottom + kept]] = True
    return np.where(mask.reshape(delta.shape), delta, 0.0)


def elected(deltas: list[Array], weights: list[float], normalize: bool) -> Array:
    scaled = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = np.where(sum(scaled) >= 0, 1.0, -1.0)
    agree = [np.sign(s) == sign for s in scaled]
    total = sum(np.where(k, s, 0.0) for k, s in zip(agree, scaled, strict=True))
    share = sum(np.where(k, w, 0.0) for k, w in zip(agree, weights, strict=True))
    return total / np.where(share == 0, 1.0, share) if normalize else total


def slerp(a: Array, b: Array, t: float) -> Array:
    cos = float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    theta = np.arccos(np.clip(cos, -1, 1))
    if theta < 1e-4:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def stock(base: Array, models: list[Array]) -> Array:
    x, y = ((m - base).ravel() for m in models)
    cos = float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    t = np.clip(2 * cos / (1 + cos), 0, 1)
    return t * sum(models) / 2 + (1 - t) * base


def rescaled(delta: Array, kept: Array) -> Array:
    return kept * np.abs(delta).sum() / np.abs(kept).sum()


# name -> (recipe, formula of (base, a, b))
FORMULAS: dict[str, tuple[str, Callable[[Array, Array, Array], Array]]] = {
    "linear": ("merge_method: linear\n" + AB, lambda o, a, b: (0.7 * a + 0.4 * b) / 1.1),
    "linear_sum": ("merge_method: linear\nparameters: {normalize: false}\n" + AB, lambda o, a, b: 0.7 * a + 0.4 * b),
    "linear_with_base": ("merge_method: linear\nparameters: {weight: 1}\n" + BASE + PLAIN, lambda o, a, b: (o + a + b) / 3),
    "passthrough": ("merge_method: passthrough\nmodels: [{model: a}]\n", lambda o, a, b: a),
    "passthrough_scaled": ("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 0.5}}]\n", lambda o, a, b: a / 2),
    "slerp": ("merge_method: slerp\nparameters: {t: 0.3}\n" + BASE + "models: [{model: a}, {model: base}]\n",
              lambda o, a, b: slerp(o, a, 0.3)),
    "nuslerp": ("merge_method: nuslerp\n" + AB, lambda o, a, b: slerp(a, b, 0.4 / 1.1)),
    "nuslerp_with_base": ("merge_method: nuslerp\n" + BASE + AB, lambda o, a, b: o + slerp(a - o, b - o, 0.4 / 1.1)),
    "multislerp_of_one": ("merge_method: multislerp\nmodels: [{model: a, parameters: {weight: 3}}]\n", lambda o, a, b: a),
    "task_arithmetic": ("merge_method: task_arithmetic\n" + BASE + AB, lambda o, a, b: o + 0.7 * (a - o) + 0.4 * (b - o)),
    "task_arithmetic_lambda": ("merge_method: task_arithmetic\nparameters: {lambda: 0.5, normalize: true}\n" + BASE + AB,
                               lambda o, a, b: o + 0.5 * (0.7 * (a - o) + 0.4 * (b - o)) / 1.1),
    "task_arithmetic_lambda_sum": ("merge_method: task_arithmetic\nparameters: {lambda: 0.5}\n" + BASE + AB,
                                   lambda o, a, b: o + 0.5 * (0.7 * (a - o) + 0.4 * (b - o))),
    "base_alone": ("merge_method: ties\nmodels: [{model: base}]\n" + BASE, lambda o, a, b: o),
    "ties": ("merge_method: ties\nparameters: {density: 0.4}\n" + BASE + AB,
             lambda o, a, b: o + elected([trimmed(a - o, 0.4), trimmed(b - o, 0.4)], [0.7, 0.4], True)),
    "ties_rescaled": ("merge_method: ties\nparameters: {density: 0.4, rescale: true, lambda: 2}\n" + BASE + AB,
                      lambda o, a, b: o + 2 * elected([rescaled(d, trimmed(d, 0.4)) for d in (a - o, b - o)], [0.7, 0.4], True)),
    "dare_ties_at_density_1": ("merge_method: dare_ties\n" + BASE + AB,
                               lambda o, a, b: o + elected([a - o, b - o], [0.7, 0.4], False)),
    "breadcrumbs": ("merge_method: breadcrumbs\nparameters: {density: 0.5, gamma: 0.1}\n" + BASE + AB,
                    lambda o, a, b: o + 0.7 * breadcrumbs(a - o, 0.5, 0.1) + 0.4 * breadcrumbs(b - o, 0.5, 0.1)),
    "breadcrumbs_ties": ("merge_method: breadcrumbs_ties\nparameters: {density: 0.5, gamma: 0.1}\n" + BASE + AB,
                         lambda o, a, b: o + elected([breadcrumbs(d, 0.5, 0.1) for d in (a - o, b - o)], [0.7, 0.4], False)),
    "nearswap": ("merge_method: nearswap\nparameters: {t: 0.05}\n" + BASE + "models: [{model: a}]\n",
                 lambda o, a, b: o + np.clip(0.05 / np.maximum(np.abs(o - a), 1e-6), 0, 1) * (a - o)),
    "model_stock": ("merge_method: model_stock\n" + BASE + PLAIN, lambda o, a, b: stock(o, [a, b])),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_method_is_its_formula(models: Path, tmp_path: Path, name: str) -> None:
    text, formula = FORMULAS[name]
    made = ran(models, tmp_path / name, text)
    inputs = [read_checkpoint(models / m) for m in ("base", "a", "b")]
    for tensor, value in made.items():
        wanted = formula(*(i[tensor].astype(np.float64) for i in inputs))
        np.testing.assert_allclose(value, wanted, rtol=3e-6, atol=3e-7, err_msg=tensor)


MINIMAL = {
    "slerp": "parameters: {t: 0.5}\n" + BASE + "models: [{model: a}]\n",
    "nearswap": "parameters: {t: 0.5}\n" + BASE + "models: [{model: a}]\n",
    "arcee_fusion": BASE + "models: [{model: a}]\n",
    "passthrough": "models: [{model: a}]\n",
    "linear": AB, "nuslerp": AB, "multislerp": AB, "karcher": PLAIN,
    **dict.fromkeys(("sce", "ram", "ramplus_tl", "model_stock"), BASE + PLAIN),
    **dict.fromkeys(
        ("task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"),
        BASE + "parameters: {density: 0.6}\n" + AB,
    ),
}  # fmt: skip


def test_there_is_a_recipe_for_every_method() -> None:
    assert MINIMAL.keys() == METHODS.keys() == _LOWERINGS.keys() and len(METHODS) == 20


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("method", MINIMAL)
def test_every_method_runs_and_converts(models: Path, tmp_path: Path, method: str, compat: bool) -> None:
    """The converted recipe is made of registered operators and writes the same tensors."""
    text = f"merge_method: {method}\n{MINIMAL[method]}" + ("compat: mergekit\n" if compat else "")
    path = models / f"{method}.yaml"
    path.write_text(text)
    made = ran(models, tmp_path / method, text)
    read = read_dialect(path, {})
    assert read is not None
    native = models / f"native_{method}.yaml"
    native.write_text(read.native(models))
    assert all(said["op"] in registry for said in read.draft.steps.values())
    run(native, tmp_path / "native")
    again = read_checkpoint(tmp_path / "native")
    assert made.keys() == again.keys()
    for name, value in made.items():
        assert value.tobytes() == again[name].tobytes(), name
        assert np.isfinite(value).all()


def test_dare_restores_the_l1_norm_only_in_compat(models: Path, tmp_path: Path) -> None:
    text = "merge_method: dare_linear\nparameters: {density: 0.4, weight: 1}\n" + BASE + "models: [{model: a}]\n"
    base, a = (read_checkpoint(models / m) for m in ("base", "a"))
    name = "model.embed_tokens.weight"
    delta = a[name].astype(np.float64) - base[name]
    for compat, more in ((True, "compat: mergekit\n"), (False, "")):
        made = ran(models, tmp_path / f"dare{compat}", text + more)[name].astype(np.float64) - base[name]
        kept = np.abs(made) > 1e-9
        assert 0 < kept.sum() < kept.size
        ratio = np.abs(delta).sum() / np.abs(delta[kept]).sum() if compat else 1 / 0.4
        np.testing.assert_allclose(made[kept], ratio * delta[kept], rtol=1e-4, atol=1e-6)
    (models / "dare.yaml").write_text(text)
    assert any("dare divides what it keeps by the probability" in w for w in plan(models / "dare.yaml").warnings)


def test_random_masks_of_two_slices_of_one_model_differ(models: Path) -> None:
    text = (
        "merge_method: dare_linear\nbase_model: base\nparameters: {density: 0.5, weight: 1}\nslices:\n"
        + "  - sources: [{model: base, layer_range: [0, 2]}, {model: a, layer_range: [0, 2]}]\n" * 2
    )
    (models / "masks.yaml").write_text(text)
    read = read_dialect(models / "masks.yaml", {})
    assert read is not None
    seeds = [said.get("seed", 0) for said in read.draft.steps.values() if said["op"] == "dare"]
    assert seeds == [0, 1]


def test_blocks_of_one_model_are_merged_with_each_other(models: Path, tmp_path: Path) -> None:
    text = (
        "merge_method: linear\nslices:\n  - sources:\n      - {model: a, layer_range: [0, 1], parameters: {weight: 1}}\n"
        "      - {model: a, layer_range: [2, 3], parameters: {weight: 3}}\n"
    )
    made, a = ran(models, tmp_path / "self", text), read_checkpoint(models / "a")
    for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
        first, third = (a[f"model.layers.{i}.{part}.weight"].astype(np.float64) for i in (0, 2))
        np.testing.assert_allclose(made[f"model.layers.0.{part}.weight"], (first + 3 * third) / 4, rtol=1e-6, atol=1e-7)
    assert sum("layers" in n for n in made) == 3


def rounded(values: Array, kind: Any) -> Array:
    return values.astype(kind).astype(np.float64)


@pytest.mark.parametrize("compat", [False, True])
def test_dtype_rounds_inputs_only_in_compat(models: Path, tmp_path: Path, compat: bool) -> None:
    text = "merge_method: linear\ndtype: float16\nout_dtype: float32\n" + AB + ("compat: mergekit\n" if compat else "")
    made = ran(models, tmp_path / "types", text)
    a, b = (read_checkpoint(models / m) for m in ("a", "b"))
    for name, value in made.items():
        assert value.dtype == np.float32
        x, y = (rounded(m[name], np.float16) if compat else m[name].astype(np.float64) for m in (a, b))
        np.testing.assert_allclose(value, (0.7 * x + 0.4 * y) / 1.1, rtol=1e-6, atol=1e-7)


def test_float64_is_computed_in_float64(models: Path, tmp_path: Path) -> None:
    made = ran(models, tmp_path / "wide", "merge_method: linear\ndtype: float64\n" + AB)
    a, b = (read_checkpoint(models / m) for m in ("a", "b"))
    for name, value in made.items():
        assert value.dtype == np.float64
        np.testing.assert_allclose(value, (0.7 * a[name].astype(float) + 0.4 * b[name].astype(float)) / 1.1, rtol=1e-14, atol=1e-15)


def test_tensors_that_only_one_model_has(models: Path, tmp_path: Path) -> None:
    """slerp passes the only copy on, nearswap only the base's; others refuse."""
    extra = dict(read_checkpoint(models / "a")) | {"model.layers.0.self_attn.q_proj.bias": np.ones(HIDDEN, np.float32)}
    write_checkpoint(models / "biased", extra, config=llama_config())
    text = "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nmodels: [{model: biased}]\n"
    made = ran(models, tmp_path / "one", text)
    assert (made["model.layers.0.self_attn.q_proj.bias"] == 1).all()
    for method in ("nearswap", "task_arithmetic"):
        more = text.replace("slerp", method).replace("t: 0.5", "t: 0.5" if method == "nearswap" else "weight: 0.5")
        (models / "two.yaml").write_text(more)
        with pytest.raises(Exception, match=r"q_proj\.bias` is in biased but not in base"):
            plan(models / "two.yaml")
    (models / "two.yaml").write_text(text.replace("slerp", "nearswap").replace("biased", "base", 1).replace("base_model: base", "base_model: biased"))
    assert "model.layers.0.self_attn.q_proj.bias" in plan(models / "two.yaml").by_name


def test_parameters_of_the_base_are_told_about(models: Path) -> None:
    text = "merge_method: ties\nbase_model: base\nmodels:\n  - {model: base, parameters: {weight: 9}}\n" + AB.split("\n", 1)[1]
    (models / "told.yaml").write_text(text)
    assert any("`weight` of the base model has no effect" in w for w in plan(models / "told.yaml").warnings)


def test_unused_seeds_and_defaults_are_not_written(models: Path) -> None:
    path = models / "short.yaml"
    path.write_text("merge_method: ties\nparameters: {density: 1, weight: 1}\n" + BASE + PLAIN)
    read = read_dialect(path, {})
    assert read is not None
    assert read.native(models).splitlines() == [
        "models:", "  a: a", "  b: b", "  base: base", "steps:",
        "  a_delta: {op: diff, of: [a, base]}", "  b_delta: {op: diff, of: [b, base]}",
        "  task: {op: ties, of: [a_delta, b_delta], density: 1, weight: 1, like: mergekit}",
        "  merged: {op: add, of: [base, task]}", "output: {from: merged}",
    ]  # fmt: skip


def test_folders_of_one_name_get_labels_of_their_own(tmp_path: Path) -> None:
    for i, where in enumerate(("x", "y")):
        llama(tmp_path / where / "model", i, dtype=np.float32, vocab=VOCAB)
    path = tmp_path / "r.yaml"
    path.write_text("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: x/model}, {model: y/model}]\n")
    read = read_dialect(path, {})
    assert read is not None and list(read.draft.models) == ["model", "model_2"]
    assert "  model_2: y/model" in read.native(tmp_path).splitlines()
