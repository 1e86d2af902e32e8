"""Wrong bases, damage and forgery: one clear line each, and nothing written."""

import json
import os
import struct

import numpy as np
import pytest
import zstandard
from helpers import flip_bit, llama, llama_config, read_checkpoint, tokens, write_checkpoint
from jsonschema import Draft202012Validator
from packing import forge, on_base, packed, pair
from safetensors.numpy import load_file

import surgery
from surgery.delta.apply import apply, verify
from surgery.delta.check import verify_package
from surgery.delta.container import Package
from surgery.delta.schema import SCHEMA
from surgery.errors import Failed, Refused


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base, tuned = pair(folder)
    return base, tuned, packed(base, tuned)


def refused(make, *words, out=None):
    with pytest.raises(Refused) as found:
        make()
    for word in words:
        assert word in found.value.message, found.value.message
    assert "\n" not in found.value.message
    if out is not None:
        assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    return found.value


# -- wrong bases ---------------------------------------------------------------------------------------------------------------


def test_the_fine_tune_is_not_its_base(made, tmp_path):
    _, tuned, package = made
    refused(lambda: apply(on_base(package, tuned), tmp_path / "o"), "not the base", "other values", out=tmp_path / "o")


@pytest.mark.parametrize("at", [-1, -20_000, -40_001])
def test_a_base_with_one_changed_bit(made, tmp_path, at):
    base, _, package = made
    other = write_checkpoint(tmp_path / "b", read_checkpoint(base), config=llama_config(), vocab=tokens(130))
    file = other / "model.safetensors"
    flip_bit(file, file.stat().st_size + at)
    refused(lambda: apply(on_base(package, other), tmp_path / "o"), "not the base", out=tmp_path / "o")
    refused(lambda: verify(on_base(package, other)), "not the base")


@pytest.mark.parametrize("kind", ["cut", "cast", "alone", "same"])
def test_one_changed_bit_is_seen_where_the_result_does_not_tell(tmp_path, kind):
    """Rows that are left out, casts that round it away, chunks coded without the base: its hash is compared all the same."""
    rng = np.random.default_rng(0)
    old = rng.standard_normal((40, 50)).astype(np.float32)
    new = {"cut": old[:30] + np.float32(0.01), "cast": old.astype(np.float16), "alone": np.zeros((40, 50), np.float32), "same": old}
    base = write_checkpoint(tmp_path / "base", {"w": old})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": new[kind], "n": np.ones(3, np.float32)})
    package = packed(base, tuned)
    verify(on_base(package, base))
    file = base / "model.safetensors"
    flip_bit(file, file.stat().st_size - 4)  # the lowest bit of the last number
    refused(lambda: verify(on_base(package, base)), "not the base", "`w`")


def test_another_architecture_is_refused_from_headers_alone(made, tmp_path):
    _, _, package = made
    wider = llama(tmp_path / "wide", 0, hidden=72, vocab=130)
    found = refused(lambda: on_base(package, wider), "model.embed_tokens.weight", "[130, 72]", "expected", "[130, 64]")
    assert "base: 12 tensors" in found.hint or "base" in found.hint
    shallow = llama(tmp_path / "shallow", 0, hidden=64, vocab=130, depth=2)
    refused(lambda: on_base(package, shallow), "has no `model.layers.2")
    more = read_checkpoint(made[0]) | {"extra": np.zeros(3, np.float32)}
    refused(lambda: on_base(package, write_checkpoint(tmp_path / "more", more)), "13 tensors", "expected 12")


def test_a_base_without_its_tokenizer(made, tmp_path):
    base, _, package = made
    bare = write_checkpoint(tmp_path / "bare", read_checkpoint(base))
    refused(lambda: apply(on_base(package, bare), tmp_path / "o"), "tokenizer.json", "missing", out=tmp_path / "o")


def test_a_delta_is_no_base_and_a_checkpoint_no_package(made, tmp_path):
    base, tuned, package = made
    delta = surgery.open(tuned) - surgery.open(base)
    refused(lambda: surgery.open(package, base=delta), "must be weights")
    refused(lambda: surgery.open(tuned / "model.safetensors", base=base), "no delta package")
    refused(lambda: Package(str(tuned / "model.safetensors")), "no delta package")
    refused(lambda: Package(str(tmp_path / "none.delta.safetensors")), "no such package")


