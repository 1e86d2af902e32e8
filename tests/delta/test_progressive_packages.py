"""Progressive packages: a lossy layer first, every bit after it."""

import filecmp

import numpy as np
import pytest
from helpers import BF16, bits, read_checkpoint, run, same, write_checkpoint
from packing import MATRIX, every_view, on_base, packed, pair, progressive, view_of

import surgery
from surgery.delta.apply import apply
from surgery.delta.choices import fixed, low_rank
from surgery.delta.container import Package
from surgery.delta.shards import split
from surgery.delta.view import overview
from surgery.errors import Refused
from surgery.inputs import open_node


@pytest.mark.parametrize("codec,options", [("dither", {"bits": 0.5}), ("svd_wf", {"bits": 0.5}), ("sign", {}), ("group", {"bits": 4})])
def test_a_first_layer_and_every_bit_after_it(tmp_path, codec, options):
    base, tuned = pair(tmp_path)
    package = progressive(base, tuned, tmp_path / "p.delta.safetensors", codec, **options)
    every_view(package, base)
    apply(on_base(package, base), tmp_path / "full")
    names = sorted(p.name for p in tuned.iterdir())
    assert filecmp.cmpfiles(tuned, tmp_path / "full", names, shallow=False) == (names, [], [])
    # the preview is what a lossy package with the same codes makes, and its error is what is stated
    choose = fixed(open_node(str(tuned)), codec, options, ())
    lossy = packed(base, tuned, tmp_path / "l.delta.safetensors", choose=choose)
    apply(on_base(lossy, base), tmp_path / "lossy")
    apply(on_base(view_of(package, "preview"), base), tmp_path / "first")
    first = read_checkpoint(tmp_path / "first")
    same(first, read_checkpoint(tmp_path / "lossy"))
    wanted = read_checkpoint(tuned)
    entries = Package(view_of(package, "preview")).manifest.entries
    assert sum(e.lossy for e in entries.values()) == 6 * 1
    for name, entry in entries.items():
        worst = np.abs(first[name].astype(np.float64) - wanted[name].astype(np.float64)).max()
        assert worst == (pytest.approx(entry.layer["error"]["max_abs"]) if entry.lossy else 0.0)
    said = overview(Package(str(package)))
    assert said["spec"] == 2 and said["mode"] == "progressive" and said["preview"]["bytes"] < said["bytes"]


def test_the_first_layer_lies_before_every_residual(tmp_path):
    base, tuned = pair(tmp_path)
    names = [n for n, *_ in Package(str(progressive(base, tuned, tmp_path / "p.delta.safetensors"))).manifest.parts]
    last = [n.endswith("/residual") for n in names]
    assert any(last) and last == sorted(last)


def test_a_coarse_first_layer_costs_little(tmp_path):
    """The base stays the reference: against the first layer's own result the residual would be a third larger."""
    rng = np.random.default_rng(0)
    base = (rng.standard_normal((800, 1000)) * 0.05).astype(BF16)
    tuned = (base.astype(np.float32) + rng.standard_normal((800, 1000)) * 2e-3).astype(BF16)
    for name, value in (("base", base), ("tuned", tuned)):
        write_checkpoint(tmp_path / name, {"w": value})
    direct = packed(tmp_path / "base", tmp_path / "tuned", tmp_path / "d.delta.safetensors").stat().st_size
    both = progressive(tmp_path / "base", tmp_path / "tuned", tmp_path / "p.delta.safetensors", only=["*"], bits=0.25)
    assert direct < both.stat().st_size < 1.06 * direct


