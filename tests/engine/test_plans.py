"""Plans: everything is accounted for, and nothing but headers is read."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    BF16,
    llama,
    llama_config,
    llama_tensors,
    plan,
    read_checkpoint,
    recipe,
    run,
    trio,
    write_checkpoint,
    write_file,
    write_raw,
)

import surgery
from surgery.engine.price import peak_memory
from surgery.errors import Failed, Refused

ADD = "d: {op: diff, of: [a, base]}\nout: {op: add, of: [base, d], weight: 0.5}"


def uses(made: object) -> dict[str, dict]:
    return {i["name"]: i for i in made.as_dict()["inputs"]}


def test_every_input_tensor_is_accounted_for(tmp_path: Path) -> None:
    trio(tmp_path)
    steps = 'd: {op: diff, of: [a, base]}\nout: {op: stitch, of: [base, b], rules: {"*layers.0*": b, "*": base}}'
    made = plan(recipe(tmp_path, steps.splitlines()[1], models=["base", "b"]))
    found = uses(made)
    for name in ("base", "b"):
        use = found[name]
        assert use["tensors"] == 12 == use["computed"] + use["copied"] + len(use["left_out"])
        assert all(use["left_out"].values())
    assert (found["base"]["copied"], found["b"]["copied"]) == (9, 3)
    assert set(found["b"]["left_out"]) == {n for n in llama_tensors(0) if "layers.0" not in n}


def test_dropped_and_zero_weight_tensors_have_a_reason(tmp_path: Path) -> None:
    paths = trio(tmp_path)
    a = surgery.open(paths[1]).drop("*norm*")
    (use,) = a.plan().uses
    assert use.refused == {n: "dropped by *norm*" for n in llama_tensors(0) if "norm" in n}
    made = plan(recipe(tmp_path, "out: {op: average, of: [a, b], weight: [1, 0]}", models="ab"))
    found = uses(made)
    assert set(found["b"]["left_out"].values()) == {"has no weight in the result"}
    assert len(found["b"]["left_out"]) == 12
    assert made.price.read == sum(v.nbytes for v in llama_tensors(0).values())


def test_missing_tensors_kept_or_skipped_have_a_reason(tmp_path: Path) -> None:
    llama(tmp_path / "a", 0)
    write_checkpoint(tmp_path / "b", llama_tensors(1, head=False), config=llama_config())
    text = "out: {op: average, of: [a, b], missing: %s}"
    with pytest.raises(Refused, match=r"recipe.yaml:5:\d+: out: `lm_head.weight` is in a but not in b") as found:
        plan(recipe(tmp_path, text % "error", models="ab"))
    assert "missing: keep" in str(found.value)
    kept = plan(recipe(tmp_path, text % "keep", models="ab"))
    assert kept.by_name["lm_head.weight"].copies
    skipped = plan(recipe(tmp_path, text % "skip", models="ab"))
    assert "lm_head.weight" not in skipped.by_name
    assert uses(skipped)["a"]["left_out"] == {"lm_head.weight": "not in b (missing: skip)"}
    run(recipe(tmp_path, text % "keep", models="ab"), tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    assert made["lm_head.weight"].tobytes() == llama_tensors(0)["lm_head.weight"].tobytes()


def test_planning_reads_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 2 TB with nothing but holes in them, and a count of bytes read."""
    shape = [1 << 20, 1 << 19]
    size = 2 << 39
    header = {"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        path = write_raw(tmp_path / name / "model.safetensors", header)
        try:
            os.truncate(path, path.stat().st_size + size)
        except OSError:
            pytest.skip("the file system has no files of 1 TB")
    seen = []
    real = builtins.open

    def opened(file: object, *args: object, **options: object) -> object:
        seen.append(str(file))
        return real(file, *args, **options)

    def no_read(*_: object) -> None:
        raise AssertionError("a plan must not read tensors")

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(os, "preadv", no_read)
    monkeypatch.setattr(os, "pread", no_read)
    made = plan(recipe(tmp_path, ADD, models=["base", "a"]))
    assert made.price.read == 2 * size and made.price.written > size
    assert any(s.endswith("model.safetensors") for s in seen)
    assert "1.1 TB" in str(made)


def test_a_plan_of_a_linear_merge_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    trio(tmp_path)
    code = (
        "import sys; sys.argv = ['surgery', 'plan', sys.argv[1]]\n"
        "from surgery.cli import cli; cli.main(standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    )
    path = recipe(tmp_path, ADD, models=["base", "a"])
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plan_as_text_says_what_matters(tmp_path: Path) -> None:
    trio(tmp_path)
    text = str(plan(recipe(tmp_path, ADD, models=["base", "a"])))
    for word in ("WRITE 1 file, 12 tensors", "bfloat16", "COST  read", "peak memory", "out: ADD base, d weight=0.5",
                 "d: DIFF a, base", "INPUT base: 12 tensors: 12 computed with, 0 copied, 0 left out"):  # fmt: skip
        assert word in text


def test_the_plan_as_data_is_json(tmp_path: Path) -> None:
    trio(tmp_path)
    made = plan(recipe(tmp_path, ADD, models=["base", "a"], output="{from: out, shard_size: 500}"))
    data = json.loads(json.dumps(made.as_dict()))
    assert data["tree"]["op"] == "add" and len(data["output"]["tensors"]) == 12
    assert len(data["output"]["files"]) > 1
    assert sum(f["size"] for f in data["output"]["files"]) == data["output"]["bytes"] == data["cost"]["written"]


def test_tokens_change_with_what_matters_alone(tmp_path: Path) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, ADD, models=["base", "a"])
    first = plan(path).token
    assert first == plan(path).token
    assert first != plan(path, **{"steps.out.weight": 0.25}).token
    assert first != plan(path, **{"output.dtype": "float32"}).token
    llama(tmp_path / "a", 5)
    assert first != plan(path).token


@pytest.mark.parametrize("key", ["tokenizer", "integers"])
def test_output_options_name_models(tmp_path: Path, key: str) -> None:
    trio(tmp_path)
    with pytest.raises(Refused, match=r"recipe.yaml:\d+:\d+: `bse` is not a model of this recipe") as found:
        plan(recipe(tmp_path, ADD, models=["base", "a"], output=f"{{from: out, {key}: bse}}"))
    assert "did you mean `base`?" in str(found.value)


def test_the_tokenizer_of_another_model_can_be_taken(tmp_path: Path) -> None:
    trio(tmp_path)
    for name in ("base", "a"):
        (tmp_path / name / "chat_template.jinja").write_text(name)
        (tmp_path / name / "generation_config.json").write_text(f'{{"mark": "{name}"}}')
    run(recipe(tmp_path, ADD, models=["base", "a"], output="{from: out, tokenizer: a}"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "a"
    assert "base" in (tmp_path / "out" / "generation_config.json").read_text()


def test_nothing_to_write_is_refused(tmp_path: Path) -> None:
    llama(tmp_path / "a", 0)
    with pytest.raises(Refused, match="no tensor is left"):
        surgery.open(tmp_path / "a").drop("*").plan()


def test_a_tied_source_is_accounted_for(tmp_path: Path) -> None:
    tensors = llama_tensors(0)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_checkpoint(tmp_path / "a", tensors, config=llama_config(tie_word_embeddings=True))
    (use,) = surgery.open(tmp_path / "a").plan().uses
    assert use.refused == {"lm_head.weight": "tied: config declares it equal to model.embed_tokens.weight"}
    assert use.total == 12
    tensors["lm_head.weight"] = np.zeros_like(tensors["lm_head.weight"])
    write_file(tmp_path / "a" / "model.safetensors", tensors)
    with pytest.raises(Refused, match="but the two differ"):
        surgery.open(tmp_path / "a").save(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_memory_that_is_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    trio(tmp_path)
    path = recipe(tmp_path, ADD, models=["base", "a"])
    for memory in ("1MB", 1000, "1e9GB", "lots", "-1GB"):
        with pytest.raises(Refused):
            run(path, tmp_path / "out", memory=memory)
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(Refused, match=r"--memory 1MB: this plan needs at least \d+(\.\d+)? MB"):
        run(path, tmp_path / "out", memory="1MB")
    made = plan(path)
    run(path, tmp_path / "out", memory=peak_memory(made.price, len(made.programs), 1), threads=8)
    assert read_checkpoint(tmp_path / "out")


def test_threads_must_be_positive(tmp_path: Path) -> None:
    trio(tmp_path)
    for threads in (0, -1):
        with pytest.raises(Refused, match="threads"):
            run(recipe(tmp_path, ADD, models=["base", "a"]), tmp_path / "out", threads=threads)


def test_an_input_changed_after_planning_is_not_used(tmp_path: Path) -> None:
    trio(tmp_path)
    made = plan(recipe(tmp_path, ADD, models=["base", "a"]))
    write_file(tmp_path / "a" / "model.safetensors", llama_tensors(5, dtype=BF16))
    from surgery.engine.run import run as engine_run

    with pytest.raises(Failed, match="changed since it was opened"):
        engine_run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
