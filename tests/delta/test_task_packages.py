"""Packages of several tasks, and sums of packages."""


import ml_dtypes
import numpy as np
import pytest
from helpers import bits, read_checkpoint, same, write_checkpoint
from packing import MATRIX, every_view, on_base, packed, shared_package, three, view_of

import surgery
from surgery.delta.apply import apply
from surgery.delta.choices import fixed
from surgery.delta.codecs import mask
from surgery.delta.codecs.base import lossy_codec
from surgery.delta.compose import total
from surgery.delta.container import Package
from surgery.delta.pack import pack
from surgery.delta.sharing import Method
from surgery.delta.view import overview
from surgery.errors import Refused
from surgery.inputs import open_node


def reference(method, base, models, task, thresholds):
    """The formulas of the papers in float64."""
    names = list(models)
    deltas = {n: {t: models[t][n].astype(np.float64) - base[n].astype(np.float64) for t in names} for n in base}
    made, own, used = {}, 0.0, 0.0
    for n, d in deltas.items():
        total_ = sum(d.values())
        if method == "tall":
            made[n] = np.where(np.abs(d[task]) > thresholds[names.index(task)] * np.abs(total_ - d[task]), total_, 0.0)
        else:
            sign = np.where(total_ > 0, 1.0, -1.0)
            size = np.max([np.where(x * sign > 0, np.abs(x), 0.0) for x in d.values()], axis=0)
            made[n] = np.where(d[task] * sign > 0, size * sign, 0.0)
            own, used = own + np.abs(d[task]).sum(), used + np.abs(made[n]).sum()
    scale = own / used if method == "emr" else 1.0
    return {n: base[n].astype(np.float64) + scale * v for n, v in made.items()}


@pytest.mark.parametrize("method,thresholds", [("tall", [0.2, 0.4, 0.6]), ("emr", [])])
def test_tasks_are_the_formula_and_the_operator(tmp_path, method, thresholds):
    base, models = three(tmp_path)
    package = shared_package(base, models, tmp_path / "t.delta.safetensors", Method(method, thresholds))
    every_view(package, base)
    values = {t: read_checkpoint(p) for t, p in models.items()}
    deltas = [surgery.open(p) - surgery.open(base) for p in models.values()]
    for i, task in enumerate(models):
        apply(on_base(view_of(package, task), base), tmp_path / f"out-{task}")
        found = read_checkpoint(tmp_path / f"out-{task}")
        op = surgery.ops.tall(deltas[i], *deltas, threshold=thresholds[i]) if thresholds else surgery.ops.emr(deltas[i], *deltas)
        (surgery.open(base) + op).save(tmp_path / f"op-{task}")
        same(found, read_checkpoint(tmp_path / f"op-{task}"))
        wanted = reference(method, read_checkpoint(base), values, task, thresholds)
        for name, value in wanted.items():
            got = found[name].astype(np.float64)
            close = np.abs(got - value) <= np.abs(value) * 2.0**-8 + 1e-6  # one rounding to bfloat16
            assert close.mean() > 0.999, name  # but where float32 decides a mask otherwise
        for entry in Package(view_of(package, task)).manifest.entries.values():
            worst = np.abs(found[entry.target.name].astype(np.float64) - values[task][entry.target.name].astype(np.float64)).max()
            assert worst == pytest.approx(entry.layer["error"]["max_abs"])
        assert (tmp_path / f"out-{task}" / "config.json").read_bytes() == (models[task] / "config.json").read_bytes()


