"""A mistake in a recipe is answered with its place and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import llama, plan, recipe, surgery, trio, write_checkpoint

import surgery as package
from surgery.errors import Refused
from surgery.recipe.document import parse_override

MODELS = "models:\n  base: base\n  a: a\n  b: b\n"
STEPS = MODELS + "steps:\n  d: {op: diff, of: [a, base]}\n  e: {op: diff, of: [b, base]}\n"
OUT = "output: {from: out}\n"
BOTH = STEPS + "  out: {op: add, of: [base, d, e]}\n" + OUT

# recipe, line:column, words of the message, words of the hint
CASES = {
    "unknown_section": (BOTH + "extra: 1\n", "10:1", "unknown key `extra` in the recipe", "known: models, output, steps"),
    "misspelt_section": (MODELS + "outptu: {from: a}\n", "5:1", "unknown key `outptu`", "did you mean `output`?"),
    "unknown_output_key": (BOTH.replace("{from: out}", "{from: out, dtyp: bfloat16}"), "9:21",
                           "unknown key `dtyp` in output", "did you mean `dtype`?"),
    "unknown_parameter": (BOTH.replace("d, e]}", "d, e], wieght: 2}"), "8:36", "out: add has no parameter `wieght`",
                          "did you mean `weight`?"),
    "unknown_op": (BOTH.replace("op: add", "op: ad"), "8:9", "no operator `ad`", "did you mean `add`?"),
    "unknown_model": (BOTH.replace("[base, d, e]", "[base, d, f]"), "8:32", "no model or step `f`", "known: a, b, base"),
    "misspelt_model": (BOTH.replace("[base, d, e]", "[bsae, d, e]"), "8:23", "no model or step `bsae`",
                       "did you mean `base`?"),
    "forward": (STEPS + "  out: {op: add, of: [base, late]}\n  late: {op: add, of: [d, e]}\n" + OUT, "8:29",
                "step `late` comes later; steps may only look back", ""),
    "itself": (BOTH.replace("[base, d, e]", "[base, d, out]"), "8:32", "a step cannot use itself", ""),
    "unused_step": (STEPS + "  out: {op: add, of: [base, d]}\n" + OUT, "7:3", "`e` is not used by the output",
                    "remove it"),
    "unused_model": (MODELS + "output: {from: a}\n", "2:3", "`base` is not used by the output", "remove it"),
    "step_named_as_model": (BOTH.replace("  out:", "  a:"), "8:3", "`a` is also a model", "another name"),
    "wrong_space": (STEPS + "  t: {op: ties, of: [a, d, e]}\n  out: {op: add, of: [base, t]}\n" + OUT, "8:17",
                    "t: ties takes deltas; `a` is weights", "{op: diff, of: [a, base]}"),
    "delta_as_base": (BOTH.replace("of: [base, d, e]", "of: [d, b, e]"), "8:18", "out: add takes deltas; `b` is weights",
                      "diff"),
    "average_of_mixed": (BOTH.replace("add, of: [base, d, e]", "average, of: [base, d, e]"), "8:22", "average takes", ""),
    "too_few_inputs": (MODELS + "steps:\n  out: {op: slerp, of: [a], t: 0.5}\n" + OUT, "6:20", "slerp takes 2 inputs", ""),
    "per_input_length": (BOTH.replace("d, e]}", "d, e], weight: [1, 2, 3]}"), "8:36",
                         "add: `weight` has 3 values for 2 deltas", ""),
    "one_gradient": (STEPS.replace("  e: {op: diff, of: [b, base]}\n", "") + "  out: {op: add, of: [base, d], weight: [1, 2]}\n"
                     + OUT, "7:33", "`weight` has 2 values for 1 deltas; a gradient over depth is written weight: [[1, 2]]", ""),
    "number_beyond_float32": (BOTH.replace("d, e]}", "d, e], weight: 1e39}"), "8:36", "out: `weight` must be at most 3.4e+38",
                              ""),
    "weight_beyond_the_output": (BOTH.replace("d, e]}", "d, e], weight: 1e5}").replace("{from: out}", "{from: out, dtype: float16}"),
                                 "8:3", "overflows float16 (largest 6.55e+04)", "a wider output dtype"),
    "rank_above_every_matrix": (STEPS + "  t: {op: truncate_rank, of: d, rank: 999}\n  out: {op: add, of: [base, t, e]}\n" + OUT,
                                "8:33", "t: `rank: 999` is above every matrix: the largest rank is", "or less"),
    "weights_sum_to_zero": (MODELS + "steps:\n  out: {op: average, of: [base, a, b], weight: [2, -1, -1]}\n" + OUT, "6:40",
                            "the weights [2, -1, -1] sum to zero", ""),
    "shares_sum_to_zero": (MODELS.replace("  base: base\n", "") + "steps:\n  out: {op: nuslerp, of: [a, b], weight: [1, -1]}\n" + OUT,
                           "5:34", "the weights [1, -1] sum to zero", ""),
    "density_too_high": (STEPS + "  t: {op: ties, of: [d, e], density: 1.01}\n  out: {op: add, of: [base, t]}\n" + OUT,
                         "8:29", "t: `density` must be number > 0, ≤ 1, got 1.01", ""),
    "density_of_nothing": (STEPS + "  t: {op: ties, of: [d, e], density: 0}\n  out: {op: add, of: [base, t]}\n" + OUT,
                           "8:29", "`density` must be number > 0, ≤ 1, got 0", ""),
    "density_is_text": (STEPS + "  t: {op: ties, of: [d, e], density: high}\n  out: {op: add, of: [base, t]}\n" + OUT,
                        "8:29", "`density` must be a finite number, got 'high'", ""),
    "density_in_map": (STEPS + '  t: {op: ties, of: [d, e], density: {"*mlp*": 2, "*": 1}}\n'
                       "  out: {op: add, of: [base, t]}\n" + OUT, "8:29", "`density` must be number > 0, ≤ 1, got 2", ""),
    "glob_without_match": (BOTH.replace("d, e]}", 'd, e], weight: {"*mpl*": 1, "*": 0.5}}'), "8:36",
                           "out: `weight`: no tensor matches `*mpl*`", ""),
    "duplicate_key": (BOTH.replace("  e:", "  d:"), "7:3", "`d` is given twice", ""),
    "duplicate_parameter": (BOTH.replace("d, e]}", "d, e], weight: 1, weight: 2}"), "8:47", "`weight` is given twice", ""),
    "no_op": (BOTH.replace("op: add, ", ""), "8:3", "steps.out needs `op`", ""),
    "no_of": (BOTH.replace(", of: [base, d, e]", ""), "8:3", "steps.out needs `of`", ""),
    "of_is_number": (BOTH.replace("[base, d, e]", "7"), "8:18", "must be a name or a list of names, found 7", ""),
    "step_is_text": (BOTH.replace("{op: add, of: [base, d, e]}", "add"), "8:3", "steps.out must be a map, found 'add'", ""),
    "no_output": (MODELS, "1:1", "the recipe needs `output`", ""),
    "no_from": (BOTH.replace("{from: out}", "{dtype: bfloat16}"), "9:1", "output needs `from`", ""),
    "bad_dtype": (BOTH.replace("{from: out}", "{from: out, dtype: bfloat}"), "9:21",
                  "output.dtype cannot be `bfloat`", "did you mean `bfloat16`?"),
    "bad_shard_size": (BOTH.replace("{from: out}", "{from: out, shard_size: big}"), "9:21", "`big` is not a size",
                       "write it like 5GB"),
    "bad_missing": (BOTH.replace("d, e]}", "d, e], missing: drop}"), "8:36", "missing: must be one of error, keep, skip", ""),
    "no_models": ("models: {}\n" + OUT, "1:1", "models is empty", ""),
    "model_is_number": (BOTH.replace("b: b\n", "b: 7\n"), "4:3", "expected a path, a hub id", ""),
    "model_is_missing": (BOTH.replace("b: b\n", "b: ./nowhere\n"), "4:3", "./nowhere: no such file or directory", "hub id"),
    "rule_names_no_input": (MODELS + 'steps:\n  out: {op: stitch, of: [base, a, b], rules: {"*mlp*": c, "*": a}}\n' + OUT,
                            "6:39", "rules name `c`, which is not among `of`", "known: a, b, base"),
    "rule_never_wins": (MODELS + 'steps:\n  out: {op: stitch, of: [base, a, b], rules: {"*": a, "*mlp*": b}}\n' + OUT,
                        "6:39", "rule `*mlp*` never wins; an earlier rule matches first", ""),
    "rules_not_total": (MODELS + 'steps:\n  out: {op: stitch, of: [base, a, b], rules: {"*mlp*": a}}\n' + OUT, "6:39",
                        "no rule matches `model.embed_tokens.weight`", 'end the rules with "*"'),
    "required_parameter": (MODELS + "steps:\n  out: {op: slerp, of: [a, b]}\n" + OUT, "6:3", "slerp needs `t`", "accepted"),
    "bad_yaml": (BOTH.replace("[base, d, e]", "[base, d, e"), "8:", "not valid YAML", ""),
    "tab": ("models:\n\ta: a\n", "2:1", "not valid YAML", ""),
    "python_object": ("models: {a: !!python/object/apply:os.system [true]}\noutput: {from: a}\n", "1:10", "models.a: expected a path", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    trio(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_placed_and_explained(models: Path, case: str) -> None:
    text, place, message, hint = CASES[case]
    path = models / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as found:
        plan(path)
    said = found.value
    assert re.match(re.escape(f"{path}:{place}") + r"[\d:]", said.message), said.message
    assert message in said.message
    assert hint in (said.hint or "")
    assert said.exit_code == 2


def test_the_recipe_that_mistakes_are_made_in_is_right(models: Path) -> None:
    path = models / "recipe.yaml"
    path.write_text(BOTH)
    assert len(plan(path).programs) == 12


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "7", "~", "text"])
def test_what_is_no_recipe_at_all(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(Refused, match="not a recipe"):
        plan(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"nothing.yaml: cannot be read"):
        plan(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="not a text file"):
        plan(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
        "a: &a [*a]\n",
        "[" * 20000,
    ],
)
def test_hostile_yaml_ends_quickly(tmp_path: Path, bomb: str) -> None:
    (tmp_path / "recipe.yaml").write_text(bomb)
    with pytest.raises(Refused):
        plan(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    ("key", "said", "hint"),
    [
        ("steps.outt.weight", "there is no `steps.outt`", "did you mean `out`?"),
        ("step.out.weight", "there is no `step`", "did you mean `steps`?"),
        ("steps.out.of.7", "there is no `steps.out.of.7`", ""),
        ("nonsense", "there is no `nonsense`", ""),
    ],
)
def test_set_with_a_wrong_path(models: Path, key: str, said: str, hint: str) -> None:
    path = models / "recipe.yaml"
    path.write_text(BOTH)
    with pytest.raises(Refused, match=re.escape(f"--set {key}: {said}")) as found:
        plan(path, **{key: 1})
    assert hint in (found.value.hint or "")


def test_set_with_a_wrong_value_is_judged_like_the_recipe(models: Path) -> None:
    path = models / "recipe.yaml"
    path.write_text(BOTH)
    with pytest.raises(Refused, match="`weight` must be a finite number"):
        plan(path, **{"steps.out.weight": "much"})
    with pytest.raises(Refused, match="has no parameter `wait`"):
        plan(path, **{"steps.out.wait": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=0.3", 0.3), ("a.b=1e-3", 1e-3), ("a.b=[1, 2]", [1, 2]), ("a.b=x=y", "x=y"), ("a.b=", None), (" a.b =true", True)],
)
def test_set_values_are_yaml(text: str, value: object) -> None:
    assert parse_override(text) == ("a.b", value)


@pytest.mark.parametrize("text", ["a.b", "=3", "a.b=[1", ""])
def test_set_that_is_no_assignment(text: str) -> None:
    with pytest.raises(Refused, match="--set"):
        parse_override(text)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """1e-3 is a number although YAML 1.1 says it is not."""
    trio(tmp_path)
    path = recipe(tmp_path, "d: {op: diff, of: [a, base]}\nout: {op: add, of: [base, d], weight: 1e-3}", models=["base", "a"])
    assert "weight=0.001" in str(plan(path))


def test_block_style_and_models_by_map(tmp_path: Path) -> None:
    trio(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"# a comment\nmodels:\n  x:\n    source: {tmp_path / 'a'}\n  y: b\nsteps:\n  z:\n    op: average\n    of:\n      - x\n"
        "      - y\n    weight:\n      - 1\n      - 3\noutput:\n  from: z\n  dtype: float32\n"
    )
    assert len(plan(path).programs) == 12
    assert len(package.load(path)) == 12


def test_load_takes_overrides(tmp_path: Path) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab")
    assert package.load(path) != package.load(path, {"steps.out.weight": [1, 2]})
    assert package.load(path) == package.load(path)


def test_the_command_line_prints_no_traceback(tmp_path: Path) -> None:
    llama(tmp_path / "a", 0)
    path = recipe(tmp_path, models="a", output="{from: b}")
    done = surgery("plan", path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {path}:3:") and "\nhint: " in done.stderr and "Traceback" not in done.stderr


def test_a_rank_above_some_matrices_is_noted(tmp_path: Path) -> None:
    """One number holds for all tensors: narrow ones are kept whole, and the plan says which."""
    for seed, name in enumerate(("base", "a")):
        rng = np.random.default_rng(seed)
        shapes = {"layers.0.wide": (20, 30), "layers.0.narrow": (30, 4)}
        write_checkpoint(tmp_path / name, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()})
    text = "models: {base: base, a: a}\nsteps:\n  d: {op: diff, of: [a, base]}\n  t: {op: truncate_rank, of: d, rank: RANK}\n"
    text += "  out: {op: add, of: [base, t]}\noutput: {from: out}\n"
    (tmp_path / "r.yaml").write_text(text.replace("RANK", "5"))
    assert any("rank 5 is above" in w and "kept whole" in w for w in plan(tmp_path / "r.yaml").warnings)
    (tmp_path / "r.yaml").write_text(text.replace("RANK", "2"))
    assert not any("is above" in w for w in plan(tmp_path / "r.yaml").warnings)


def test_what_an_operator_cannot_do_for_small_matrices_is_noted(tmp_path: Path) -> None:
    trio(tmp_path)  # hidden size 8
    text = "models: {base: base, a: a, b: b}\nsteps:\n  d: {op: diff, of: [a, base]}\n  e: {op: diff, of: [b, base]}\n"
    text += "  t: {op: iso_cts, of: [d, e], common: COMMON}\n  out: {op: add, of: [base, t]}\noutput: {from: out}\n"
    (tmp_path / "r.yaml").write_text(text.replace("COMMON", "0.9"))
    assert any("the result is that of iso_c" in w for w in plan(tmp_path / "r.yaml").warnings)
    (tmp_path / "r.yaml").write_text(text.replace("COMMON", "0.5"))
    assert not any("iso_c" in w for w in plan(tmp_path / "r.yaml").warnings)
