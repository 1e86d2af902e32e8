"""Packages from end to end: files come back byte for byte, whatever became of the tensors."""

import filecmp
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import (
    BF16,
    FP8,
    bits,
    flip_bit,
    llama_config,
    read_checkpoint,
    same,
    tokens,
    write_checkpoint,
    write_file,
    write_json,
)
from packing import on_base, packed, pair, tuned_from

import surgery
from surgery.delta import fingerprint
from surgery.delta.apply import apply, verify
from surgery.delta.check import verify_package
from surgery.delta.choices import fixed
from surgery.delta.codecs.exact import FAST, RAW
from surgery.delta.container import Package
from surgery.delta.pack import pack
from surgery.delta.view import overview
from surgery.errors import Refused
from surgery.inputs import open_node


def kinds(package):
    return {t["name"]: t["kind"] for t in overview(Package(str(package)))["tensors"]}


def rebuilt(base, tuned, folder, **options):
    """Pack, check, apply; the output must be the tuned folder's files."""
    package = packed(base, tuned, **options)
    verify_package(Package(str(package)))
    verify(on_base(package, base), threads=2)
    out = folder / "rebuilt"
    apply(on_base(package, base), out, threads=2, overwrite=True)
    wanted = sorted(p.name for p in tuned.iterdir())
    assert sorted(p.name for p in out.iterdir()) == wanted
    assert filecmp.cmpfiles(tuned, out, wanted, shallow=False) == (wanted, [], [])
    return package


@pytest.mark.parametrize("codec", [None, FAST, RAW], ids=["context", "fast", "raw"])
def test_a_fine_tune_comes_back_file_by_file(tmp_path, codec):
    base, tuned = pair(tmp_path)
    package = rebuilt(base, tuned, tmp_path, **({"codec": codec} if codec else {}))
    assert set(kinds(package).values()) == {"changed"}
    view = overview(Package(str(package)))
    assert view["files"]["tokenizer.json"]["from"] == "base" and view["files"]["config.json"]["from"] == "package"
    assert view["total"]["bytes"] == sum(t["bytes"] for t in view["tensors"])


def test_shards_headers_and_metadata_are_kept(tmp_path):
    base, tuned = pair(tmp_path)
    tensors = read_checkpoint(tuned)
    names = list(tensors)
    (tuned / "model.safetensors").unlink()
    weight_map = {}
    for i, mine in enumerate((names[5:], names[:5])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        header, data = {"__metadata__": {"format": "pt", "by": "someone é"}}, b""
        for name in reversed(mine):
            raw = bits(tensors[name])
            header[name] = {"shape": list(tensors[name].shape), "data_offsets": [len(data), len(data) + len(raw)], "dtype": "BF16"}
            data += raw
        text = json.dumps(header, indent=1).encode() + b"   "
        (tuned / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
        weight_map |= dict.fromkeys(mine, file)
    write_json(tuned / "model.safetensors.index.json", {"weight_map": weight_map})
    rebuilt(base, tuned, tmp_path)


def test_a_resharded_base_is_the_same_base(tmp_path):
    base, tuned = pair(tmp_path)
    package = packed(base, tuned)
    again = write_checkpoint(tmp_path / "again", read_checkpoint(base), shards=3, config=llama_config(), vocab=tokens(130))
    apply(on_base(package, again), tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), read_checkpoint(tuned))


def test_every_type_and_every_pattern(tmp_path):
    rng = np.random.default_rng(0)
    kinds_ = [BF16, FP8, np.float16, np.float32, np.float64, np.int64, np.int32, np.uint8]
    base, tuned = {}, {}
    for kind in map(np.dtype, kinds_):
        for shape in ((), (0,), (0, 4), (1,), (5, 7), (40, 300), (3, 2, 3, 3)):
            raw = rng.integers(0, 256, (*shape, kind.itemsize), dtype=np.uint8)
            moved = raw.copy()
            if raw.size:
                moved.reshape(-1)[:: 2 * kind.itemsize] += 1
            key = f"{kind.name}.{'x'.join(map(str, shape))}"
            base[key], tuned[key] = (np.ascontiguousarray(x).view(kind).reshape(shape) for x in (raw, moved))
    base["flags"], tuned["flags"] = np.array([True, False]), np.array([True, True])
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    rebuilt(tmp_path / "base", tmp_path / "tuned", tmp_path)


def test_nan_infinity_and_minus_zero_are_kept(tmp_path):
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40] * 500, np.float32).reshape(50, 60)
    base, tuned = values.copy(), np.roll(values, 1)
    tuned.view(np.uint32)[0, 0] = 0x7FC12345  # a NaN with a payload
    write_checkpoint(tmp_path / "base", {"w": base})
    write_checkpoint(tmp_path / "tuned", {"w": tuned})
    rebuilt(tmp_path / "base", tmp_path / "tuned", tmp_path)


