"""Progressive packages, shards, packages of several tasks, sums: what spec 2 adds."""

import filecmp
import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import BF16, bits, flip_bit, llama_config, read_checkpoint, run, same, tokens, write_checkpoint, write_file
from packing import forge, on_base, packed, pair, tuned_from

import surgery
from surgery.delta.apply import apply, verify
from surgery.delta.check import verify_package
from surgery.delta.choices import fixed, low_rank
from surgery.delta.codecs import mask
from surgery.delta.codecs.base import check_options, lossy_codec
from surgery.delta.compose import total
from surgery.delta.container import Package, is_package
from surgery.delta.pack import pack
from surgery.delta.rebuild import PackageNode
from surgery.delta.shards import split
from surgery.delta.sharing import Method
from surgery.delta.tasks import pack_tasks
from surgery.delta.view import overview
from surgery.errors import Refused
from surgery.inputs import open_node

MATRIX = "model.layers.1.mlp.up_proj.weight"


def progressive(base, tuned, out, codec="dither", only=(), **options):
    options = options or ({"bits": 1.0} if codec == "dither" else {})
    return packed(base, tuned, out, choose=fixed(open_node(str(tuned)), codec, options, only), progressive=True)


def view_of(package, view):
    return f"{package}#{view}"


def every_view(package, base):
    """All views rebuilt and checked; bytes of the package read and checked."""
    found = Package(str(package))
    verify_package(found)
    for view in found.manifest.views():
        verify(on_base(view_of(package, view) if view else package, base), threads=2)


# -- progressive ---------------------------------------------------------------------------------------------------------------------


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


# -- shards --------------------------------------------------------------------------------------------------------------------------


def sharded(base, tuned, folder, size=5_500, **options):
    return packed(base, tuned, folder / "s.delta.safetensors", shard_size=size, **options)


def files_of(package):
    return sorted(package.parent.glob("s-*.delta.safetensors"))


def test_shards_hold_the_same_package(tmp_path):
    base, tuned = pair(tmp_path)
    package = sharded(base, tuned, tmp_path)
    index = tmp_path / "s.delta.safetensors.index.json"
    shards = files_of(package)
    assert not package.exists() and index.exists() and len(shards) > 2
    assert [p.name for p in shards] == [f"s-{i:05}-of-{len(shards):05}.delta.safetensors" for i in range(1, len(shards) + 1)]
    for location in (package, index):
        assert is_package(str(location))
        every_view(location, base)
    one = Package(str(packed(base, tuned, tmp_path / "one.delta.safetensors")))
    many = Package(str(package))
    drop = {"parts", "spec", "shards"}
    assert {k: v for k, v in one.manifest.data.items() if k not in drop} == {
        k: v for k, v in many.manifest.data.items() if k not in drop
    }
    assert many.size == sum(p.stat().st_size for p in [*shards, index]) and overview(many)["shards"] == len(shards)
    apply(on_base(package, base), tmp_path / "out")
    names = sorted(p.name for p in tuned.iterdir())
    assert filecmp.cmpfiles(tuned, tmp_path / "out", names, shallow=False) == (names, [], [])
    said = json.loads(index.read_text())["weight_map"]
    safetensors = pytest.importorskip("safetensors.numpy")
    for path in shards:
        assert [n for n, f in said.items() if f == path.name] == list(safetensors.load_file(path)) or set(
            safetensors.load_file(path)
        ) == {n for n, f in said.items() if f == path.name}
    limit = [p for p in shards if p.stat().st_size > 5_500 and sum(f == p.name for f in said.values()) > 1]
    assert limit in ([], shards[:1])  # the manifest may make the first one larger


def test_one_file_is_written_where_one_suffices(tmp_path):
    base, tuned = pair(tmp_path)
    package = sharded(base, tuned, tmp_path, size="1GB")
    assert package.exists() and Package(str(package)).manifest.data["spec"] == 1
    assert not list(tmp_path.glob("*.index.json"))


def test_a_preview_needs_its_shards_alone(tmp_path):
    base, tuned = pair(tmp_path)
    choose = fixed(open_node(str(tuned)), "dither", {"bits": 1.0}, ())
    package = sharded(base, tuned, tmp_path, size=100_000, choose=choose, progressive=True)
    shards = files_of(package)
    assert len(shards) > 1
    every_view(package, base)
    shards[-1].unlink()
    verify(on_base(view_of(package, "preview"), base))
    with pytest.raises(Refused, match="shard of the package is missing") as found:
        Package(str(package))
    assert shards[-1].name in found.value.message


