"""Filters, gradients and precedence of mergekit's dialect against its rules, written down here once more."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import llama, plan, read_checkpoint, run, same

from surgery.errors import Refused
from surgery.graph.values import at
from surgery.recipe.mergekit.filters import filter_matches, globs_of
from surgery.recipe.mergekit.read import read_dialect

DEPTH = 12
PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
BEFORE, AFTER = ["model.embed_tokens.weight"], ["model.norm.weight", "lm_head.weight"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("values")
    for seed, name in enumerate(("base", "a", "b")):
        llama(folder / name, seed, depth=DEPTH, dtype=np.float32)
    return folder


# -- mergekit's rule -----------------------------------------------------------------------------------------------------


def evaluated(setting: Any, name: str, t: float) -> Any:
    """The value of one setting for one tensor, None if no filter matches."""
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if all(isinstance(item, int | float) for item in setting):
        knot = t * (len(setting) - 1)
        low = int(knot)
        high = min(low + 1, len(setting) - 1)
        return (1 - (knot - low)) * setting[low] + (knot - low) * setting[high]
    for item in setting:
        wanted = item.get("filter")
        if wanted is None or wanted == "*" or wanted in name:
            return evaluated(item["value"], name, t)
    return None


def resolved(scopes: list[dict[str, Any]], name: str, t: float) -> Any:
    for scope in scopes:
        if "weight" in scope:
            value = evaluated(scope["weight"], name, t)
            if value is not None:
                return value
    return None


def random_setting(rng: random.Random, *, total: bool) -> Any:
    def value() -> Any:
        kind = rng.random()
        if kind < 0.5:
            return round(rng.uniform(0, 2), 2)
        return [round(rng.uniform(0, 2), 2) for _ in range(rng.randint(2, 5))]

    if rng.random() < 0.4:
        return value()
    filters = rng.sample(["self_attn", "mlp", "norm", "lm_head", "layers.1", "embed", "proj", "layers.3.mlp"], rng.randint(1, 3))
    made: list[dict[str, Any]] = [{"filter": f, "value": value()} for f in filters]
    if total or rng.random() < 0.3:
        made.append({"value": value()} if rng.random() < 0.5 else {"filter": "*", "value": value()})
    return made[0] if len(made) == 1 and rng.random() < 0.5 else made


@pytest.mark.parametrize("seed", range(25))
def test_random_settings_follow_the_rule(models: Path, seed: int) -> None:
    """Every weight of every tensor of every slice, as the native step has it, is what mergekit's rule gives."""
    rng = random.Random(seed)
    cuts = sorted({0, DEPTH, *(rng.randint(1, DEPTH - 1) for _ in range(rng.randint(0, 2)))})
    recipe: dict[str, Any] = {"merge_method": "linear", "compat": "mergekit", "slices": []}
    recipe["parameters"] = {"weight": random_setting(rng, total=True)}
    for low, high in pairwise(cuts):
        sources = []
        for model in ("a", "b"):
            start = rng.randint(0, DEPTH - (high - low))
            source: dict[str, Any] = {"model": model, "layer_range": [start, start + high - low]}
            if rng.random() < 0.6:
                source["parameters"] = {"weight": random_setting(rng, total=False)}
            sources.append(source)
        piece: dict[str, Any] = {"sources": sources}
        if rng.random() < 0.4:
            piece["parameters"] = {"weight": random_setting(rng, total=False)}
        recipe["slices"].append(piece)
    path = models / f"random_{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    try:
        read = read_dialect(path, {})
    except Exception as problem:  # a filter of the random recipe may choose nothing
        assert "no tensor matches the filter" in str(problem)
        return
    assert read is not None
    steps = [name for name, said in read.draft.steps.items() if said["op"] == "average"]
    order = read.draft.steps[read.output["from"]].get("of", []) if len(cuts) > 2 else [steps[0]]
    for k, (low, high) in enumerate(pairwise(cuts)):
        piece = recipe["slices"][k]
        step = read.draft.steps[order[k]]
        for i, source in enumerate(piece["sources"]):
            weight = step["weight"][i] if isinstance(step["weight"], list) else step["weight"]
            scopes = [source.get("parameters", {}), piece.get("parameters", {}), recipe["parameters"]]
            names = [(f"model.layers.{n}.{part}", f"model.layers.{n + source['layer_range'][0]}.{part}", n)
                     for n in range(high - low) for part in PARTS]  # fmt: skip
            names += [(n, n, -1) for n in (BEFORE if k == 0 else []) + (AFTER if high == DEPTH else [])]
            for here, theirs, n in names:
                t = 0.0 if n < 0 else 1.0 if high - low == 1 else n / (high - low - 1)
                position = (1.0 if here in AFTER else 0.0) if n < 0 else n / max(high - low - 1, 1)
                assert at(weight, here, position, None) == pytest.approx(resolved(scopes, theirs, t), abs=1e-12), here


