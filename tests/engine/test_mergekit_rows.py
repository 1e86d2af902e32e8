"""What goes wrong in mergekit 0.1.5 (METHODS.md, A.3): row by row, and what happens here."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    BF16,
    FP8,
    VOCAB,
    all_bytes,
    bits,
    config_of,
    flip_bit,
    llama,
    llama_config,
    llama_tensors,
    plan,
    read_checkpoint,
    recipe,
    run,
    surgery,
    tokens,
    trio,
    write_checkpoint,
    write_file,
    write_json,
)

import surgery as package
from surgery.errors import Refused

AVERAGE = "out: {op: average, of: [a, b]}"


def pair(folder: Path, **more: object) -> Path:
    """Models a and b, and a recipe that averages them."""
    for seed, name in enumerate("ab"):
        llama(folder / name, seed, **more)
    return recipe(folder, AVERAGE, models="ab")


def edited(folder: Path, **tensors: np.ndarray) -> None:
    """Model a or b in `folder` written again with some tensors replaced; `__` stands for a dot."""
    named = {n.replace("__", "."): v for n, v in tensors.items()}
    write_file(folder / "model.safetensors", read_checkpoint(folder) | named)


def test_a3_row_01_tensors_that_no_template_knows_are_merged(tmp_path: Path) -> None:
    """Biases (attention_bias, mlp_bias) are tensors like any other: none is dropped."""
    path = pair(tmp_path)
    for seed, name in enumerate("ab"):
        more = {
            f"model.layers.{i}.{part}.bias": np.full(8, seed + i, BF16)
            for i in range(3)
            for part in ("self_attn.q_proj", "mlp.up_proj", "some.thing_new")
        }
        write_file(tmp_path / name / "model.safetensors", read_checkpoint(tmp_path / name) | more)
    run(path, tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    assert made.keys() == read_checkpoint(tmp_path / "a").keys()
    assert made["model.layers.2.some.thing_new.bias"].tolist() == [2.5] * 8


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a3_row_02_fp8_codes_are_not_merged_as_values(tmp_path: Path, dtype: str | None) -> None:
    """fp8 codes with scales are merged as the weights that they stand for, and copied unharmed otherwise."""
    path = pair(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    weights = {}
    for model, scale in (("a", 2.0), ("b", 0.5)):
        tensors = read_checkpoint(tmp_path / model)
        tensors[name] = tensors[name].astype(np.float32).astype(FP8)
        tensors[f"{name}_scale_inv"] = np.full((1, 1), scale, np.float32)
        weights[model] = tensors[name].astype(np.float64) * scale
        write_file(tmp_path / model / "model.safetensors", tensors)
    output = "{from: out}" if dtype is None else f"{{from: out, dtype: {dtype}}}"
    path = recipe(tmp_path, AVERAGE, models="ab", output=output)
    run(path, tmp_path / "out")
    made = read_checkpoint(tmp_path / "out")
    assert f"{name}_scale_inv" not in made
    assert np.allclose(made[name].astype(np.float64), (weights["a"] + weights["b"]) / 2, rtol=2**-8)
    run(recipe(tmp_path, models="a", output="{from: a}"), tmp_path / "copy")
    copy = read_checkpoint(tmp_path / "copy")
    assert bits(copy[name]) == bits(read_checkpoint(tmp_path / "a")[name]) and f"{name}_scale_inv" in copy
    if dtype is not None:
        run(recipe(tmp_path, models="a", output=f"{{from: a, dtype: {dtype}}}"), tmp_path / "converted")
        assert np.allclose(read_checkpoint(tmp_path / "converted")[name].astype(np.float64), weights["a"], rtol=2**-8)
    tensors = read_checkpoint(tmp_path / "a")
    tensors[f"{name}_scale_inv"] = np.ones((3, 5, 7), np.float32)
    write_file(tmp_path / "a" / "model.safetensors", tensors)
    with pytest.raises(Refused, match=r"scale.*not a scale per tensor") as found:
        plan(recipe(tmp_path, AVERAGE, models="ab", output=output))
    assert name in str(found.value)


def test_a3_row_03_overwriting_leaves_no_stale_files(tmp_path: Path) -> None:
    """A run into an existing output is refused; with --overwrite the old one is gone whole, both ways round."""
    path, out = pair(tmp_path), tmp_path / "out"
    run(path, out)
    sharded = recipe(tmp_path, AVERAGE, models="ab", output="{from: out, shard_size: 500}")
    with pytest.raises(Refused, match="already holds something"):
        run(sharded, out)
    (out / "junk.safetensors").write_bytes(b"old")
    run(sharded, out, overwrite=True)
    assert not (out / "model.safetensors").exists() and not (out / "junk.safetensors").exists()
    many = read_checkpoint(out)
    run(recipe(tmp_path, AVERAGE, models="ab"), out, overwrite=True)
    assert [p.name for p in out.glob("model*")] == ["model.safetensors"]
    assert {n: bits(v) for n, v in read_checkpoint(out).items()} == {n: bits(v) for n, v in many.items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out", "recipe.yaml"]


@pytest.mark.parametrize("where", ["a", "b", "a/inside", ".", "a/../b", "link"])
def test_a3_row_04_output_is_never_an_input(tmp_path: Path, where: str) -> None:
    """Writing onto, into or above an input is refused, --overwrite or not; the input stays as it was."""
    path = pair(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = all_bytes(tmp_path / "a"), all_bytes(tmp_path / "b")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="input"):
            run(path, tmp_path / where, overwrite=overwrite)
    assert (all_bytes(tmp_path / "a"), all_bytes(tmp_path / "b")) == before


def test_a3_row_05_nothing_depends_on_the_process(tmp_path: Path) -> None:
    """Without a base model, config and tokenizer come from the first input, whatever the hash seed."""
    path = pair(tmp_path)
    for model in "ab":
        write_json(tmp_path / model / "config.json", llama_config(mark=model))
    seen = []
    for seed in ("0", "1", "2"):
        done = surgery("run", path, "-o", tmp_path / seed, env={**os.environ, "PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
        seen.append(all_bytes(tmp_path / seed))
    assert seen[0] == seen[1] == seen[2]
    assert config_of(tmp_path / "0")["mark"] == "a"


def test_a3_row_06_rows_that_stand_for_other_tokens_are_not_mixed(tmp_path: Path) -> None:
    """Equal vocabulary sizes with other token ids: refused at plan time, naming both models."""
    path = pair(tmp_path)
    plan(path)
    write_checkpoint(tmp_path / "b", llama_tensors(1), config=llama_config(), vocab=tokens(shift=1))
    with pytest.raises(Refused, match=r"tokenizers of a and b differ: 13 tokens have other ids"):
        plan(path)
    body = recipe(tmp_path, 'out: {op: stitch, of: [a, b], rules: {"*.mlp.*": b, "*": a}}', models="ab")
    plan(body)  # no table is combined: fine


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_a3_row_07_non_finite_input_is_named(tmp_path: Path, value: float, word: str) -> None:
    """One NaN or infinity: refused with model, tensor and position, nothing left; allowed on request."""
    path = pair(tmp_path)
    bad = np.ones((16, 8), BF16)
    bad[3, 2] = value
    edited(tmp_path / "b", model__layers__1__mlp__up_proj__weight=bad)
    with pytest.raises(Refused) as found:
        run(path, tmp_path / "out")
    said = str(found.value)
    assert f"b: `model.layers.1.mlp.up_proj.weight` holds {word} (first at flat index 26" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "recipe.yaml"]
    run(path, tmp_path / "out", allow_nonfinite=True)
    made = read_checkpoint(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].astype(np.float64)
    assert np.flatnonzero(~np.isfinite(made)).tolist() == [26]


def test_a3_row_08_overflow_of_the_output_type_is_refused(tmp_path: Path) -> None:
    """1e6 does not fit float16: refused, naming the tensor; nothing is left."""
    pair(tmp_path)
    for model in "ab":
        edited(tmp_path / model, model__norm__weight=np.full(8, 1e6, BF16))
    path = recipe(tmp_path, AVERAGE, models="ab", output="{from: out, dtype: float16}")
    with pytest.raises(Refused, match=r"`model.norm.weight`: the result does not fit float16 .*65504"):
        run(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "recipe.yaml"]


def test_a3_row_09_relative_paths_work_offline(tmp_path: Path) -> None:
    """`org/a` is a folder here: nothing asks the hub, and the tokenizer is written."""
    for seed, name in enumerate("ab"):
        llama(tmp_path / "org" / name, seed)
    text = "models: {a: org/a, b: org/b}\nsteps:\n  out: {op: average, of: [a, b]}\noutput: {from: out}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = surgery("run", "recipe.yaml", "-o", "org/out", cwd=tmp_path, env=offline)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "org/out/tokenizer.json").read_bytes() == (tmp_path / "org/a/tokenizer.json").read_bytes()
    assert len(read_checkpoint(tmp_path / "org/out")) == 12


def test_a3_row_10_a_changed_intermediate_is_computed_again(tmp_path: Path) -> None:
    """Nothing is kept of named documents: the result is that of the file as it is now."""
    trio(tmp_path, dtype=np.float32)
    text = (
        "merge_method: linear\nname: half\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: WEIGHT}}\n---\n"
        "merge_method: linear\nmodels:\n  - {model: half, parameters: {weight: 1}}\n  - {model: base, parameters: {weight: 1}}\n"
    )
    a, b, base = (read_checkpoint(tmp_path / n) for n in ("a", "b", "base"))
    for weight in (1.0, 3.0):
        (tmp_path / "m.yml").write_text(text.replace("WEIGHT", str(weight)))
        run(tmp_path / "m.yml", tmp_path / "out", overwrite=True)
        for name, value in read_checkpoint(tmp_path / "out").items():
            wanted = ((a[name] + weight * b[name]) / (1.0 + weight) + base[name]) / 2
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)
    assert not [p for p in tmp_path.iterdir() if "half" in p.name]


def test_a3_row_11_an_adapter_trained_again_is_read_again(tmp_path: Path) -> None:
    """No merged copy of base and adapter is kept anywhere, neither on disk nor in the process."""
    base = llama(tmp_path / "base", 0, dtype=np.float32)
    (tmp_path / "m.yml").write_text("merge_method: passthrough\nmodels: [{model: base+adapter}]\n")
    name = "model.layers.0.self_attn.q_proj.weight"
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((2, 8), dtype=np.float32), rng.standard_normal((8, 2), dtype=np.float32)
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        write_file(tmp_path / "adapter" / "adapter_model.safetensors", {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b})
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
        write_json(tmp_path / "adapter" / "adapter_config.json", config)
        run(tmp_path / "m.yml", tmp_path / "out", overwrite=True)
        got = read_checkpoint(tmp_path / "out")[name]
        np.testing.assert_allclose(got, read_checkpoint(base)[name] + b @ a, rtol=1e-5, atol=1e-6)


def test_a3_row_12_output_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error midway leaves OUT absent and a resumable OUT.partial; a full disk is noticed before work begins."""
    from surgery.checkpoint.writer import Writer
    from surgery.errors import Failed

    path, out = pair(tmp_path), tmp_path / "out"
    run(path, tmp_path / "whole")
    write, calls = Writer.write, []

    def breaks(self: Writer, name: str, start: int, data: object) -> None:
        calls.append(name)
        if len(calls) == 6:
            raise Failed("no space left")
        write(self, name, start, data)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", breaks)
        with pytest.raises(Failed):
            run(path, out, threads=1)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    run(path, out, resume=True)
    assert all_bytes(out) == all_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a3_row_13_everything_headers_can_tell_is_found_by_the_plan(tmp_path: Path) -> None:
    """Shape mismatch, missing tensor, bad layer index, bad dtype, parameter out of range: no data is read."""
    trio(tmp_path)
    tensors = read_checkpoint(tmp_path / "b")
    wide = tensors | {"model.norm.weight": np.ones(9, BF16)}
    less = {n: v for n, v in tensors.items() if n != "model.norm.weight"}
    cases = [
        (wide, AVERAGE, "{from: out}", r"shapes differ for `model.norm.weight`: \[8\] in a, \[9\] in b"),
        (less, AVERAGE, "{from: out}", "`model.norm.weight` is in a but not in b"),
        (tensors, AVERAGE, "{from: out, dtype: bfloat17}", "bfloat17"),
        (tensors, AVERAGE, "{from: out, dtype: int8}", "int8"),
    ]
    for content, steps, output, said in cases:
        write_file(tmp_path / "b" / "model.safetensors", content)
        with pytest.raises(Refused, match=said):
            plan(recipe(tmp_path, steps, models="ab", output=output))
    write_file(tmp_path / "b" / "model.safetensors", tensors)
    deltas = "d: {op: diff, of: [a, base]}\ne: {op: diff, of: [b, base]}\n"
    for op, of in (("ties", "[d, e]"), ("dare", "d")):
        with pytest.raises(Refused, match="`density` must be"):
            plan(recipe(tmp_path, f"{deltas}t: {{op: {op}, of: {of}, density: 1.5}}\nout: {{op: add, of: [base, t, d, e]}}"))
    with pytest.raises(Refused, match="blocks 0 to 2"):
        package.open(tmp_path / "a").layers[[0, 3]]