def test_overwriting_leaves_no_old_shards(tmp_path):
    base, tuned = pair(tmp_path)
    sharded(base, tuned, tmp_path)
    before = len(files_of(tmp_path / "s.delta.safetensors"))
    with pytest.raises(Refused, match="exists already"):
        packed(base, tuned, tmp_path / "s.delta.safetensors", overwrite=False)
    again = sharded(base, tuned, tmp_path, size=12_000)
    assert 1 < len(files_of(again)) < before
    every_view(again, base)
    one = packed(base, tuned, again)
    assert one.exists() and not files_of(one) and not list(tmp_path.glob("*.index.json")) and not list(tmp_path.glob("*partial*"))
    sharded(base, tuned, tmp_path)
    assert not one.exists()


def test_lying_indices_and_shards_in_wrong_places(tmp_path):
    base, tuned = pair(tmp_path)
    package = sharded(base, tuned, tmp_path)
    index = Path(f"{package}.index.json")
    text, shards = index.read_text(), files_of(package)
    said = json.loads(text)

    def refused(changed, word):
        index.write_text(changed if isinstance(changed, str) else json.dumps(changed, indent=2) + "\n")
        with pytest.raises(Refused, match=word) as found:
            Package(str(package))
        assert "\n" not in found.value.message
        index.write_text(text)

    def lie(change):
        made = json.loads(text)
        change(made)
        return made

    escape = dict.fromkeys(said["weight_map"], "../../etc/passwd")
    refused(lie(lambda d: d.update(weight_map=escape)), "not the index")
    refused(lie(lambda d: d["weight_map"].update({"delta/manifest": shards[-1].name})), "not the index")
    refused(lie(lambda d: d["metadata"].update(total_size=1)), "not the index")
    refused(lie(lambda d: d["metadata"].update({"delta.shards": "../2"})), "shards")
    refused(lie(lambda d: d["metadata"].update({"delta.shards": "99999999"})), "shards")
    refused(lie(lambda d: d["metadata"].update({"delta.shards": str(len(shards) + 1)})), "missing|shards")
    refused("[]", "not the index")
    refused("{", "not the index")
    with pytest.raises(Refused, match="is shard 2/") as found:
        Package(str(shards[1]))
    assert str(index) in found.value.hint
    first, second = shards[1].read_bytes(), shards[2].read_bytes()
    shards[1].write_bytes(second)
    shards[2].write_bytes(first)
    with pytest.raises(Refused, match="header is not the one"):
        Package(str(package))