# -- where ours differs --------------------------------------------------------------------------------------------------


def weights(path: Path, step: str = "merged") -> Any:
    read = read_dialect(path, {})
    assert read is not None
    return read.draft.steps[step]["weight"]


def linear(folder: Path, weight: str, more: str = "", name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(
        f"merge_method: linear\nmodels:\n  - model: a\n    parameters: {{weight: {weight}}}\n"
        f"  - {{model: b, parameters: {{weight: 1}}}}\n{more}"
    )
    return path


def test_a_gradient_ends_where_the_model_does(models: Path) -> None:
    path = linear(models, "[0, 1]")
    assert weights(path) == [[0, 1], 1]
    made = plan(path)
    assert [w for w in made.warnings if w.startswith("differs from mergekit")] == [
        "differs from mergekit (compat: mergekit follows it): "
        "gradients end at `model.norm.weight`, `lm_head.weight` (mergekit: their first value there)"
    ]


def test_compat_takes_the_first_value_outside_the_blocks_and_says_nothing(models: Path) -> None:
    path = linear(models, "[0, 1]", "compat: mergekit\n")
    assert weights(path) == [{"model.norm.weight": 0, "lm_head.weight": 0, "*": [0, 1]}, 1]
    assert not any("mergekit" in w for w in plan(path).warnings)


def test_a_gradient_for_all_slices_runs_over_all_of_them(models: Path) -> None:
    text = "merge_method: linear\nparameters: {weight: [0, 4], normalize: false}\nslices:\n"
    text += "".join(f"  - sources: [{{model: a, layer_range: [{i}, {i + 2}]}}]\n" for i in (0, 3, 6))[:-1] + "\n"
    path = models / "g.yaml"
    path.write_text(text)
    read = read_dialect(path, {})
    assert read is not None
    found = [said["weight"] for said in read.draft.steps.values() if said["op"] == "average"]
    assert found == [[pytest.approx([0, 0.8])], [pytest.approx([1.6, 2.4])], [pytest.approx([3.2, 4])]]
    path.write_text(text + "compat: mergekit\n")
    again = read_dialect(path, {})
    assert again is not None
    found = [said["weight"] for said in again.draft.steps.values() if said["op"] == "average"]
    assert found == [[[0, 4]], [[0, 4]], [{"model.norm.weight": 0, "lm_head.weight": 0, "*": [0, 4]}]]


def test_a_number_in_a_filter_is_a_whole_number(models: Path) -> None:
    path = linear(models, "[{filter: layers.1, value: 5}, {value: 2}]")
    assert weights(path) == [{"*layers.1.*": 5, "*": 2}, 1]
    assert any("whole numbers only" in w for w in plan(path).warnings)
    path = linear(models, "[{filter: layers.1, value: 5}, {value: 2}]", "compat: mergekit\n")
    assert weights(path) == [{"*layers.1*": 5, "*": 2}, 1]


def test_wildcards_in_filters(models: Path) -> None:
    path = linear(models, "[{filter: 'layers.*.mlp', value: 5}, {value: 2}]")
    assert weights(path) == [{"*layers.*.mlp*": 5, "*": 2}, 1]


@pytest.mark.parametrize(
    ("wanted", "name", "ours", "theirs"),
    [
        (None, "x", True, True), ("", "x", True, True), ("*", "x", True, True), ("mlp", "a.mlp.b", True, True),
        ("mlp", "a.MLP.b", False, False), ("layers.1", "m.layers.1.w", True, True), ("layers.1", "m.layers.12.w", False, True),
        ("1.mlp", "layers.1.mlp", True, True), ("1.mlp", "layers.11.mlp", False, True), ("a.b", "aXb", False, False),
        ("[ab]x", "bx", True, False), ("l?p", "mlp", False, False), ("m?p", "mlp", True, False),
    ],
)  # fmt: skip
def test_filters(wanted: str | None, name: str, ours: bool, theirs: bool) -> None:
    assert filter_matches(wanted, name, compat=False) is ours
    assert filter_matches(wanted, name, compat=True) is theirs


def test_globs_stand_for_exactly_what_a_filter_chose() -> None:
    """Filters speak of a model's own block numbers, globs of those in the slice."""
    names = {f"m.{i}.{part}": f"m.{i + 9}.{part}" for i in range(4) for part in ("a", "b")} | {"head[1]": "head[1]"}
    chosen = {n for n, theirs in names.items() if filter_matches("m.1", theirs, compat=True)}
    assert globs_of("m.1", names, chosen, compat=True) == ["m.1.*", "m.2.*", "m.3.*"]
    assert globs_of("10.a", names, {"m.1.a"}, compat=False) == ["m.1.a"]
    assert globs_of("head[1]", names, {"head[1]"}, compat=True) == ["*head[[]1]*"]


def test_a_switch_that_differs_between_tensors(models: Path, tmp_path: Path) -> None:
    """One average for each setting, stitched together."""
    path = linear(models, "3", "parameters: {normalize: [{filter: mlp, value: false}, {value: true}]}\n")
    run(path, tmp_path / "out")
    made, a, b = (read_checkpoint(p) for p in (tmp_path / "out", models / "a", models / "b"))
    for name, value in made.items():
        wanted = 3 * a[name].astype(float) + b[name]
        np.testing.assert_allclose(value, wanted if "mlp" in name else wanted / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("text", ["0.5", "'0.5'", "5e-1", "'5e-1'", "[0.5]", "{value: 0.5}", "{filter: '*', value: 0.5}"])
def test_ways_of_writing_a_number(models: Path, text: str) -> None:
    assert weights(linear(models, text)) == [0.5, 1]


def test_set_changes_values(models: Path) -> None:
    path = linear(models, "1")
    read = read_dialect(path, {"models.0.parameters.weight": 3, "compat": "mergekit"})
    assert read is not None and read.draft.steps["merged"]["weight"] == [3, 1]
    assert read.settings.recipe is not None and read.settings.recipe.startswith("# --set models.0.parameters.weight=3\n")


def test_the_same_model_under_two_names_is_one(models: Path, tmp_path: Path) -> None:
    """A reference as text and as a map."""
    path = linear(models, "1")
    other = models / "other.yaml"
    other.write_text(path.read_text().replace("model: a", "model: {model: {path: a}}"))
    run(path, tmp_path / "x")
    run(other, tmp_path / "y")
    same(read_checkpoint(tmp_path / "x"), read_checkpoint(tmp_path / "y"))


def test_anchors_and_merge_keys(models: Path) -> None:
    path = models / "anchors.yaml"
    path.write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: &common\n      weight: 0.3\n      density: 0.5\n"
        "  - model: b\n    parameters:\n      <<: *common\n      weight: 0.7\n"
    )
    read = read_dialect(path, {})
    assert read is not None
    assert read.draft.steps["task"]["weight"] == [0.3, 0.7] and read.draft.steps["task"]["density"] == 0.5


def test_merge_keys_that_multiply_end_quickly(models: Path) -> None:
    lines = ["merge_method: linear", "models: [{model: a, parameters: {weight: 1}}]", "a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    path = models / "bomb.yaml"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Refused, match="unknown key `a0`"):
        plan(path)