def test_a_task_is_a_model_and_a_delta_and_reads_its_own(tmp_path, monkeypatch):
    base, models = three(tmp_path)
    package = shared_package(base, models, tmp_path / "t.delta.safetensors", Method("tall"), "dither", {"bits": 4.0})
    every_view(package, base)
    on, alone = surgery.open(view_of(package, "two"), base=base), surgery.open(view_of(package, "two"))
    assert alone.space == "delta" and on.space == "weights"
    (surgery.open(base) + alone).save(tmp_path / "sum")
    on.save(tmp_path / "on")
    same(read_checkpoint(tmp_path / "sum"), read_checkpoint(tmp_path / "on"))
    read, whole = [], Package.read
    monkeypatch.setattr(Package, "read", lambda self, part, *rest: read.append(part) or whole(self, part, *rest))
    surgery.open(view_of(package, "two"), base=base)[MATRIX].compute()
    stored = {part for part in read if part.startswith(("shared/", "task/"))}
    assert f"task/two/tensor/{MATRIX}/data" in stored
    assert all(MATRIX in part or part.startswith("task/two/header/") or part.startswith("task/two/file/") for part in stored)
    for locate in (lambda: Package(str(package)).one(), lambda: surgery.open(package, base=base), lambda: surgery.open(package)):
        with pytest.raises(Refused, match="several tasks: one, two, three"):
            locate()
    with pytest.raises(Refused, match="no `tow`") as found:
        Package(view_of(package, "tow"))
    assert "two" in found.value.hint


def test_what_tasks_do_not_share_is_exact(tmp_path):
    base, models = three(tmp_path)
    two = read_checkpoint(models["two"])
    two["head.weight"] = np.arange(12, dtype=np.float32)
    two["lm_head.weight"] = np.concatenate([two["lm_head.weight"], two["lm_head.weight"][:3]])
    write_checkpoint(models["two"], two)
    package = shared_package(base, models, tmp_path / "t.delta.safetensors", Method("emr"), only=["*mlp*", "lm_head*"][:1])
    every_view(package, base)
    for task, path in models.items():
        apply(on_base(view_of(package, task), base), tmp_path / f"out-{task}")
        found, wanted = read_checkpoint(tmp_path / f"out-{task}"), read_checkpoint(path)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert ("mlp" in name) or bits(found[name]) == bits(value), name
    sizes = {n: s["bytes"] for n, s in overview(Package(str(package)))["shared"].items()}
    assert set(sizes) == {n for n in wanted if "mlp" in n}


def test_bad_tasks_are_refused(tmp_path):
    base, models = three(tmp_path)
    out = tmp_path / "t.delta.safetensors"
    for change, method, word in (
        (lambda m: {"one": m["one"]}, Method("tall"), "1 model"),
        (lambda m: {"a/b": m["one"], "c": m["two"]}, Method("tall"), "cannot be called 'a/b'"),
        (lambda m: {"preview": m["one"], "c": m["two"]}, Method("tall"), "cannot be called"),
        (lambda m: m, Method("tall", [0.1, 0.2]), "2 times for 3"),
        (lambda m: m, Method("tall", [-1.0]), "at least 0"),
        (lambda m: m, Method("emr", [0.4]), "goes with tall"),
    ):
        with pytest.raises(Refused, match=word):
            shared_package(base, change(models), out, method)
    with pytest.raises(Refused, match="matches no float tensor"):
        shared_package(base, models, out, Method("tall"), only=["nothing"])
    three_ = {n: v.copy() for n, v in read_checkpoint(models["three"]).items()}
    three_[MATRIX][0, 0] = np.nan
    write_checkpoint(models["three"], three_)
    with pytest.raises(Refused, match="finite"):
        shared_package(base, models, out, Method("tall"))
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_masks_come_back_and_cost_little_more_than_their_entropy(share):
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(200_000).astype(np.float32)
    where = rng.random(200_000) < share * np.where(np.abs(shared) < 0.5, 1.0, 0.5)  # depends on the size
    payload = mask.encode(where, shared)
    assert np.array_equal(mask.decode(payload, shared), where)
    entropy = sum(
        -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) * near.sum()
        for near in (np.abs(shared) < 0.5, np.abs(shared) >= 0.5)
        if 0 < (p := where[near].mean()) < 1
    )
    assert 8 * len(payload) <= 1.2 * entropy + 800
    with pytest.raises(Refused):
        mask.decode(payload + b"\0", shared) if payload else mask.decode(b"\1\2", shared)