def test_a_full_disk_leaves_no_shards(tmp_path, monkeypatch):
    from surgery.delta import write
    from surgery.errors import Failed

    base, tuned = pair(tmp_path)
    made, count = write.shutil.copyfileobj, []

    def full(*arguments):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return made(*arguments)

    monkeypatch.setattr(write.shutil, "copyfileobj", full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(Failed, match="No space left"):
        sharded(base, tuned, tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


# -- tasks ---------------------------------------------------------------------------------------------------------------------------


def three(folder):
    base, _ = pair(folder)
    old = read_checkpoint(base)
    for i, name in enumerate(("two", "three"), 2):
        write_checkpoint(folder / name, tuned_from(old, i, 2e-3), config=llama_config(), vocab=tokens(130))
    return base, {"one": folder / "tuned", "two": folder / "two", "three": folder / "three"}


def shared_package(base, models, out, method, codec="plain", options=None, **more):
    found = lossy_codec(codec)
    nodes = {task: open_node(str(path)) for task, path in models.items()}
    choice = found, check_options(found, options or {})
    pack_tasks(open_node(str(base)), nodes, out, method=method, shared=choice, threads=2, overwrite=True, **more)
    return out


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


# -- damage and forgery --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """One package of each new kind, small."""
    folder = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(0)
    old = {"model.layers.0.a.weight": rng.standard_normal((30, 40)).astype(BF16), "n": np.ones(8, BF16)}
    for i, name in enumerate(("base", "tuned", "other")):
        moved = {n: (v.astype(np.float32) + i * rng.standard_normal(v.shape) * 1e-2).astype(BF16) for n, v in old.items()}
        write_checkpoint(folder / name, moved, config={"i": i})
    base, models = folder / "base", {"one": folder / "tuned", "two": folder / "other"}
    choose = fixed(open_node(str(folder / "tuned")), "dither", {"bits": 2.0}, ["*a.weight"])
    made = {
        "progressive": packed(base, models["one"], folder / "p.delta.safetensors", choose=choose, progressive=True),
        "tasks": shared_package(base, models, folder / "t.delta.safetensors", Method("tall"), "dither", {"bits": 4.0}),
        "shards": packed(base, models["one"], folder / "s.delta.safetensors", shard_size=2000),
    }
    return base, made


@pytest.mark.parametrize("kind", ["progressive", "tasks", "shards"])
def test_flipped_bits_of_every_kind(kinds, tmp_path, kind):
    base, made = kinds
    package = made[kind]
    files = [package] if package.exists() else [*sorted(package.parent.glob("s-*.safetensors")), Path(f"{package}.index.json")]
    for path in files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    copy = tmp_path / package.name
    rng = np.random.default_rng(1)
    for path in files:
        raw = path.read_bytes()
        for at in rng.integers(0, len(raw), 400 // len(files)):
            target = tmp_path / path.name
            damaged = bytearray(raw)
            damaged[at] ^= 1 << int(rng.integers(8))
            target.write_bytes(damaged)
            with pytest.raises(Refused) as found:
                verify_package(Package(str(copy)))
            assert "\n" not in found.value.message
            target.write_bytes(raw)
    every_view(copy, base)


def tensor(data, task=None):
    tensors = data["tensors"] if task is None else data["tasks"][task]["tensors"]
    return tensors["model.layers.0.a.weight"]


FORGERIES = {
    "spec 1": ("progressive", lambda d: d.update(spec=1), "spec 1"),
    "no preview": ("progressive", lambda d: tensor(d).pop("preview"), "preview and a residual"),
    "no residual": ("progressive", lambda d: tensor(d).pop("residual"), "preview and a residual"),
    "other preview": ("progressive", lambda d: tensor(d)["preview"].update(sha256="0" * 64), "root"),
    "other preview root": ("progressive", lambda d: d["target"].update(preview="0" * 64), "root"),
    "residual codec": ("progressive", lambda d: tensor(d)["residual"].update(codec="ulp-zstd/1"), "not known"),
    "residual of nothing": (
        "progressive",
        lambda d: d["tensors"]["n"]["layer"].update(codec="ulp-hint-zstd/1"),
        "not known",
    ),
    "residual length": ("progressive", lambda d: tensor(d)["residual"].update(lengths=[1 << 40]), "not as long"),
    "residual chunks": ("progressive", lambda d: tensor(d)["residual"].update(lengths=[1, 1], checks="0" * 32), "chunks"),
    "share of nothing": ("tasks", lambda d: tensor(d, "one")["layer"].update(shared="nothing"), "does not have"),
    "shared shape": ("tasks", lambda d: d["shared"]["model.layers.0.a.weight"].update(shape=[40, 30]), "does not have"),
    "shared parts": ("tasks", lambda d: d["shared"]["model.layers.0.a.weight"]["parts"].append("x"), "parts"),
    "mask codec": ("tasks", lambda d: tensor(d, "two")["layer"].update(codec="masked/9"), "not known"),
    "task name": ("tasks", lambda d: d["tasks"].update({"../x": d["tasks"]["one"]}), "wrong"),
    "no tasks": ("tasks", lambda d: d.update(tasks={}), "wrong"),
    "targets beside tasks": ("tasks", lambda d: d.update(dropped=[]), "wrong"),
    "task path": ("tasks", lambda d: d["tasks"]["one"]["files"].update({"../x": d["tasks"]["one"]["files"]["config.json"]}), "outside"),
    "other task root": ("tasks", lambda d: d["tasks"]["two"]["target"].update(root="0" * 64), "root"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_manifests_of_spec_2(kinds, tmp_path, name):
    kind, change, word = FORGERIES[name]
    forged = forge(kinds[1][kind], change, tmp_path / "f.delta.safetensors")
    with pytest.raises(Refused, match=word) as found:
        Package(str(forged))
    assert "\n" not in found.value.message


def test_forged_facts_are_refused_when_they_are_used(kinds, tmp_path):
    """What opens but does not hold: the scale of a task, the step of a first layer."""
    base, made = kinds

    def scale(data):
        tensor(data, "one")["layer"]["scale"] = 2.0

    def step(data):
        tensor(data)["layer"]["facts"]["step"] *= 1.5

    for kind, view, change in (("tasks", "one", scale), ("progressive", "", step), ("progressive", "preview", step)):
        forged = forge(made[kind], change, tmp_path / "f.delta.safetensors")
        location = view_of(forged, view) if view else forged
        with pytest.raises(Refused, match=r"f\.delta\.safetensors"):
            verify(on_base(location, base), threads=1)


def test_the_bytes_of_spec_2_are_fixed(tmp_path, monkeypatch):
    """Packages of spec 2 that were written once are read for ever; what is written now says the same, but for zstd's version."""
    home = Path(__file__).parent
    base = {"model.layers.0.w.weight": (np.arange(-600, 600, dtype=np.float32).reshape(30, 40) / 512).astype(BF16), "n": np.ones(2, BF16)}
    one = {n: (v.astype(np.float32) * np.float32(1.0625)).astype(BF16) for n, v in base.items()}
    two = {n: (v.astype(np.float32) - np.float32(0.03125)).astype(BF16) for n, v in base.items()}
    for name, tensors in (("base", base), ("one", one), ("two", two)):
        write_file(tmp_path / name / "model.safetensors", tensors)
    monkeypatch.setattr("surgery.delta.pack.__version__", "X")
    monkeypatch.setattr("surgery.delta.tasks.__version__", "X")
    choose = fixed(open_node(str(tmp_path / "one")), "dither", {"step": 0.01}, ())
    made = {
        "progressive": packed(tmp_path / "base", tmp_path / "one", tmp_path / "p.delta.safetensors", choose=choose, progressive=True),
        "tasks": shared_package(
            tmp_path / "base", {"one": tmp_path / "one", "two": tmp_path / "two"}, tmp_path / "t.delta.safetensors",
            Method("tall"), "dither", {"step": 0.01},
        ),
    }  # fmt: skip
    if os.environ.get("SURGERY_GOLDEN"):
        for kind, path in made.items():
            (home / f"golden-{kind}.delta.safetensors").write_bytes(path.read_bytes())
    for kind in ("progressive", "tasks"):
        kept = home / f"golden-{kind}.delta.safetensors"
        found = Package(str(kept))
        verify_package(found)
        for view in found.manifest.views():
            verify(PackageNode(Package(view_of(kept, view) if view else str(kept)), open_node(str(tmp_path / "base"))))
    apply(on_base(home / "golden-progressive.delta.safetensors", tmp_path / "base"), tmp_path / "out")
    same(read_checkpoint(tmp_path / "out"), one)
    for kind, path in made.items():
        new, old = (json.loads(json.dumps(Package(str(p)).manifest.data)) for p in (path, home / f"golden-{kind}.delta.safetensors"))
        for data in (new, old):
            data["producer"] = ""
            for part in data["parts"]:
                del part[1:]
            for layer in layers_of(data):
                for key in ("lengths", "checks", "limit"):
                    layer.pop(key, None)
                if "facts" in layer:
                    layer["facts"] = {k: v for k, v in layer["facts"].items() if k in ("step", "seed", "classes")}
        assert new == old


def layers_of(data):
    """Everything in a manifest that has a codec."""
    if isinstance(data, dict):
        if "codec" in data:
            yield data
        for value in data.values():
            yield from layers_of(value)
    elif isinstance(data, list):
        for value in data:
            yield from layers_of(value)


def test_a_wrong_base_is_refused_for_every_kind(kinds, tmp_path):
    base, made = kinds
    other = write_checkpoint(tmp_path / "b", read_checkpoint(base), config={"i": 0})
    file = other / "model.safetensors"
    flip_bit(file, file.stat().st_size - 20)
    for kind, view in (("progressive", ""), ("progressive", "preview"), ("tasks", "one"), ("shards", "")):
        location = view_of(made[kind], view) if view else made[kind]
        with pytest.raises(Refused, match="not the base"):
            apply(on_base(location, other), tmp_path / "o")
        assert not (tmp_path / "o").exists() and not (tmp_path / "o.partial").exists()
