"""What is written: right to the last bit, and the same however the work was spread."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    BF16,
    all_bytes,
    bits,
    config_of,
    llama,
    llama_config,
    llama_tensors,
    read_checkpoint,
    recipe,
    run,
    same,
    trio,
    write_checkpoint,
    write_file,
)

import surgery
from surgery.errors import Refused

BIG = {"hidden": 256, "vocab": 1031, "depth": 2}


def depth_of(name: str, depth: int) -> float:
    """Relative depth: 0 for the first block and what feeds it, 1 for the last and what follows."""
    if ".layers." in name:
        return int(name.split(".")[2]) / (depth - 1)
    return 0.0 if "embed" in name else 1.0


def test_task_arithmetic_over_depth_and_names_is_the_float64_result_rounded_once(tmp_path: Path) -> None:
    """Two deltas, LiNeS on their sum, a gradient and a glob map of weights: against the formulas in float64."""
    trio(tmp_path, depth=4)
    steps = """
    da: {op: diff, of: [a, base]}
    db: {op: diff, of: [b, base]}
    part: {op: scale, of: da, by: [0.25, 1.0]}
    sum: {op: add, of: [part, db], weight: [{"*mlp*": 0.5, "*norm*": [1.0, 0.0], "*": 2.0}]}
    scaled: {op: lines, of: sum, alpha: 0.5, beta: 0.25}
    out: {op: add, of: [base, scaled], weight: 0.75}
    """
    run(recipe(tmp_path, steps, output="{from: out, precision: float64}"), tmp_path / "out")
    run(recipe(tmp_path, steps), tmp_path / "single")
    made, single = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "single")
    base, a, b = ({n: v.astype(np.float64) for n, v in read_checkpoint(tmp_path / m).items()} for m in ("base", "a", "b"))
    assert list(made.keys()) and made.keys() == base.keys()
    for name in base:
        t = depth_of(name, 4)
        wa = 0.25 + 0.75 * t
        wb = next(w for g, w in (("*mlp*", 0.5), ("*norm*", 1.0 - t), ("*", 2.0)) if fnmatchcase(name, g))
        block = int(name.split(".")[2]) if ".layers." in name else None
        factor = 0.5 if block is None else 0.5 + 0.25 * block / 3
        total = wa * (a[name] - base[name]) + wb * (b[name] - base[name])
        wanted = (base[name] + 0.75 * factor * total).astype(BF16)
        assert bits(made[name]) == bits(wanted), name
        near = single[name].view(np.int16).astype(int) - wanted.view(np.int16).astype(int)
        assert np.abs(near).max() <= 1 and np.mean(near != 0) < 0.02, name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_average_is_exact_for_every_pair_of_types(tmp_path: Path, dtype: str) -> None:
    """a in float32, b in bfloat16; the output in `dtype`: rounded once, to nearest even."""
    llama(tmp_path / "a", 0, dtype=np.float32)
    llama(tmp_path / "b", 1)
    output = f"{{from: out, dtype: {dtype}, precision: float64}}"
    run(recipe(tmp_path, "out: {op: average, of: [a, b], weight: [1, 3]}", models="ab", output=output), tmp_path / "out")
    made, a, b = (read_checkpoint(tmp_path / n) for n in ("out", "a", "b"))
    kind = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    for name, value in made.items():
        wanted = 0.25 * a[name].astype(np.float64) + 0.75 * b[name].astype(np.float64)
        assert value.dtype == kind and bits(value) == bits(wanted.astype(kind)), name
    assert config_of(tmp_path / "out")["dtype"] == dtype


def test_delta_arithmetic_is_fused_exactly(tmp_path: Path) -> None:
    """base + (fine-tuned - base) is the fine-tuned model to the bit, even where float32 subtraction would round."""
    rng = np.random.default_rng(0)
    for name in ("base", "a"):
        tensors = {n: (v * rng.choice([1e-30, 1.0, 1e20], v.shape)).astype(np.float32)
                   for n, v in llama_tensors(0 if name == "a" else 1, dtype=np.float32).items()}  # fmt: skip
        write_checkpoint(tmp_path / name, tensors, config=llama_config())
    base, a = surgery.open(tmp_path / "base"), surgery.open(tmp_path / "a")
    for i, made in enumerate((base + (a - base), base + 2 * (a - base) / 2, a - (a - base) + (a - base))):
        made.save(tmp_path / f"out{i}")
        same(read_checkpoint(tmp_path / f"out{i}"), read_checkpoint(tmp_path / "a"))
    plan = (base + (a - base)).plan()
    assert all(p.copies for p in plan.programs)
    assert plan.price.read == sum(v.nbytes for v in read_checkpoint(tmp_path / "a").values())


STEPS = {
    "linear": "d: {op: diff, of: [a, base]}\nout: {op: add, of: [base, d], weight: [[0.3, 0.7]]}",
    "ties": "d: {op: diff, of: [a, base]}\ne: {op: diff, of: [b, base]}\nt: {op: ties, of: [d, e], density: 0.4}\n"
    "out: {op: add, of: [base, t]}",
    "dare": "d: {op: diff, of: [a, base]}\nt: {op: dare, of: d, density: 0.4, seed: 3}\nout: {op: add, of: [base, t]}",
    "stock": "out: {op: stock, of: [base, a, b]}",
    "slerp": "out: {op: slerp, of: [a, b], t: 0.3}",
}


@pytest.mark.parametrize("op", STEPS)
def test_bytes_do_not_depend_on_threads_or_shards(tmp_path: Path, op: str) -> None:
    trio(tmp_path, **BIG)
    models = [m for m in ("base", "a", "b") if any(f"{c}{m}{d}" in STEPS[op] for c in "[ " for d in ",]")]
    path = recipe(tmp_path, STEPS[op], models=models)
    for threads in (1, 2, 3):
        run(path, tmp_path / str(threads), threads=threads)
    assert all_bytes(tmp_path / "1") == all_bytes(tmp_path / "2") == all_bytes(tmp_path / "3")
    whole = read_checkpoint(tmp_path / "1")
    for size in ("100kB", "600kB"):
        path = recipe(tmp_path, STEPS[op], models=models, output=f"{{from: out, shard_size: {size}}}")
        run(path, tmp_path / size)
        same(whole, read_checkpoint(tmp_path / size))


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path: Path) -> None:
    trio(tmp_path, **BIG)
    path = recipe(tmp_path, STEPS["linear"], models=["base", "a"], output="{from: out, shard_size: 600kB}")
    run(path, tmp_path / "out")
    files = sorted(p for p in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert [p.name for p in files] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_checkpoint(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert file.stat().st_size < 700e3
    same(tensors, {n: read_checkpoint(tmp_path / "out")[n] for n in tensors})
    assert len(surgery.open(tmp_path / "out")) == len(tensors)


def test_sharded_input_gives_what_a_single_file_gives(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        llama(tmp_path / name, seed)
        llama(tmp_path / "many" / name, seed, shards=3)
    run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "one")
    run(recipe(tmp_path / "many", "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "two")
    same(read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two"))


def test_integer_tensors_must_agree_or_be_chosen(tmp_path: Path) -> None:
    more = {"position_ids": np.arange(6).reshape(1, 6), "flag": np.array([True, False])}
    for seed, name in enumerate("ab"):
        write_checkpoint(tmp_path / name, llama_tensors(seed) | more, config=llama_config())
    steps = "out: {op: average, of: [a, b]}"
    run(recipe(tmp_path, steps, models="ab"), tmp_path / "agree")
    assert bits(read_checkpoint(tmp_path / "agree")["position_ids"]) == bits(more["position_ids"])
    other = more | {"position_ids": np.arange(1, 7).reshape(1, 6)}
    write_file(tmp_path / "b" / "model.safetensors", llama_tensors(1) | other)
    with pytest.raises(Refused, match="`position_ids` is int64 and differs between a and b") as found:
        run(recipe(tmp_path, steps, models="ab"), tmp_path / "out")
    assert "integers: a" in str(found.value)
    assert not list(tmp_path.glob("out*"))
    for name, wanted in (("a", more), ("b", other)):
        run(recipe(tmp_path, steps, models="ab", output=f"{{from: out, integers: {name}}}"), tmp_path / f"from_{name}")
        assert bits(read_checkpoint(tmp_path / f"from_{name}")["position_ids"]) == bits(wanted["position_ids"])


def test_odd_shapes_survive(tmp_path: Path) -> None:
    """Scalars, empty tensors, rank 5, a name that is not ASCII."""
    shapes = {"scalar": (), "empty": (0, 4), "five": (2, 1, 3, 1, 2), "one": (1,), "名前.weight": (3, 3)}
    rng = np.random.default_rng(0)
    for name in "ab":
        write_checkpoint(tmp_path / name, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()})
    run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "out")
    made, a, b = (read_checkpoint(tmp_path / n) for n in ("out", "a", "b"))
    for name, shape in shapes.items():
        assert made[name].shape == shape
        np.testing.assert_allclose(made[name], (a[name].astype(float) + b[name]) / 2, rtol=1e-6, atol=1e-7)
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_average_of_unrelated_float32_tensors_loses_nothing(tmp_path: Path) -> None:
    """Halving is exact, so the average has one rounding, however the two compare."""
    rng = np.random.default_rng(0)
    for name in "ab":
        value = rng.standard_normal(4000) * rng.choice([1e-6, 1.0, 1e6], 4000)
        write_checkpoint(tmp_path / name, {"x": value.astype(np.float32)})
    run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "out")
    made, a, b = (read_checkpoint(tmp_path / n)["x"] for n in ("out", "a", "b"))
    np.testing.assert_array_equal(made, ((a.astype(np.float64) + b) / 2).astype(np.float32))


def test_an_average_that_fits_does_not_overflow_on_the_way(tmp_path: Path) -> None:
    for name, value in (("a", 3e38), ("b", -3e38)):
        write_checkpoint(tmp_path / name, {"x": np.full(4, value, np.float32)})
    run(recipe(tmp_path, "out: {op: average, of: [a, b]}", models="ab"), tmp_path / "out")
    assert read_checkpoint(tmp_path / "out")["x"].tolist() == [0.0] * 4


def test_what_is_written_beside_the_weights(tmp_path: Path) -> None:
    trio(tmp_path)
    (tmp_path / "base" / "LICENSE").write_text("terms")
    (tmp_path / "base" / "optimizer.pt").write_bytes(b"no")
    path = recipe(tmp_path, STEPS["linear"], models=["base", "a"])
    report = run(path, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "surgery.yaml", "surgery.json", "README.md",
                     "LICENSE"}  # fmt: skip
    assert (tmp_path / "out" / "surgery.yaml").read_text() == path.read_text()
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert manifest["tensors"].keys() == read_checkpoint(tmp_path / "out").keys()
    assert [i["name"] for i in manifest["inputs"]] == ["base", "a"]
    assert report.tensors == 12 and report.out == tmp_path / "out"


def test_a_profile_names_every_step(tmp_path: Path) -> None:
    trio(tmp_path)
    report = run(recipe(tmp_path, STEPS["ties"]), tmp_path / "out", profile=True)
    assert report.profile is not None and {"read", "write"} <= report.profile.steps.keys()