@pytest.mark.parametrize("position", [0.1, 0.5, 0.999])
def test_a3_row_14_damage_to_our_own_outputs_is_found(tmp_path: Path, position: float) -> None:
    """One flipped bit in weights that have a surgery.json beside them: refused, naming the tensor."""
    run(pair(tmp_path), tmp_path / "made")
    weights = tmp_path / "made" / "model.safetensors"
    run(recipe(tmp_path, models=["made"], output="{from: made}"), tmp_path / "copy")
    raw = weights.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    at = start + int((len(raw) - start) * position)
    before = read_checkpoint(tmp_path / "made")
    flip_bit(weights, at)
    after = read_checkpoint(tmp_path / "made")
    (name,) = (n for n in before if bits(before[n]) != bits(after[n]))
    steps = "out: {op: average, of: [made, a]}"
    for text, models, source in ((steps, ["made", "a"], "out"), ("", ["made"], "made")):
        with pytest.raises(Refused, match=rf"`{name}` is damaged"):
            run(recipe(tmp_path, text, models=models, output=f"{{from: {source}}}"), tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a3_row_14_truncated_file_is_refused(tmp_path: Path) -> None:
    """A file that ends early: refused when it is opened."""
    path = pair(tmp_path)
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Refused, match="is truncated"):
        plan(path)