# -- damage ----------------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(made, tmp_path):
    """600 positions, all of the header's first and last bytes among them."""
    base, tuned, package = made
    raw = package.read_bytes()
    wanted = (tuned / "model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    positions = [*range(40), *range(len(raw) - 40, len(raw)), *rng.integers(0, len(raw), 520)]
    copy, slipped = tmp_path / "flipped.delta.safetensors", []
    for i, at in enumerate(positions):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        copy.write_bytes(damaged)
        try:
            verify_package(Package(str(copy)))
            slipped.append(at)
        except Refused as problem:
            assert "\n" not in problem.message
        if i % 12 == 0:
            try:
                apply(on_base(copy, base), tmp_path / "o", overwrite=True, threads=1)
                assert (tmp_path / "o" / "model.safetensors").read_bytes() == wanted, at
                slipped.append(at)
            except Refused:
                assert not (tmp_path / "o").exists()
    assert not slipped


def test_truncation_and_additions(made, tmp_path):
    raw = made[2].read_bytes()
    copy = tmp_path / "cut.delta.safetensors"
    for changed in (raw[:-1], raw[: len(raw) // 2], raw[:100], b"", raw + b"\0"):
        copy.write_bytes(changed)
        refused(lambda: Package(str(copy)), "cut.delta.safetensors")


def test_a_payload_swapped_for_another(made, tmp_path):
    """Both are intact, in the wrong places, and the checks are made to fit: the rebuilt tensor's hash tells."""
    base, _, package = made

    def swap(data):
        a, b = (data["tensors"][f"model.layers.{i}.self_attn.q_proj.weight"] for i in (0, 1))
        a["sha256"], b["sha256"] = b["sha256"], a["sha256"]
        hashes = {n: t["sha256"] for n, t in data["tensors"].items()}
        from surgery.delta.fingerprint import root_hash

        data["target"]["root"] = root_hash(hashes)

    forged = forge(package, swap, tmp_path / "f.delta.safetensors")
    verify_package(Package(str(forged)))
    refused(lambda: apply(on_base(forged, base), tmp_path / "o"), "comes out other than", out=tmp_path / "o")


# -- forgery -----------------------------------------------------------------------------------------------------------------------


def first(data):
    return data["tensors"]["lm_head.weight"]


FORGERIES = {
    "unknown spec": (lambda d: d.update(spec=2), "spec 2"),
    "unknown field": (lambda d: d.update(run="rm"), "wrong"),
    "unknown codec": (lambda d: first(d)["layer"].update(codec="magic/9"), "magic/9"),
    "unknown mode": (lambda d: d.update(mode="hot"), "mode"),
    "path with dots": (lambda d: d["files"].update({"../evil": dict(d["files"]["tokenizer.json"])}), "outside"),
    "absolute path": (lambda d: d["files"].update({"/etc/evil": dict(d["files"]["tokenizer.json"])}), "outside"),
    "hidden path": (lambda d: d["files"].update({"a/.ssh": dict(d["files"]["tokenizer.json"])}), "outside"),
    "weights elsewhere": (lambda d: d["target"]["files"][0].update(path="x/../../evil"), "outside"),
    "a file twice": (lambda d: d["files"].update({"MODEL.safetensors": dict(d["files"]["tokenizer.json"])}), "twice"),
    "enormous tensor": (lambda d: first(d).update(shape=[2**40, 2**40]), "larger than any file"),
    "negative size": (lambda d: first(d).update(shape=[-1, 64]), "wrong"),
    "other base shape": (lambda d: first(d)["base"].update(shape=[130, 32]), "cannot be made"),
    "no base for the same": (lambda d: first(d).update(same=True), "must be one of"),
    "alias of nothing": (lambda d: (first(d).pop("layer"), first(d).update(alias="nothing")), "not"),
    "missing part": (lambda d: d["parts"].pop(0), "parts"),
    "longer chunk": (lambda d: first(d)["layer"].update(lengths=[1 << 40]), "not as long"),
    "more chunks": (lambda d: first(d)["layer"].update(lengths=[1, 1], checks="0" * 32), "number of chunks"),
    "other root": (lambda d: d["target"].update(root="0" * 64), "root"),
    "lossy in an exact package": (
        lambda d: first(d).update(
            layer={"codec": "dither/1", "key": "x", "parts": [], "facts": {}, "error": {"max_abs": 0, "rel_fro": 0, "gain": 1}}
        ),
        "losses",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifests_are_refused_when_they_are_opened(made, tmp_path, name):
    change, word = FORGERIES[name]
    forged = forge(made[2], change, tmp_path / "f.delta.safetensors")
    refused(lambda: Package(str(forged)), word)


def test_files_that_contradict_the_manifest(made, tmp_path):
    base, _, package = made
    for change in (
        lambda d: first(d).update(shape=[1300, 64]),
        lambda d: d["target"]["files"][0].update(size=10),
        lambda d: d["target"]["files"][0].update(header=10**8 - 1),
        lambda d: d["target"]["files"][0].update(header=2**40),
        lambda d: d["files"]["config.json"].update(size=2**40),
        lambda d: d["files"]["config.json"].update(sha256="0" * 64),
    ):
        forged = forge(package, change, tmp_path / "f.delta.safetensors")
        refused(lambda f=forged: apply(on_base(f, base), tmp_path / "o"), "f.delta.safetensors", out=tmp_path / "o")


def test_a_manifest_that_grows_is_not_unpacked(made, tmp_path):
    bomb = zstandard.ZstdCompressor(level=3).compress(b"[" + b" " * (1 << 28))
    for size in (1 << 28, 100, 10**15, -5):
        forged = forge(made[2], lambda d: None, tmp_path / "f.delta.safetensors", compressed=bomb, size=size)
        refused(lambda f=forged: Package(str(f)), "f.delta.safetensors")


def test_the_schema_is_a_schema_and_holds(made):
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(dict(Package(str(made[2])).manifest.data))


def test_the_header_is_what_viewers_expect(made):
    raw = made[2].read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert all(isinstance(v, str) for v in header.pop("__metadata__").values())
    assert all(entry["dtype"] == "U8" for entry in header.values())
    assert load_file(made[2])["delta/manifest"].size


# -- places ------------------------------------------------------------------------------------------------------------------------


def test_outputs_are_not_overwritten_unasked(made, tmp_path):
    base, tuned, package = made
    out = tmp_path / "p.delta.safetensors"
    out.write_text("mine")
    refused(lambda: packed(base, tuned, out, overwrite=False), "exists already")
    assert out.read_text() == "mine" and os.listdir(tmp_path) == [out.name]
    refused(lambda: packed(base, tuned, tmp_path / "none" / "p.safetensors"), "no such directory")
    refused(lambda: packed(base, tuned, tuned / "model.safetensors"), "is an input")
    refused(lambda: packed(base, tuned, tmp_path), "directory")
    refused(lambda: apply(on_base(package, base), tuned), "holds something")
    refused(lambda: apply(on_base(package, base), base, overwrite=True), "input")
    refused(lambda: apply(on_base(package, base), package.parent, overwrite=True), "input")


def test_a_full_disk_leaves_no_package(made, tmp_path, monkeypatch):
    base, tuned, _ = made
    from surgery.delta import write

    def full(self, data):
        raise OSError(28, "No space left on device")

    class Full:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        write = full

    opened = open
    monkeypatch.setattr(write, "open", lambda *a, **k: Full(opened(*a, **k)), raising=False)
    with pytest.raises(Failed, match="No space left"):
        packed(base, tuned, tmp_path / "p.delta.safetensors")
    assert os.listdir(tmp_path) == []


def test_models_that_have_little_to_do_with_the_base_are_pointed_out(made, tmp_path):
    from surgery.delta.pack import pack
    from surgery.inputs import open_node

    other = llama(tmp_path / "other", 9, hidden=64, vocab=130)
    found = pack(open_node(str(made[0])), open_node(str(other)), tmp_path / "p.delta.safetensors")
    assert any("is it the one" in w for w in found.warnings)
    close = pack(open_node(str(made[0])), open_node(str(made[1])), tmp_path / "q.delta.safetensors")
    assert not close.warnings


# -- lossy ----------------------------------------------------------------------------------------------------------------------------


def bounded(base, tuned, out, **options):
    from surgery.delta.choices import fixed
    from surgery.inputs import open_node

    choose = fixed(open_node(str(tuned)), "dither", options, ["*"])
    return packed(base, tuned, out, choose=choose)


def test_the_stated_error_is_true_of_every_tensor(made, tmp_path):
    base, tuned, _ = made
    package = bounded(base, tuned, tmp_path / "l.delta.safetensors", max_error=1e-4)
    apply(on_base(package, base), tmp_path / "out")
    verify_package(Package(str(package)))
    b, t, r = (read_checkpoint(p) for p in (base, tuned, tmp_path / "out"))
    for name, entry in Package(str(package)).manifest.entries.items():
        found, wanted, old = (x[name].astype(np.float64) for x in (r, t, b))
        error = np.abs(found - wanted)
        stated = entry.layer["error"]
        assert error.max() == pytest.approx(stated["max_abs"])
        assert stated["rel_fro"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(wanted - old), rel=1e-6)
        moved = wanted - old
        assert stated["gain"] == pytest.approx(((found - old) * moved).sum() / (moved * moved).sum(), rel=1e-6)
        assert (error <= 1e-4 + np.abs(wanted) * 2.0**-7).all()  # and one rounding to bfloat16


def test_a_lossy_package_alone_is_a_delta(made, tmp_path):
    base, tuned, _ = made
    package = bounded(base, tuned, tmp_path / "l.delta.safetensors", bits=2.0)
    alone, on = surgery.open(package), surgery.open(package, base=base)
    assert alone.space == "delta" and alone.keys() == on.keys()
    (surgery.open(base) + alone).save(tmp_path / "sum")
    got, wanted = read_checkpoint(tmp_path / "sum"), {n: t.compute() for n, t in on.items()}
    for name, value in wanted.items():
        assert np.array_equal(got[name].astype(np.float32), value.float().numpy()), name
    scaled = surgery.open(base) + 0.5 * alone
    scaled.save(tmp_path / "half")


def test_a_delta_alone_leaves_integers_as_they_are(tmp_path):
    rng = np.random.default_rng(5)
    old = {"m.weight": rng.standard_normal((8, 64)).astype(np.float32), "m.position_ids": np.arange(7)}
    new = {**old, "m.weight": old["m.weight"] + rng.standard_normal((8, 64)).astype(np.float32) * np.float32(0.01)}
    base, tuned = write_checkpoint(tmp_path / "b", old), write_checkpoint(tmp_path / "t", new)
    alone = surgery.open(bounded(base, tuned, tmp_path / "l.delta.safetensors", bits=2.0))
    assert list(alone.keys()) == ["m.weight"]
    (surgery.open(base) + alone).save(tmp_path / "sum")
    got = read_checkpoint(tmp_path / "sum")
    assert np.array_equal(got["m.position_ids"], old["m.position_ids"])
    assert np.array_equal(got["m.weight"], old["m.weight"] + alone["m.weight"].compute().numpy())
    other = write_checkpoint(tmp_path / "o", {**new, "m.position_ids": np.arange(7) + 1})
    changed = bounded(base, other, tmp_path / "n.delta.safetensors", bits=2.0)
    refused(lambda: list(surgery.open(changed).keys()), "m.position_ids", "1 tensor")


def test_nan_is_refused_in_lossy_packages(made, tmp_path):
    base, tuned, _ = made
    tensors = {n: v.copy() for n, v in read_checkpoint(tuned).items()}
    tensors["lm_head.weight"][3, 3] = np.nan
    other = write_checkpoint(tmp_path / "t", tensors)
    refused(lambda: bounded(base, other, tmp_path / "l.delta.safetensors", bits=1.0), "lm_head.weight", "finite")
    assert not (tmp_path / "l.delta.safetensors").exists()


def test_flipped_bits_in_lossy_packages(made, tmp_path):
    base, tuned, _ = made
    package = bounded(base, tuned, tmp_path / "l.delta.safetensors", bits=1.0)
    raw, rng = package.read_bytes(), np.random.default_rng(0)
    copy = tmp_path / "flipped.delta.safetensors"
    for at in rng.integers(0, len(raw), 150):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        copy.write_bytes(damaged)
        refused(lambda: verify_package(Package(str(copy))))
    with pytest.raises(Refused):
        apply(on_base(copy, base), tmp_path / "o", threads=1)


