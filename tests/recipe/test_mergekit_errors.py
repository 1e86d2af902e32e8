"""Mistakes in mergekit's dialect: found when the recipe is planned, each in one line with its place and what to do."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import llama, plan, surgery

from surgery.errors import Refused

LINEAR = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 2}}\n"
TIES = (
    "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 1, density: 0.5}\n"
    "  - model: b\n    parameters: {weight: 1, density: 0.5}\n"
)
SLERP = "merge_method: slerp\nbase_model: base\nmodels:\n  - model: base\n  - model: a\nparameters:\n  t: 0.5\n"
SLICES = "merge_method: passthrough\nslices:\n  - sources:\n      - {model: a, layer_range: [0, 2]}\n" \
    "  - sources:\n      - {model: b, layer_range: [1, 3]}\n"  # fmt: skip

# recipe, line:column, words of the message, words of the hint
CASES = {
    "typo_at_the_top": (LINEAR + "out_dtpye: bfloat16\n", "5:1", "unknown key `out_dtpye`; mergekit ignores it", "did you mean `out_dtype`?"),
    "typo_in_parameters_key": (LINEAR.replace("{weight: 1}", "{weight: 1}, paramters: {}"), "3:41", "unknown key `paramters` of a model", "`parameters`"),
    "typo_in_a_parameter": (LINEAR.replace("{weight: 1}", "{wieght: 1}"), "3:29", "linear has no parameter `wieght`", "did you mean `weight`?"),
    "parameter_of_another_method": (LINEAR + "parameters: {density: 0.5}\n", "5:14", "linear has no parameter `density`", "known: normalize, weight"),
    "lambda_misspelt": (TIES + "parameters: {lamda: 2}\n", "8:14", "no parameter `lamda`", "did you mean `lambda`?"),
    "shared_parameter_on_a_model": (TIES.replace("density: 0.5}\n  - model: b", "density: 0.5, normalize: true}\n  - model: b"), "5:43", "`normalize` belongs to the merge as a whole", "move it"),
    "input_model_parameters": (LINEAR + "input_model_parameters: {}\n", "5:1", "`input_model_parameters` has no effect", "remove it"),
    "residual_weight": (SLICES.replace("  - sources:\n      - {model: b", "  - residual_weight: 1\n    sources:\n      - {model: b"), "5:5", "`residual_weight` has no effect", "remove it"),
    "unknown_method": (LINEAR.replace("linear", "liner"), "1:1", "there is no merge method `liner`", "did you mean `linear`?"),
    "method_is_a_list": (LINEAR.replace("linear", "[linear]"), "1:1", "there is no merge method", ""),
    "models_and_slices": (LINEAR + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n", "5:1", "exactly one of `models`, `slices` and `modules`", ""),
    "nothing_to_merge": ("merge_method: linear\n", "1:1", "exactly one of", ""),
    "models_is_a_map": ("merge_method: linear\nmodels: {model: a}\n", "2:1", "`models` must be a list", ""),
    "model_missing": ("merge_method: linear\nmodels:\n  - {modle: a}\n", "3:6", "unknown key `modle` of a model", "did you mean `model`?"),
    "model_not_there": (LINEAR.replace("model: b", "model: ./nowhere"), "4:6", "./nowhere: no such file or directory", ""),
    "layer_range_under_models": (LINEAR.replace("{model: a,", "{model: a, layer_range: [0, 2],"), "3:16", "`layer_range` has no effect under `models`", "slices"),
    "no_layer_range": (SLICES.replace(", layer_range: [1, 3]", ""), "6:9", "`layer_range` must be [first, beyond last]; it is missing", ""),
    "layer_range_too_long": (SLICES.replace("[1, 3]", "[1, 9]"), "6:20", "layer_range [1, 9]: `b` has 3 layers, 0 to 2", ""),
    "layer_range_backwards": (SLICES.replace("[1, 3]", "[3, 1]"), "6:20", "layer_range [3, 1] holds no layer", "the first layer is 0"),
    "layer_range_of_text": (SLICES.replace("[1, 3]", "[a, 3]"), "6:20", "`layer_range` must be [first, beyond last]; found", ""),
    "slice_without_sources": ("merge_method: passthrough\nslices: [{source: []}]\n", "2:11", "unknown key `source` of a slice", "did you mean `sources`?"),
    "slices_of_unequal_length": ("merge_method: linear\nparameters: {weight: 1}\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 2]}\n    - {model: b, layer_range: [0, 3]}\n", "6:18", "layer_range [0, 3] holds 3 layers, [0, 2] of `a` 2", "same number"),
    "models_of_unequal_depth": (LINEAR.replace("model: b", "model: deep"), "4:5", "`deep` has 5 layers, `a` has 3", "layer_range"),
    "listed_twice": (LINEAR.replace("model: b", "model: a"), "4:5", "`a` is listed twice", ""),
    "no_base": (SLERP.replace("base_model: base\n", ""), "1:1", "slerp needs a `base_model`", ""),
    "base_not_in_slice": ("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nslices:\n  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]\n", "5:5", "the base model `base` is not among the sources", "layer_range"),
    "slerp_of_three": (SLERP.replace("  - model: a\n", "  - model: a\n  - model: b\n"), "3:1", "slerp takes 2 models, got 3 with the base", ""),
    "slerp_of_one": (SLERP.replace("  - model: a\n", ""), "3:1", "slerp takes 2 models, got 1 with the base", ""),
    "passthrough_of_two": ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n", "2:1", "passthrough takes 1 model, got 2", ""),
    "passthrough_and_base": ("merge_method: passthrough\nbase_model: base\nmodels: [{model: a}]\n", "3:1", "passthrough takes 1 model, got 2", "`base_model` counts"),
    "stock_of_two": ("merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]\n", "3:1", "model_stock takes 3 models or more, got 2", ""),
    "nuslerp_of_one": ("merge_method: nuslerp\nmodels: [{model: a, parameters: {weight: 1}}]\n", "2:1", "nuslerp takes 2 models beside the base, got 1", ""),
    "weight_missing": (LINEAR.replace(", parameters: {weight: 2}", ""), "4:5", "linear needs `weight` for `b` and none is given", "parameters: {weight: NUMBER}"),
    "weight_missing_for_the_base": ("base_model: base\n" + LINEAR, "1:1", "linear needs `weight` for `base`", ""),
    "filters_leave_a_gap": (LINEAR.replace("{weight: 2}", "{weight: {filter: mlp, value: 1}}"), "4:5", "needs `weight` for `b` for `model.embed_tokens.weight`: no filter covers it", ""),
    "filter_without_match": (LINEAR.replace("{weight: 2}", "{weight: [{filter: attnn, value: 1}, {value: 2}]}"), "4:38", "no tensor matches the filter `attnn`", "part of tensor names"),
    "filter_shadowed_numbers": (LINEAR.replace("{weight: 2}", "{weight: [{filter: layers.7, value: 1}, {value: 2}]}"), "4:38", "no tensor matches the filter `layers.7`", ""),
    "filter_is_a_number": (LINEAR.replace("{weight: 2}", "{weight: [{filter: 3, value: 1}]}"), "4:39", "`filter` must be a part of tensor names, found 3", ""),
    "value_key_misspelt": (LINEAR.replace("{weight: 2}", "{weight: [{vlaue: 1}]}"), "4:39", "unknown key `vlaue` of a value", "did you mean `value`?"),
    "value_missing": (LINEAR.replace("{weight: 2}", "{weight: {filter: mlp}}"), "4:29", "`value` is missing here", ""),
    "numbers_and_filters_mixed": (LINEAR.replace("{weight: 2}", "{weight: [1, {value: 2}]}"), "4:29", "`weight` mixes numbers and filters", "- value: NUMBER"),
    "empty_gradient": (LINEAR.replace("{weight: 2}", "{weight: []}"), "4:29", "`weight` is an empty list", ""),
    "text_for_a_number": (LINEAR.replace("{weight: 2}", "{weight: much}"), "4:29", "`weight` must be a finite number, got 'much'", ""),
    "infinite_weight": (LINEAR.replace("{weight: 2}", "{weight: .inf}"), "4:29", "`weight` must be a finite number", ""),
    "number_for_a_switch": (LINEAR + "parameters: {normalize: 3}\n", "5:14", "`normalize` must be true or false, got 3", ""),
    "weights_sum_to_zero": (LINEAR.replace("{weight: 2}", "{weight: -1}"), "4:29", "the weights [1, -1] sum to zero", ""),
    "lambda_overflows": (TIES + "parameters: {lambda: 1e39}\n", "8:14", "`lambda` must be at most 3.4e+38 in size", ""),
    "lambda_overflows_the_output": (TIES + "parameters: {lambda: 1e6, normalize: false}\ndtype: float16\n".replace("1e6", "70000"), "1:1", "overflows float16 (largest 6.55e+04)", "smaller weights"),
    "nuslerp_weights_sum_to_zero": (LINEAR.replace("linear", "nuslerp").replace("{weight: 2}", "{weight: -1}"), "4:29", "the weights [1, -1] sum to zero", ""),
    "names_are_those_of_the_dialect": ("merge_method: sce\nbase_model: base\nparameters: {select_topk: 2}\nmodels: [{model: a}, {model: b}]\n", "3:14", "`select_topk` must be number", ""),
    "density_zero": (TIES.replace("density: 0.5}\n  - model: b", "density: 0}\n  - model: b"), "5:29", "`density` must be number > 0, ≤ 1, got 0", ""),
    "density_above_one": (TIES.replace("density: 0.5}\n  - model: b", "density: 1.5}\n  - model: b"), "5:29", "`density` must be number > 0, ≤ 1, got 1.5", ""),
    "density_in_a_gradient": (TIES.replace("density: 0.5}\n  - model: b", "density: [0.2, 2]}\n  - model: b"), "5:29", "`density` must be number > 0, ≤ 1, got 2", ""),
    "epsilon_against_density": (TIES.replace("ties", "della").replace("density: 0.5", "density: 0.9"), "5:29", "epsilon", ""),
    "bad_dtype": (LINEAR + "dtype: bfloat\n", "5:1", "`dtype` cannot be `bfloat`", "did you mean `bfloat16`?"),
    "bad_out_dtype": (LINEAR + "out_dtype: int8\n", "5:1", "`out_dtype` cannot be `int8`", ""),
    "bad_compat": (LINEAR + "compat: mergkit\n", "5:1", "`compat` cannot be `mergkit`", "mergekit"),
    "two_revisions": (LINEAR.replace("model: b", "model: org/b@x@y"), "4:6", "more than one `@`", ""),
    "two_adapters": (LINEAR.replace("model: b", "model: b+c+d"), "4:6", "more than one `+`", ""),
    "reference_with_a_typo": (LINEAR.replace("model: b", "model: {path: b}"), "4:14", "unknown key `path` of a model", "known: lora, model"),
    "hidden_sizes_differ": (LINEAR.replace("model: b", "model: wide"), "1:1", "shapes differ for `model.embed_tokens.weight`: [13, 8] in a, [13, 16] in wide", "same architecture"),
    "stacked_sizes_differ": (SLICES.replace("model: b", "model: wide"), "2:1", "of the blocks is", "same width"),
    "unknown_module": ("merge_method: linear\nmodules: {vision_tower: {models: [{model: a, parameters: {weight: 1}}]}}\n", "2:11", "`a` has no module `vision_tower`", ""),
    "tokenizer_twice": (LINEAR + "tokenizer_source: a\ntokenizer: {source: a}\n", "5:1", "give either `tokenizer` or `tokenizer_source`", ""),
    "tokenizer_is_text": (LINEAR + "tokenizer: union\n", "5:1", "`tokenizer` must be a map with `source`", "tokenizer_source: union"),
    "tokenizer_key": (LINEAR + "tokenizer: {sources: a}\n", "5:13", "unknown key `sources` of tokenizer", "did you mean `source`?"),
    "tokenizer_base_without_base": (LINEAR + "tokenizer_source: base\n", "5:1", "tokenizer source `base` needs a `base_model`", ""),
    "document_without_method": (LINEAR + "---\nmodels: [{model: a}]\n", "6:1", "this document has no `merge_method`", ""),
    "two_outputs": (LINEAR + "---\n" + LINEAR, "6:1", "two documents have no `name`", "name the others"),
    "same_name_twice": ("name: x\n" + LINEAR + "---\nname: x\n" + LINEAR, "7:1", "two documents are called `x`", ""),
    "all_named": ("name: x\n" + LINEAR + "---\nname: y\n" + LINEAR, "7:1", "which document is the output?", "leave out the name"),
    "document_not_used": ("name: x\n" + LINEAR + "---\n" + LINEAR, "1:1", "`x` is not used by the output", ""),
    "circle": ("name: x\n" + LINEAR.replace("model: a", "model: y") + "---\nname: y\n" + LINEAR.replace("model: a", "model: x")
               + "---\n" + LINEAR.replace("model: a", "model: x"), "1:1", "`x` is made from itself", ""),
    "duplicate_key": (LINEAR + "merge_method: ties\n", "5:1", "`merge_method` is given twice", ""),
    "bad_yaml": (LINEAR + "parameters: {a: [1}\n", "5:", "not valid YAML", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialect")
    for seed, name in enumerate(("base", "a", "b")):
        llama(folder / name, seed, dtype=np.float32)
    llama(folder / "deep", 7, depth=5, dtype=np.float32)
    llama(folder / "wide", 8, hidden=16, dtype=np.float32)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_refused_where_it_stands(models: Path, name: str) -> None:
    text, place, message, hint = CASES[name]
    path = models / f"{name}.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as found:
        plan(path)
    said = found.value.message
    assert said.startswith(f"{path}:{place}"), said
    assert message in said, said
    assert hint in (found.value.hint or ""), found.value.hint
    assert "\n" not in said


def test_the_command_line_says_it_in_one_line(models: Path) -> None:
    path = models / "recipe.yaml"
    path.write_text(LINEAR.replace("{weight: 2}", "{wieght: 2}"))
    done = surgery("plan", path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.match(rf"error: {re.escape(str(path))}:4:29: linear has no parameter `wieght`", done.stderr)
    assert "hint: did you mean `weight`?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "said"), [("models: {a: a}\noutput: {from: a}\n", "not in mergekit's dialect"), (None, "no such file")]
)
def test_convert_refuses_what_is_not_of_the_dialect(models: Path, text: str | None, said: str) -> None:
    path = models / "native.yaml"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    done = surgery("convert", path)
    assert done.returncode == 2 and said in done.stderr


def test_convert_does_not_overwrite_the_recipe(models: Path) -> None:
    path = models / "same.yaml"
    path.write_text(LINEAR)
    done = surgery("convert", path, "-o", path)
    assert done.returncode == 2 and "is the recipe itself" in done.stderr and path.read_text() == LINEAR