def test_a3_row_17_config_tells_the_true_depth(tmp_path: Path) -> None:
    """Four blocks stacked from three: config says four, names are 0 to 3, no tokenizer is invented."""
    write_checkpoint(tmp_path / "a", llama_tensors(0), config=llama_config())
    package.open(tmp_path / "a").layers[[0, 1, 1, 2]].save(tmp_path / "out")
    made, given = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "a")
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 4
    for new, old in enumerate([0, 1, 1, 2]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert bits(made[name.format(new)]) == bits(given[name.format(old)])
    assert len(made) == 15
    assert not list((tmp_path / "out").glob("*token*"))


def test_a3_row_18_model_stock_of_small_deltas(tmp_path: Path) -> None:
    """Two equal offsets of norm 1e-4: the angle is 0, so t is 1 and the offset is kept whole."""
    base = llama_tensors(0, dtype=np.float32)
    moved = {n: v + np.float32(1e-4 / np.sqrt(v.size)) for n, v in base.items()}
    for name, tensors in (("base", base), ("a", moved), ("b", moved)):
        write_checkpoint(tmp_path / name, tensors, config=llama_config())
    run(recipe(tmp_path, "out: {op: stock, of: [base, a, b]}"), tmp_path / "out")
    for name, value in read_checkpoint(tmp_path / "out").items():
        np.testing.assert_allclose(value - base[name], moved[name] - base[name], rtol=1e-2, atol=3e-7)


@pytest.mark.parametrize("method", ["ramplus_tl", "arcee_fusion"])
def test_a3_row_19_half_precision_stays_half(tmp_path: Path, method: str) -> None:
    trio(tmp_path)  # bfloat16
    models = "  - {model: a}\n" + ("  - {model: b}\n" if method == "ramplus_tl" else "")
    (tmp_path / "m.yml").write_text(f"merge_method: {method}\nbase_model: base\nmodels:\n{models}")
    run(tmp_path / "m.yml", tmp_path / "out")
    assert {str(v.dtype) for v in read_checkpoint(tmp_path / "out").values()} == {"bfloat16"}
    assert config_of(tmp_path / "out").get("dtype", config_of(tmp_path / "out").get("torch_dtype")) == "bfloat16"


def test_a3_row_20_random_masks_belong_to_the_tensor(tmp_path: Path) -> None:
    """DARE twice, with other threads, or of some tensors only: the same bits. Another seed: others."""
    import torch

    paths = trio(tmp_path)
    steps = "d: {op: diff, of: [a, base]}\nt: {op: dare, of: d, density: 0.5, seed: %d}\nout: {op: add, of: [base, t]}"
    for name, seed, threads in (("x", 1, 1), ("y", 1, 3), ("z", 2, 2)):
        run(recipe(tmp_path, steps % seed, models=["base", "a"]), tmp_path / name, threads=threads)
    x, y, z = (read_checkpoint(tmp_path / n) for n in "xyz")
    assert all(bits(x[n]) == bits(y[n]) for n in x) and any(bits(x[n]) != bits(z[n]) for n in x)
    dare = package.ops.dare
    base, a = (package.open(p).select("*layers.1*") for p in paths[:2])
    part = base + dare(a - base, density=0.5, seed=1)
    for name in part:
        assert bits(part[name].compute().view(torch.uint16).numpy()) == bits(x[name])


def test_a3_row_21_tied_and_untied_models(tmp_path: Path) -> None:
    """A tied base and an untied model: the head that is written makes config say untied, with a warning."""
    write_checkpoint(tmp_path / "a", llama_tensors(0, head=False), config=llama_config(tie_word_embeddings=True))
    write_checkpoint(tmp_path / "b", llama_tensors(1), config=llama_config())
    made = plan(recipe(tmp_path, AVERAGE, models="ab"))
    assert any("untied" in w for w in made.warnings)
    run(recipe(tmp_path, AVERAGE, models="ab"), tmp_path / "out")
    config, tensors = config_of(tmp_path / "out"), read_checkpoint(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    embed, other = (read_checkpoint(tmp_path / n) for n in "ab")
    wanted = (embed["model.embed_tokens.weight"].astype(np.float64) + other["lm_head.weight"].astype(np.float64)) / 2
    assert bits(tensors["lm_head.weight"]) == bits(wanted.astype(BF16))


def test_a3_row_21_two_tied_models_stay_tied(tmp_path: Path) -> None:
    """Both tied: one table is written, config still says tied."""
    for seed, name in enumerate("ab"):
        tensors = llama_tensors(seed, head=False)
        write_checkpoint(tmp_path / name, tensors, config=llama_config(tie_word_embeddings=True))
    run(recipe(tmp_path, AVERAGE, models="ab"), tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in read_checkpoint(tmp_path / "out")


def test_a3_row_22_layers_can_be_interleaved(tmp_path: Path) -> None:
    """Layer shuffles are stitches of renumbered models; config stays true."""
    pair(tmp_path)
    a, b = (package.open(tmp_path / n) for n in "ab")
    mixed = package.ops.stitch(a.layers[[2, 0]], b.layers[[1, 1]], rules={"model.layers.1.*": 1, "*": 0})
    mixed.save(tmp_path / "out")
    made, theirs = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "b")
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2
    name = "model.layers.1.mlp.up_proj.weight"
    assert bits(made[name]) == bits(theirs[name]) and len(made) == 9


def test_a3_row_23_a_filter_without_a_match_is_an_error(tmp_path: Path) -> None:
    """A glob that matches nothing is refused with the place in the recipe."""
    pair(tmp_path)
    steps = 'out: {op: average, of: [a, b], weight: [{"*.mpl.*": 0.5, "*": 1}, 1]}'
    with pytest.raises(Refused, match=r"recipe.yaml:5:\d+: out: `weight`: no tensor matches `\*.mpl.\*`"):
        plan(recipe(tmp_path, steps, models="ab"))
    with pytest.raises(Refused, match="no tensor matches"):
        package.open(tmp_path / "a").select("*.mpl.*").plan()


def test_a3_row_24_files_have_the_mode_that_umask_asks_for(tmp_path: Path) -> None:
    """All files 0644 under umask 022, 0640 under 027."""
    path = pair(tmp_path)
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            run(recipe(tmp_path, AVERAGE, models="ab", output="{from: out, shard_size: 500}"), tmp_path / oct(mask))
        finally:
            os.umask(before)
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / oct(mask)).iterdir()}
        assert set(modes.values()) == {mode}, modes
    assert path.exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 7, None])