def test_vocabularies_that_grow_and_shrink(tmp_path):
    base, tuned = pair(tmp_path)
    tensors = read_checkpoint(tuned)
    rng = np.random.default_rng(0)
    for name, rows in (("model.embed_tokens.weight", 150), ("lm_head.weight", 100)):
        grown = np.concatenate([tensors[name], rng.standard_normal((64, 64)).astype(BF16)])
        tensors[name] = grown[:rows]
    write_checkpoint(tuned, tensors)
    package = rebuilt(base, tuned, tmp_path)
    view = {t["name"]: t for t in overview(Package(str(package)))["tensors"]}
    assert view["lm_head.weight"]["resized_from"] == [130, 64]
    fresh = packed(base, tuned, tmp_path / "raw.delta.safetensors", codec=RAW)
    assert view["lm_head.weight"]["bytes"] < overview(Package(str(fresh)))["tensors"][-1]["bytes"]


def test_rows_beyond_a_chunk_of_the_base(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (5000, 512), dtype=np.uint8)
    tuned = np.concatenate([base, rng.integers(0, 256, (3000, 512), dtype=np.uint8)])
    tuned[17, 3] += 1
    for name, value in (("base", base), ("tuned", tuned), ("cut", tuned[:2100])):
        write_checkpoint(tmp_path / name, {"table.weight": value})
    assert len(fingerprint.chunks(base.shape)) == 3
    rebuilt(tmp_path / "base", tmp_path / "tuned", tmp_path)
    rebuilt(tmp_path / "base", tmp_path / "cut", tmp_path)
    rebuilt(tmp_path / "tuned", tmp_path / "base", tmp_path)


def test_renamed_new_dropped_tied_and_retyped_tensors(tmp_path):
    base, tuned = pair(tmp_path)
    old, new = read_checkpoint(base), read_checkpoint(tuned)
    made = {f"language.{name}": value for name, value in new.items()}  # a wrapper's prefix
    made["moved.somewhere"] = made.pop("language.model.norm.weight")
    made["moved.somewhere"] = old["model.norm.weight"]  # the same content under a name that does not tell
    made["language.lm_head.weight"] = made["language.model.embed_tokens.weight"]  # tied, stored twice
    made["language.model.layers.1.mlp.up_proj.weight"] = new["model.layers.1.mlp.up_proj.weight"].astype(np.float32)
    made["adapter.new"] = np.arange(12, dtype=np.float32)
    del made["language.model.layers.2.self_attn.q_proj.weight"]
    write_checkpoint(tuned, made)
    package = rebuilt(base, tuned, tmp_path)
    view = overview(Package(str(package)))
    by_name = {t["name"]: t for t in view["tensors"]}
    assert by_name["language.model.embed_tokens.weight"]["renamed_from"] == "model.embed_tokens.weight"
    assert by_name["moved.somewhere"]["kind"] == "same" and by_name["moved.somewhere"]["renamed_from"] == "model.norm.weight"
    assert by_name["language.lm_head.weight"]["alias_of"] == "language.model.embed_tokens.weight"
    assert by_name["language.lm_head.weight"]["bytes"] == 0
    assert by_name["language.model.layers.1.mlp.up_proj.weight"]["retyped_from"] == "bfloat16"
    assert by_name["adapter.new"]["kind"] == "new"
    assert "model.layers.2.self_attn.q_proj.weight" in view["dropped"]