# -- sums ----------------------------------------------------------------------------------------------------------------------------


def test_sums_keep_codes_and_add_the_rest(tmp_path):
    base, models = three(tmp_path)
    old = read_checkpoint(base)
    packages = [
        packed(base, models[task], tmp_path / f"{task}.delta.safetensors", choose=fixed(open_node(str(models[task])), *how))
        for task, how in (("one", ("dither", {"bits": 2.0}, ())), ("two", ("sign", {}, ())))
    ]
    opened = [Package(str(p)) for p in packages]
    node, choose = total(opened, open_node(str(base)), [1.0, 0.5])
    out = tmp_path / "sum.delta.safetensors"
    pack(open_node(str(base)), node, out, choose=choose, threads=2)
    every_view(out, base)
    apply(on_base(out, base), tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")
    entries = Package(str(out)).manifest.entries
    rebuilt = []
    for p in packages:
        apply(on_base(p, base), tmp_path / f"of-{p.name}")
        rebuilt.append(read_checkpoint(tmp_path / f"of-{p.name}"))
    for name, entry in entries.items():
        b = old[name].astype(np.float64)
        if entry.lossy:
            assert entry.layer["codec"] == "sum/1"
            terms = [lossy_codec(p.manifest.entries[name].layer["codec"]) for p in opened]
            parts = []
            for p, codec in zip(opened, terms, strict=True):
                e = p.manifest.entries[name]
                from surgery.delta.codecs.base import Coded

                coded = Coded(p.payload(tuple(e.coded())), e.layer["facts"])
                parts.append(codec.decode(coded, e.target.shape, name, 0, e.target.numel).astype(np.float64))
            wanted = b + (parts[0] + 0.5 * parts[1]).reshape(b.shape)
        else:
            wanted = b + sum(w * (r[name].astype(np.float64) - b) for w, r in zip((1.0, 0.5), rebuilt, strict=True))
        got = found[name].astype(np.float64)
        assert np.allclose(got, wanted.astype(ml_dtypes.bfloat16).astype(np.float64), rtol=2.0**-7, atol=1e-9), name
    held = {n: t["bytes"] for p in opened for n, t in ((t["name"], t) for t in overview(p)["tensors"]) if t["kind"] == "lossy"}
    assert held
    for name, entry in entries.items():
        if entry.lossy:
            both = sum(next(t["bytes"] for t in overview(p)["tensors"] if t["name"] == name) for p in opened)
            assert next(t["bytes"] for t in overview(Package(str(out)))["tensors"] if t["name"] == name) == both
    # a sum of sums is flat
    twice, choose = total([Package(str(out)), opened[0]], open_node(str(base)), None)
    pack(open_node(str(base)), twice, tmp_path / "twice.delta.safetensors", choose=choose, threads=2)
    layers = [e.layer for e in Package(str(tmp_path / "twice.delta.safetensors")).manifest.entries.values() if e.lossy]
    assert [len(layer["facts"]["terms"]) for layer in layers] == [3] * len(layers)
    every_view(tmp_path / "twice.delta.safetensors", base)


def test_sums_that_cannot_be(tmp_path):
    base, models = three(tmp_path)
    exact = [Package(str(packed(base, models[t], tmp_path / f"{t}.delta.safetensors"))) for t in ("one", "two")]
    assert total(exact, open_node(str(base)), None)[1] is None
    with pytest.raises(Refused, match="3 times for 2"):
        total(exact, open_node(str(base)), [1.0, 2.0, 3.0])
    more = read_checkpoint(models["one"]) | {"extra": np.ones(3, np.float32)}
    write_checkpoint(tmp_path / "more", more)
    other = Package(str(packed(base, tmp_path / "more", tmp_path / "more.delta.safetensors")))
    with pytest.raises(Refused, match="`extra`"):
        total([*exact, other], open_node(str(base)), None)
    with pytest.raises(Refused, match="not the base"):
        total([Package(str(packed(tmp_path / "more", base, tmp_path / "x.delta.safetensors")))], open_node(str(base)), None)