def test_a3_row_25_an_index_cannot_point_elsewhere(tmp_path: Path, name: object) -> None:
    """Shard names that leave the folder are refused, also where the file exists."""
    write_file(tmp_path / "secret.safetensors", {"x": np.ones(2, np.float32)})
    (tmp_path / "m" / "sub").mkdir(parents=True)
    write_file(tmp_path / "m" / "sub" / "x.safetensors", {"x": np.ones(2, np.float32)})
    index = {"metadata": {}, "weight_map": {"x": name}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Refused, match="points outside"):
        package.open(tmp_path / "m")


def test_a3_row_26_nothing_is_remembered_between_runs(tmp_path: Path) -> None:
    """A second run in one process after inputs changed sees the new files; a plan made before is refused."""
    from surgery.engine.run import run as engine_run
    from surgery.errors import SurgeryError

    path = pair(tmp_path)
    run(path, tmp_path / "one")
    stale = plan(path)
    llama(tmp_path / "b", 7, shards=2)
    (tmp_path / "b" / "model.safetensors").unlink()
    run(path, tmp_path / "two")
    wanted = (llama_tensors(0)["model.norm.weight"].astype(np.float64) + llama_tensors(7)["model.norm.weight"]) / 2
    assert bits(read_checkpoint(tmp_path / "two")["model.norm.weight"]) == bits(wanted.astype(BF16))
    with pytest.raises(SurgeryError):
        engine_run(stale, tmp_path / "three")
    write_file(tmp_path / "a" / "model.safetensors", llama_tensors(9))
    run(path, tmp_path / "four")
    assert all_bytes(tmp_path / "four")["model.safetensors"] != all_bytes(tmp_path / "two")["model.safetensors"]
    assert VOCAB == 13
