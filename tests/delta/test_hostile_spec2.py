"""Damage and forgery of what spec 2 adds, and bytes that stay readable."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import BF16, flip_bit, read_checkpoint, same, write_checkpoint, write_file
from packing import every_view, forge, on_base, packed, shared_package, view_of

from surgery.delta.apply import apply, verify
from surgery.delta.check import verify_package
from surgery.delta.choices import fixed
from surgery.delta.container import Package
from surgery.delta.rebuild import PackageNode
from surgery.delta.sharing import Method
from surgery.errors import Refused
from surgery.inputs import open_node


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
