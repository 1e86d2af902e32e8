"""Packages in shards."""

import filecmp
import json
import os
from pathlib import Path

import pytest
from packing import every_view, on_base, packed, pair, view_of
from safetensors.numpy import load_file

from surgery.delta.apply import apply, verify
from surgery.delta.choices import fixed
from surgery.delta.container import Package, is_package
from surgery.delta.view import overview
from surgery.errors import Refused
from surgery.inputs import open_node


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
    for path in shards:
        assert set(load_file(path)) == {n for n, f in said.items() if f == path.name}
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