def test_patterns_that_only_exactness_keeps(tmp_path):
    """-0.0, subnormals, extremes, a NaN beside what is coded with losses; type and rows change in others."""
    base, tuned = pair(tmp_path)
    new = {n: v.copy() for n, v in read_checkpoint(tuned).items()}
    new[MATRIX].view(np.uint16)[0, :4] = (0x8000, 0x0001, 0x7F7F, 0x0000)
    new["model.norm.weight"].view(np.uint16)[0] = 0x7FC1
    new["model.layers.0.self_attn.q_proj.weight"] = new["model.layers.0.self_attn.q_proj.weight"].astype(np.float32)
    new["copy.weight"] = new[MATRIX]
    write_checkpoint(tuned, new)
    package = progressive(base, tuned, tmp_path / "p.delta.safetensors", bits=2.0)
    every_view(package, base)
    apply(on_base(package, base), tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == new.keys() and all(bits(found[n]) == bits(v) for n, v in new.items())


def test_smallest_uses_a_low_rank_layer_where_it_pays(tmp_path):
    rng = np.random.default_rng(0)
    base = {f"model.layers.0.{n}.weight": (rng.standard_normal((400, 300)) * 0.05).astype(BF16) for n in "ab"}
    low = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 300)) * 3e-3
    moved = {"a": low, "b": rng.standard_normal((400, 300)) * 3e-3}
    tuned = {n: (v.astype(np.float32) + moved[n.split(".")[3]]).astype(BF16) for n, v in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "tuned", tuned)
    choose = low_rank(open_node(str(tmp_path / "tuned")), 10**9)
    small = packed(tmp_path / "base", tmp_path / "tuned", tmp_path / "s.delta.safetensors", choose=choose, smallest=True)
    plain = packed(tmp_path / "base", tmp_path / "tuned", tmp_path / "p.delta.safetensors")
    every_view(small, tmp_path / "base")
    apply(on_base(small, tmp_path / "base"), tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), tuned)
    entries = Package(str(small)).manifest.entries
    assert [e.residual is not None for e in entries.values()] == [True, False]
    assert small.stat().st_size < 0.8 * plain.stat().st_size
    # nothing gained: a plain exact package of spec 1
    write_checkpoint(tmp_path / "tuned", {"model.layers.0.b.weight": tuned["model.layers.0.b.weight"]})
    choose = low_rank(open_node(str(tmp_path / "tuned")), 10**9)
    again = packed(tmp_path / "base", tmp_path / "tuned", tmp_path / "t.delta.safetensors", choose=choose, smallest=True)
    assert (overview(Package(str(again)))["mode"], overview(Package(str(again)))["spec"]) == ("exact", 1)
    plain = packed(tmp_path / "base", tmp_path / "tuned", tmp_path / "u.delta.safetensors")
    assert again.read_bytes() == plain.read_bytes()


def test_views_that_are_not_there(tmp_path):
    base, tuned = pair(tmp_path)
    exact = packed(base, tuned)
    with pytest.raises(Refused, match="no `preview`"):
        Package(view_of(exact, "preview"))
    package = progressive(base, tuned, tmp_path / "p.delta.safetensors")
    with pytest.raises(Refused, match="no `previw`") as found:
        Package(view_of(package, "previw"))
    assert "preview" in found.value.hint
    with pytest.raises(Refused, match="exact package"):
        surgery.open(package)
    assert split("a/b.delta.safetensors#x") == ("a/b.delta.safetensors", "x") and split("a#b") == ("a#b", "")


def test_the_preview_in_recipes_and_alone(tmp_path):
    base, tuned = pair(tmp_path)
    package = progressive(base, tuned, tmp_path / "p.delta.safetensors", only=["*"], bits=2.0)
    text = "models:\n  base: base\n  first: {source: 'p.delta.safetensors#preview', base: base}\noutput: {from: first}\n"
    (tmp_path / "r.yaml").write_text(text)
    run(tmp_path / "r.yaml", tmp_path / "out")
    apply(on_base(view_of(package, "preview"), base), tmp_path / "first")
    wanted = read_checkpoint(tmp_path / "first")
    same(read_checkpoint(tmp_path / "out"), wanted)
    alone = surgery.open(view_of(package, "preview"))
    assert alone.space == "delta"
    (surgery.open(base) + alone).save(tmp_path / "sum")
    same(read_checkpoint(tmp_path / "sum"), wanted)


def test_what_a_preview_reads(tmp_path, monkeypatch):
    base, tuned = pair(tmp_path)
    package = progressive(base, tuned, tmp_path / "p.delta.safetensors")
    read, whole = [], Package.read
    monkeypatch.setattr(Package, "read", lambda self, part, *rest: read.append(part) or whole(self, part, *rest))
    surgery.open(view_of(package, "preview"), base=base)[MATRIX].compute()
    parts = [part for part in read if part.startswith("tensor/")]
    assert parts and all(part.startswith(f"tensor/{MATRIX}/") and "residual" not in part for part in parts)
    read.clear()
    surgery.open(package, base=base)[MATRIX].compute()
    assert f"tensor/{MATRIX}/residual" in read and all(MATRIX in part for part in read if part.startswith("tensor/"))