def test_a_cast_to_a_narrower_type_is_coded_against_the_cast_base(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((300, 64)).astype(np.float32)
    tuned = base.astype(BF16)
    tuned[5, 5] = 9
    write_checkpoint(tmp_path / "base", {"w": base})
    write_checkpoint(tmp_path / "tuned", {"w": tuned})
    package = rebuilt(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert overview(Package(str(package)))["total"]["bytes"] < 1000


def test_unchanged_tensors_cost_nothing(tmp_path):
    base, tuned = pair(tmp_path)
    tensors = read_checkpoint(base)
    tensors["model.norm.weight"] = tuned_from({"n": tensors["model.norm.weight"]})["n"]
    write_checkpoint(tuned, tensors)
    package = rebuilt(base, tuned, tmp_path)
    assert [n for n, kind in kinds(package).items() if kind != "same"] == ["model.norm.weight"]


def test_the_same_bytes_for_every_number_of_threads_and_every_run(tmp_path):
    base, tuned = pair(tmp_path)
    made = [packed(base, tuned, tmp_path / f"{n}.delta.safetensors", threads=n).read_bytes() for n in (1, 2, 5, 1)]
    assert len(set(made)) == 1


def test_a_model_in_a_torch_file_comes_back_as_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    base, tuned = pair(tmp_path)
    shared = torch.randn(130, 64)
    state = {"model.embed_tokens.weight": shared, "lm_head.weight": shared, "x": torch.arange(5)}
    (tuned / "model.safetensors").unlink()
    torch.save(state, tuned / "pytorch_model.bin")
    package = packed(base, tuned)
    apply(on_base(package, base), tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert bits(found[name]) == bits(value.numpy())


def test_chains_compose_without_the_models_between(tmp_path):
    base, one = pair(tmp_path)
    two = write_checkpoint(tmp_path / "two", tuned_from(read_checkpoint(one), 2), config=llama_config(), vocab=tokens(130))
    first, second = packed(base, one, tmp_path / "1.delta.safetensors"), packed(one, two, tmp_path / "2.delta.safetensors")
    chain = surgery.open(second, base=surgery.open(first, base=base))
    out = tmp_path / "both.delta.safetensors"
    pack(open_node(str(base)), chain.node, out, threads=2)
    apply(on_base(out, base), tmp_path / "out", threads=2)
    names = sorted(p.name for p in two.iterdir())
    assert filecmp.cmpfiles(two, tmp_path / "out", names, shallow=False)[0] == names
    assert out.read_bytes() == packed(base, two, tmp_path / "direct.delta.safetensors").read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    base, tuned = pair(tmp_path)
    package, out = packed(base, tuned), tmp_path / "out"
    seen = []

    def stop(done):
        seen.append(done)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply(on_base(package, base), out, threads=1, progress=stop)
    assert not out.exists()
    with pytest.raises(Refused, match="unfinished"):
        apply(on_base(package, base), out)
    partial = next(tmp_path.glob("out.partial")) / "model.safetensors"
    flip_bit(partial, partial.stat().st_size - 1)
    done = apply(on_base(package, base), out, resume=True, threads=2)
    assert 0 < done.resumed < done.tensors
    assert (out / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()


# -- as an input ---------------------------------------------------------------------------------------------------------------


def test_a_package_on_its_base_is_a_checkpoint(tmp_path):
    base, tuned = pair(tmp_path)
    opened = surgery.open(packed(base, tuned), base=base)
    assert opened.space == "weights" and opened.config["tuned"] is True
    import torch

    wanted = read_checkpoint(tuned)
    name = "model.layers.1.mlp.up_proj.weight"
    assert opened[name].dtype == "bfloat16"
    assert bits(wanted[name]) == opened[name].compute().view(torch.uint8).numpy().tobytes()
    merged = 0.5 * (opened - surgery.open(base))
    (surgery.open(base) + merged).save(tmp_path / "half")
    b, t, half = (read_checkpoint(p)[name].astype(np.float64) for p in (base, tuned, tmp_path / "half"))
    assert np.array_equal(half, ((b + t) / 2).astype(ml_dtypes.bfloat16).astype(np.float64))
    opened.save(tmp_path / "saved")
    same(read_checkpoint(tmp_path / "saved"), wanted)
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (tuned / "tokenizer.json").read_bytes()


def test_one_tensor_reads_one_tensor(tmp_path, monkeypatch):
    base, tuned = pair(tmp_path)
    opened = surgery.open(packed(base, tuned), base=base)
    read = []
    whole = Package.read
    monkeypatch.setattr(Package, "read", lambda self, part, *rest: read.append(part) or whole(self, part, *rest))
    opened["model.norm.weight"].compute()
    assert [part for part in read if part.startswith("tensor/")] == ["tensor/model.norm.weight/data"]


def test_packages_in_recipes(tmp_path):
    from helpers import run

    base, tuned = pair(tmp_path)
    packed(base, tuned)
    text = """models:
  tuned: {source: tuned.delta.safetensors, base: base}
  base: base
steps:
  task: {op: diff, of: [tuned, base]}
  back: {op: add, of: [base, task]}
output: {from: back}
"""
    (tmp_path / "r.yaml").write_text(text)
    run(tmp_path / "r.yaml", tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), read_checkpoint(tuned))
    (tmp_path / "r.yaml").write_text(text.replace("base: base}", "base: tuned}"))
    with pytest.raises(Refused, match=r"r.yaml:2:.*its own base"):
        run(tmp_path / "r.yaml", tmp_path / "out2")
    (tmp_path / "r.yaml").write_text(text.replace(", base: base}", "}"))
    with pytest.raises(Refused, match="exact package") as found:
        run(tmp_path / "r.yaml", tmp_path / "out2")
    assert "base: BASE" in found.value.hint


def test_a_live_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50, dtype="bfloat16"
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with __import__("torch").no_grad():
        model.lm_head.weight.add_(0.01)
    model.save_pretrained(tmp_path / "tuned")
    live = surgery.open(packed(tmp_path / "base", tmp_path / "tuned"), base=tmp_path / "base").to_transformers()
    assert (live.lm_head.weight == model.lm_head.weight).all()


# -- fingerprints and golden bytes ------------------------------------------------------------------------------------------------


def test_fingerprints_are_those_of_the_definition():
    from hashlib import sha256

    from surgery.checkpoint.dtypes import BY_NAME

    values = np.arange(3 * 2**19, dtype=np.uint16).reshape(3, 2**19)
    raw = values.tobytes()
    leaves = [sha256(raw[: 2**21]), sha256(raw[2**21 :])]  # whole rows of at most 2^20 elements
    assert fingerprint.chunks(values.shape) == [(0, 2**20), (2**20, 3 * 2**19)]
    wanted = sha256(b"tensor/1 U16 [3, 524288]\n" + b"".join(x.digest() for x in leaves)).hexdigest()
    assert fingerprint.tensor_hash(BY_NAME["U16"], values.shape, [x.hexdigest() for x in leaves]) == wanted
    other = sha256(b"tensor/1 F32 []\n" + sha256(b"\0\0\0\0").digest()).hexdigest()
    root = sha256(b"checkpoint/1\n" + b"a\0" + bytes.fromhex(wanted) + b"b\0" + bytes.fromhex(other)).hexdigest()
    assert fingerprint.root_hash({"b": other, "a": wanted}) == root
    assert fingerprint.tensor_hash(BY_NAME["F32"], (), [sha256(b"\0\0\0\0").hexdigest()]) == other


def test_the_bytes_of_a_package_are_fixed(tmp_path, monkeypatch):
    """Spec 1, to the byte, but for what zstd's version decides: the manifest's content, the header, and an old package read now."""
    write_file(tmp_path / "base" / "model.safetensors", {"w": np.arange(8, dtype=np.float32).reshape(2, 4), "n": np.ones(2, BF16)})
    write_file(tmp_path / "tuned" / "model.safetensors", {"w": np.arange(1, 9, dtype=np.float32).reshape(2, 4), "n": np.ones(2, BF16)})
    monkeypatch.setattr("surgery.delta.pack.__version__", "X")
    package = Package(str(packed(tmp_path / "base", tmp_path / "tuned")))
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    made = json.loads(json.dumps(package.manifest.data))
    for data in (made, golden):
        for part in data["parts"]:
            del part[1:]
        for tensor in data["tensors"].values():
            if "layer" in tensor:
                del tensor["layer"]["lengths"], tensor["layer"]["checks"]
                tensor["layer"].pop("limit", None)
    assert made == golden
    kept = Path(__file__).parent / "golden.delta.safetensors"
    apply(on_base(kept, tmp_path / "base"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "tuned" / "model.safetensors").read_bytes()
    raw = kept.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert list(header) == ["__metadata__", "tensor/w/data", "header/0", "delta/manifest"]
    assert header["__metadata__"]["delta.spec"] == "1" and (8 + length) % 1024 == 0


@pytest.mark.parametrize("memory,most", [(1, 1), (10**9, 4)])
def test_lossy_tensors_share_a_memory_budget(tmp_path, monkeypatch, memory, most):
    """However many threads: no two are coded at once that together take more; the package does not depend on it."""
    import threading
    import time

    from surgery.delta import choices
    from surgery.delta import pack as packing
    from surgery.inputs import open_node

    base, tuned = pair(tmp_path)
    lock, under_way, seen = threading.Lock(), 0, []
    whole = packing.code_lossy

    def slowly(*arguments):
        nonlocal under_way
        with lock:
            under_way += 1
            seen.append(under_way)
        time.sleep(0.02)
        try:
            return whole(*arguments)
        finally:
            with lock:
                under_way -= 1

    choose = choices.fixed(open_node(str(tuned)), "sign", {}, ())
    wanted = packed(base, tuned, tmp_path / "w.delta.safetensors", choose=choose, threads=1).read_bytes()
    monkeypatch.setattr(packing, "code_lossy", slowly)
    made = packed(base, tuned, tmp_path / "m.delta.safetensors", choose=choose, threads=4, memory=memory).read_bytes()
    assert made == wanted
    assert len(seen) == 6 and max(seen) <= most and (max(seen) > 1) == (most > 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_the_stated_bound_holds_for_what_a_reader_gets(tmp_path: Path, dtype: str, size: float) -> None:
    """A quantiser's bound is stated with the rounding of the result included: near large weights that is the larger part."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    generator, kind = torch.Generator().manual_seed(3), getattr(torch, dtype)
    base = (torch.randn(70, 90, generator=generator) * size).to(kind)
    tuned = (base.double() + torch.randn(70, 90, generator=generator) * size * 1e-2).to(kind)
    for name, tensor in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({"model.layers.0.x.weight": tensor}, tmp_path / name / "model.safetensors")
    choose = fixed(open_node(str(tmp_path / "tuned")), "dither", {"bits": 1.0}, ["*"])
    node = on_base(packed(tmp_path / "base", tmp_path / "tuned", choose=choose), tmp_path / "base")
    (entry,) = node.package.manifest.entries.values()
    stated = entry.layer["error"]
    assert stated["max_abs"] <= stated["bound"]
    apply(node, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.x.weight"]
    worst = float((got.double() - tuned.double()).abs().max())
    assert worst == pytest.approx(stated["max_abs"], rel=1e-3, abs=1e-12) and worst <= stated["bound"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("most", [1e-4, 1e-3, 1e-2])
def test_an_asked_error_holds_after_rounding(tmp_path: Path, dtype: str, most: float) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    generator, kind = torch.Generator().manual_seed(4), getattr(torch, dtype)
    base = torch.randn(70, 90, generator=generator).to(kind)
    tuned = (base.double() + torch.randn(70, 90, generator=generator) * 1e-2).to(kind)
    for name, tensor in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file({"model.layers.0.x.weight": tensor}, tmp_path / name / "model.safetensors")
    choose = fixed(open_node(str(tmp_path / "tuned")), "dither", {"max_error": most}, ["*"])
    node = on_base(packed(tmp_path / "base", tmp_path / "tuned", choose=choose), tmp_path / "base")
    apply(node, tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.x.weight"]
    assert float((got.double() - tuned.double()).abs().max()) <= most
    (entry,) = node.package.manifest.entries.values()
    assert entry.layer["error"]["bound"] <= most
