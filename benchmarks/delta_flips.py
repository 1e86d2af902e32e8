"""Damage: random bits of small packages of every kind are flipped, one at a time. `benchmarks/delta.py --flips N` runs it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import WORK


def models(folder: Path, rng: np.random.Generator) -> None:
    """A base and two fine-tunes of three matrices each."""
    words = rng.integers(0, 1 << 15, 6000).astype("<u2")
    words = np.where((words >> 7) & 255 > 140, 0x3C00 + (words & 0x3FF), words).astype("<u2")  # nothing that is not finite
    for name, most in (("base", 1), ("tuned", 9), ("other", 30)):
        (folder / name).mkdir()
        moved = words + rng.integers(0, most, 6000).astype("<u2")
        places = [[4000 * i, 4000 * i + 4000] for i in range(3)]
        header = {f"t{a}": {"dtype": "BF16", "shape": [20, 100], "data_offsets": [a, z]} for a, z in places}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        (folder / name / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + moved.tobytes())
        (folder / name / "config.json").write_text(json.dumps({"name": name}))


def packages(folder: Path) -> dict[str, tuple[list[Path], list[str]]]:
    """kind -> (files, the first is what is opened; views)."""
    from surgery.delta.choices import fixed
    from surgery.delta.codecs.base import check_options, lossy_codec
    from surgery.delta.pack import pack
    from surgery.delta.sharing import Method
    from surgery.delta.tasks import pack_tasks
    from surgery.inputs import open_node

    base, tuned, other = (open_node(str(folder / name)) for name in ("base", "tuned", "other"))
    choose: Any = fixed(tuned, "dither", {"bits": 2.0}, ["t0", "t4000"])
    codec = lossy_codec("dither")
    out = {kind: folder / f"{kind}.delta.safetensors" for kind in ("exact", "lossy", "progressive", "tasks", "shards")}
    pack(base, tuned, out["exact"])
    pack(base, tuned, out["lossy"], choose=choose)
    pack(base, tuned, out["progressive"], choose=choose, progressive=True)
    shared = codec, check_options(codec, {"bits": 4.0})
    pack_tasks(base, {"one": tuned, "two": other}, out["tasks"], method=Method("tall"), shared=shared)
    pack(base, tuned, out["shards"], choose=choose, progressive=True, shard_size=3000)
    views = {"progressive": ["", "preview"], "tasks": ["one", "two"], "shards": ["", "preview"]}
    made = {kind: ([path], views.get(kind, [""])) for kind, path in out.items()}
    index = folder / "shards.delta.safetensors.index.json"
    made["shards"] = ([index, *sorted(folder.glob("shards-*.safetensors"))], views["shards"])
    return made


def flips(count: int) -> list[str]:
    """Flip `count` random bits, shared out over packages of all kinds: each must be refused when the package is opened or
    checked, and each fiftieth when it is applied, with nothing left behind. Returns what slipped through."""
    from surgery.delta.apply import apply
    from surgery.delta.check import verify_package
    from surgery.delta.container import Package
    from surgery.delta.rebuild import PackageNode
    from surgery.delta.shards import location_of
    from surgery.errors import Refused
    from surgery.inputs import open_node

    rng, slipped = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory(dir=WORK) as text:
        folder = Path(text)
        models(folder, rng)
        base, made = open_node(str(folder / "base")), packages(folder)
        for kind, (files, views) in made.items():
            opened, out = str(files[0]), folder / "out"
            whole = [path.read_bytes() for path in files]
            ends = np.cumsum([8 * len(raw) for raw in whole])
            for turn, at in enumerate(rng.integers(0, ends[-1], count // len(made)).tolist()):
                i = int(np.searchsorted(ends, at, side="right"))
                byte, bit = divmod(at - (int(ends[i - 1]) if i else 0), 8)
                with open(files[i], "r+b") as file:
                    os.pwrite(file.fileno(), bytes([whole[i][byte] ^ 1 << bit]), byte)
                where = f"{kind}: bit {bit} of byte {byte} of {files[i].name}"
                try:
                    verify_package(Package(opened))
                    slipped.append(f"{where}: checked")
                except Refused:
                    pass
                for view in views if turn % 50 == 0 else []:
                    place = location_of(opened, view)
                    slipped += _applied(lambda p=place: PackageNode(Package(p), base), apply, out, where)
                files[i].write_bytes(whole[i])
            verify_package(Package(opened))
    return slipped


def _applied(make: Any, apply: Any, out: Path, where: str) -> list[str]:
    """What is left behind of a refusal. A view that does not need what is damaged is made: its hashes say that it is right."""
    import shutil

    from surgery.errors import Refused

    try:
        apply(make(), out, threads=1)
    except Refused:
        return [f"{where}: output left behind"] if out.exists() or out.with_name("out.partial").exists() else []
    shutil.rmtree(out)
    return []
