"""Recipes by strangers, native and in mergekit's dialect, beyond those of tests/recipe: sizes, types, tags, paths."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from helpers import plan, surgery, trio

from surgery.errors import Refused
from surgery.recipe.document import parse_override

NATIVE = "models: {base: base, a: a, b: b}\nsteps:\n  out: {op: average, of: [base, a, b], weight: VALUE}\noutput: {from: out}\n"
MERGEKIT = (
    "merge_method: linear\nmodels:\n  - {model: base, parameters: {weight: 1}}\n"
    "  - {model: a, parameters: {weight: VALUE}}\n  - {model: b, parameters: {weight: 1}}\n"
)
VALUES = {
    "month_13": "2024-13-45",
    "date": "2024-01-02",
    "not_an_int": "!!int abc",
    "not_a_float": "!!float abc",
    "not_a_bool": "!!bool maybe",
    "not_a_time": "!!timestamp abc",
    "not_binary": "!!binary '%%%'",
    "binary": "!!binary aGk=",
    "set": "!!set {a, b}",
    "ordered": "!!omap [a: 1]",
    "pairs": "!!pairs [a: 1]",
    "digits": "9" * 10_000,
    "sexagesimal": "1:" * 5000 + "1",
    "infinite": ".inf",
    "nan": ".nan",
    "huge": "1e400",
    "nested": "[" * 800 + "]" * 800,
    "null": "~",
    "python_object": "!!python/object/apply:os.system ['touch PROOF']",
    "python_new": "!!python/object/new:subprocess.Popen [['touch', 'PROOF']]",
    "python_name": "!!python/name:os.system",
    "python_module": "!!python/module:os",
    "python_tuple": "!!python/tuple [a, b]",
    "unknown_tag": "!evil {a: b}",
    "key_of_lists": "{? [a, [b]] : 1}",
    "key_itself": "&k {? *k : 1}",
    "merge_itself": "&k {<<: *k}",
    "merge_a_number": "{<<: 7}",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    trio(folder)
    return folder


@pytest.mark.parametrize("dialect", [NATIVE, MERGEKIT], ids=["native", "mergekit"])
@pytest.mark.parametrize("name", VALUES)
def test_a_hostile_value_is_refused_where_it_stands(models: Path, proof: Path, name: str, dialect: str) -> None:
    path = models / "recipe.yaml"
    path.write_text(dialect.replace("VALUE", VALUES[name].replace("PROOF", str(proof))))
    with pytest.raises(Refused, match=r"recipe.yaml") as found:
        plan(path)
    assert len(found.value.message) < 12_000


@pytest.mark.parametrize("name", VALUES)
def test_hostile_values_given_by_set(models: Path, proof: Path, name: str) -> None:
    path = models / "recipe.yaml"
    path.write_text(NATIVE.replace("VALUE", "1"))
    with pytest.raises(Refused):
        key, value = parse_override("steps.out.weight=" + VALUES[name].replace("PROOF", str(proof)))
        plan(path, **{key: value})


@pytest.mark.parametrize(
    "text",
    [
        "- a\n" * 600_000,
        "# " + "x" * 3_000_000,
        "a: &a [" + "x," * 20_000 + "x]\nb: [" + "*a," * 10 + "*a]\n",
        "{" * 30_000,
        "a: " * 30_000,
        "- " * 30_000,
        "? " * 30_000,
        "&a " * 30_000,
        "merge_method: linear\n" + "- a\n" * 600_000,
        "merge_method: linear\nmodels: " + "[" * 30_000,
        "merge_method: linear\na: &a [x, x]\n"
        + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
        "---\nmerge_method: linear\n" * 3000,
        '"' + "\\x41" * 400_000 + '"',
        "%YAML 9.9\n---\na: 1\n",
        "\ufeff\ufeffa: 1",
    ],
    ids=range(15),
)
def test_recipes_that_are_too_much(models: Path, text: str) -> None:
    """Refused within seconds; memory in proportion to the 2 MB that are read at most."""
    path = models / "recipe.yaml"
    path.write_text(text)
    began = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            plan(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - began < 60


def test_a_recipe_that_is_no_file_or_never_ends(tmp_path: Path) -> None:
    for path in ("/dev/zero", "/dev/null", "/proc/self/mem", str(tmp_path)):
        done = surgery("plan", path, timeout=60)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


def test_what_a_recipe_says_is_not_a_format_or_a_path(models: Path) -> None:
    path = models / "recipe.yaml"
    for text in ("{0.__class__}", "%(x)s", "$(touch x)", "`id`", "../../../../etc/passwd", "file:///etc/passwd", "/dev/zero"):
        path.write_text(f"models: {{base: {text!r}}}\noutput: {{from: base}}\n")
        with pytest.raises(Refused, match=r"recipe.yaml:\d+:\d+"):
            plan(path)
