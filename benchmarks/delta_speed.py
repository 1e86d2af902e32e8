"""How fast exact packages are made and applied, beside XOR with zstd -1 (slime's way) on the same model in the same run.

    python benchmarks/delta_speed.py                   # the pair main16 of delta_pairs.py, made on first use
    python benchmarks/delta_speed.py --pair s250 --copies 8

The model is the pair's matrices several times over, with rows rolled so that no two tensors are alike: 16 copies are 0.7 GB.
All rows but slime's write files, verify everything (each chunk's hash, the base through the result's) and include reading and
publishing; slime's work in memory and verify nothing. numpy: SURGERY_KERNELS=0. Megabytes of model a second, all cores, best of
`--repeat`; each row's packing is a process of its own, and the kernels are loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from delta import slime_speed
from delta_pairs import pair
from measure import WORK, table

BARS = {"numpy apply": 200.0, "numba apply": 800.0}
WITHIN = 3.0  # times that slime's packing and applying may be faster than --fast


def read(folder: Path) -> dict[str, tuple[str, list[int], Any]]:
    """name -> (type, shape, bytes)."""
    raw = np.memmap(folder / "model.safetensors", np.uint8, "r")
    length = int(raw[:8].view(np.uint64)[0])
    header = json.loads(bytes(raw[8 : 8 + length]))
    header.pop("__metadata__", None)
    places = {n: [8 + length + x for x in e["data_offsets"]] for n, e in header.items()}
    return {n: (e["dtype"], e["shape"], raw[slice(*places[n])]) for n, e in header.items()}


def repeated(source: Path, folder: Path, copies: int) -> Path:
    """A checkpoint of the matrices of `source`, `copies` times, rows rolled."""
    found = {n: t for n, t in read(source).items() if len(t[1]) == 2}
    header: dict[str, Any] = {}
    at = 0
    for copy in range(copies):
        for name, (dtype, shape, raw) in found.items():
            header[f"{copy}.{name}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(raw)]}
            at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for copy in range(copies):
            for _, shape, raw in found.values():
                file.write(np.roll(raw.reshape(shape[0], -1), 7 * copy, axis=0).tobytes())
    return folder


def timed(base: Path, tuned: Path, work: Path, fast: bool, repeat: int) -> dict[str, float]:
    """Megabytes a second of packing, applying and verifying, and the ratio; in this process."""
    from surgery.delta.apply import apply, verify
    from surgery.delta.codecs import fast as kernels
    from surgery.delta.codecs.exact import FAST, ULP
    from surgery.delta.container import Package
    from surgery.delta.pack import pack
    from surgery.delta.rebuild import PackageNode
    from surgery.inputs import open_node

    compiled, package, out = kernels.load() is not None, work / "x.delta.safetensors", work / "out"

    def node() -> PackageNode:
        return PackageNode(Package(str(package)), open_node(str(base)))

    codec, ends = FAST if fast else ULP, (open_node(str(base)), open_node(str(tuned)))
    made = [pack(*ends, package, codec=codec, overwrite=True) for _ in range(repeat)]
    total, best = made[0].model / 1e6, {"apply": 0.0, "verify": 0.0}
    verify(node())  # compiles, and warms the page cache as packing did
    for _ in range(repeat):
        for what in best:
            shutil.rmtree(out, ignore_errors=True)
            began = time.perf_counter()
            apply(node(), out) if what == "apply" else verify(node())
            best[what] = max(best[what], total / (time.perf_counter() - began))
            if what == "apply":
                assert filecmp.cmp(out / "model.safetensors", tuned / "model.safetensors", shallow=False)
    return {
        "compiled": compiled,
        "ratio": made[0].ratio,
        "pack": max(total / m.seconds for m in made),
        **best,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="main16")
    parser.add_argument("--pairs-at", type=Path, default=WORK / "delta", help="where pairs are kept")
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=4, metavar=("BASE", "MODEL", "WORK", "FAST"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        base, tuned, work, fast = given.one
        print(json.dumps(timed(Path(base), Path(tuned), Path(work), fast == "1", given.repeat)))
        return 0
    sources = pair(given.pairs_at, given.pair)
    WORK.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        base, tuned = (repeated(s, Path(folder) / n, given.copies) for s, n in zip(sources, ("base", "tuned"), strict=True))
        up, down = slime_speed(base, tuned)
        rows, found = [["slime (in memory, unverified)", "", f"{up:.0f}", f"{down:.0f}", ""]], {}
        ways = (("numpy", "0", "0"), ("numba", "1", "0"), ("--fast, numpy", "0", "1"), ("--fast", "1", "1"))
        for name, kernels, fast in ways:
            command = [sys.executable, __file__, "--repeat", str(given.repeat), "--one", str(base), str(tuned), folder, fast]
            done = subprocess.run(command, env={**os.environ, "SURGERY_KERNELS": kernels}, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            one = found[name] = json.loads(done.stdout)
            if kernels == "1" and not one["compiled"]:
                print("numba is not installed: rows without `numpy` are numpy's as well", file=sys.stderr)
            rows.append([name, *(f"{one[k]:.{d}f}" for k, d in (("ratio", 2), ("pack", 0), ("apply", 0), ("verify", 0)))])
        size = (base / "model.safetensors").stat().st_size / 1e6
    print(f"{size:.0f} MB, {given.pair}\n")
    print(table(["way", "ratio", "pack MB/s", "apply", "verify"], rows))
    applied = {bar: found[bar.split()[0]]["apply"] for bar in BARS}
    missed = [f"{bar}: {applied[bar]:.0f} of {least:.0f}" for bar, least in BARS.items() if applied[bar] < least]
    for what, anchor in (("pack", up), ("apply", down)):
        if found["--fast"][what] * WITHIN < anchor:
            missed.append(f"--fast {what}: slime's is {anchor / found['--fast'][what]:.1f} times as fast")
    print("\n".join(missed) if missed else "every bar is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
