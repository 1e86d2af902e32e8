"""Fuzz the parsers of what strangers write: headers, index files, recipes, package manifests, torch archives.

    python benchmarks/fuzz.py --seconds 60                 # every target for a minute
    python benchmarks/fuzz.py header recipe --seconds 600

With atheris installed (`pip install atheris`) the search is guided by coverage of `surgery`; without, a seeded mutator does
what it can. Property: a parser returns, or raises SurgeryError; while it works no file is opened outside of the target's own
folder (those of the interpreter and the system apart), nothing is executed, and (with atheris) resident memory stays below
--rss. Anything else stops the target, leaves its input under --findings, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
EXECUTED = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect", "ctypes.dlopen")
SYSTEM = (sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], str(HERE.parent), "/proc/", "/sys/", "/usr/",
          *filter(None, sys.path))  # fmt: skip
TOKENS = [
    b'"', b"{", b"}", b"[", b"]", b":", b",", b"0", b"-1", b"9999999999999999999", b"1e999", b"NaN", b"null", b"true",
    b"\\ud800",
    b"data_offsets", b"shape", b"dtype", b"F32", b"BF16", b"__metadata__", b"weight_map", b"../", b"&a ", b"*a", b"<<: ",
    b"!!int ", b"!!python/object/apply:os.system ", b"\n", b"  ", b"- ", b"? ", b"models", b"steps", b"output", b"op", b"of",
    b"from", b"merge_method", b"\x80\x02", b"cos\nsystem\n", b"R", b"\x81", b"b", b".", b"\x00" * 8,
]  # fmt: skip

Target = Callable[[bytes], None]


# -- targets: folder -> (what to call with each input, seeds) ------------------------------------------------------------


def header(folder: Path) -> tuple[Target, list[bytes]]:
    from surgery.checkpoint.header import parse_header, read_header

    path = folder / "model.safetensors"

    def call(data: bytes) -> None:
        try:
            parse_header(data, 8 + len(data) + 8, str(path))
        finally:
            if len(data) % 8 == 0:  # and now and then by way of a file, with the length that it says itself
                path.write_bytes(data)
                read_header(str(path))

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    seeds = [
        {"x": entry},
        {"__metadata__": {"format": "pt"}, "x": entry},
        {"a.b": {**entry, "shape": [1, 1, 2]}, "b": {**entry, "data_offsets": [8, 8], "shape": [0]}},
    ]
    raw = [json.dumps(s).encode() for s in seeds]
    return call, [*raw, *(struct.pack("<Q", len(r)) + r + b"\0" * 8 for r in raw)]


def index(folder: Path) -> tuple[Target, list[bytes]]:
    from surgery.checkpoint.source import open_source

    names = ("model-1.safetensors", "model-2.safetensors")
    for i, name in enumerate(names):
        raw = json.dumps({f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    place = folder / "model.safetensors.index.json"

    def call(data: bytes) -> None:
        place.write_bytes(data)
        open_source(str(folder))

    said = {"metadata": {"total_size": 8}, "weight_map": {f"t{i}": n for i, n in enumerate(names)}}
    return call, [json.dumps(said).encode(), b"{}"]


def _models(folder: Path) -> None:
    for name in ("base", "a"):
        (folder / name).mkdir()
        shapes = {"model.embed_tokens.weight": [3, 2], "model.norm.weight": [2]}
        shapes |= {f"model.layers.{i}.w.weight": [2, 2] for i in range(2)}
        entries, at = {}, 0
        for tensor, shape in shapes.items():
            end = at + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            entries[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
            at = end
        raw = json.dumps(entries).encode()
        (folder / name / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * at)


def recipe(folder: Path) -> tuple[Target, list[bytes]]:
    from surgery.engine.plan import make_plan
    from surgery.recipe.native import read_recipe

    _models(folder)
    path = folder / "recipe.yaml"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        read = read_recipe(path, {})
        make_plan(read.node, read.settings)

    return call, [
        b"models: {base: base, a: a}\nsteps:\n  d: {op: diff, of: [a, base]}\n  out: {op: add, of: [base, d], weight: 0.5}\n"
        b"output: {from: out, dtype: bfloat16}\n",
        b"models: {base: base, a: {source: a}}\nsteps:\n"
        b"  m: {op: average, of: [base, a], weight: {'*norm*': 1, '*': [0.3, 0.6]}}\noutput: {from: m}\n",
        b"merge_method: slerp\nbase_model: base\nmodels: [{model: base}, {model: a}]\n"
        b"parameters: {t: [0, 0.5, 1]}\ndtype: float32\n",
        b"merge_method: ties\nbase_model: base\nslices:\n  - sources:\n"
        b"    - {model: a, layer_range: [0, 2], parameters: {density: 0.5, weight: 1}}\n"
        b"    - {model: base, layer_range: [0, 2]}\n",
        b"merge_method: passthrough\nslices:\n - sources: [{model: a, layer_range: [0, 1]}]\n"
        b" - sources: [{model: base, layer_range: [1, 2]}]\n",
    ]  # fmt: skip


def package(folder: Path) -> tuple[Target, list[bytes]]:
    """A manifest with its header made to fit, so that what is fuzzed is what comes after the hashes."""
    import numpy as np

    from surgery.delta.codecs.stream import pack_text
    from surgery.delta.container import Package
    from surgery.delta.manifest import read_manifest
    from surgery.delta.pack import pack
    from surgery.delta.shards import header_of
    from surgery.inputs import open_node

    _models(folder)
    weights = folder / "a" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-40] + np.arange(10, dtype=np.float32).tobytes())
    pack(open_node(str(folder / "base")), open_node(str(folder / "a")), folder / "seed.delta.safetensors", threads=1)
    whole = (folder / "seed.delta.safetensors").read_bytes()
    said = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    begin, end = said["delta/manifest"]["data_offsets"]
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    from surgery.delta.codecs.stream import unpack_text

    manifest = unpack_text(whole[start + begin : start + end], int(said["__metadata__"]["delta.manifest.size"]))
    path = folder / "fuzzed.delta.safetensors"

    def call(data: bytes) -> None:
        if data[:1] == b"{":
            try:
                found = json.loads(data)
                packed = pack_text(data)
                first = header_of(found, packed, len(data), start)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                read_manifest(data, str(path))
                return
            path.write_bytes(first + whole[start : start + begin] + packed)
        else:
            path.write_bytes(data)
        opened = Package(str(path))
        opened.manifest  # noqa: B018  read when it is first asked for

    return call, [manifest, whole]


def pickled(folder: Path) -> tuple[Target, list[bytes]]:
    import torch

    from surgery.checkpoint.pickled import read_pickled

    path = folder / "m.bin"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        read_pickled(str(path))

    seeds = []
    for value in ({"x": torch.ones(2)}, {"state_dict": {"x": torch.ones(4, 2).T, "y": torch.ones(3, dtype=torch.int8)}}):
        torch.save(value, path)
        seeds.append(path.read_bytes())
    return call, seeds


TARGETS = {f.__name__: f for f in (header, index, recipe, package, pickled)}


# -- the property --------------------------------------------------------------------------------------------------------


def guarded(call: Target, folder: Path) -> Target:
    """`call` that lets SurgeryError pass and turns anything that is not allowed into an error."""
    from surgery.errors import SurgeryError

    state = {"on": False}

    def audit(event: str, args: Sequence[Any]) -> None:
        if not state["on"]:
            return
        if event in EXECUTED and not (event == "ctypes.dlopen" and args[0] is None):
            raise AssertionError(f"{event} {args!r}")
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.startswith((str(folder), *SYSTEM)):
                raise AssertionError(f"opened {path}")

    sys.addaudithook(audit)

    def run(data: bytes) -> None:
        state["on"] = True
        try:
            call(data)
        except SurgeryError:
            pass
        finally:
            state["on"] = False

    return run


# -- engines -------------------------------------------------------------------------------------------------------------


def mutate(data: bytes, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(7)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at:at] = rng.choice(TOKENS)
        elif kind == 2:
            del made[at : at + rng.choice((1, 2, 8, 64))]
        elif kind == 3:
            made[at:at] = made[at : at + rng.choice((4, 16, 64))] * rng.choice((1, 2, 50))
        elif kind == 4:
            other = rng.choice(seeds)
            cut = rng.randrange(len(other) + 1)
            made[at:] = other[cut:]
        elif kind == 5:
            token = rng.choice(TOKENS)
            made[at : at + len(token)] = token
        else:
            made[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(made[:65536])


def plain(run: Target, seeds: list[bytes], seconds: float, seed: int, findings: Path) -> int:
    rng, pool, count, end = random.Random(seed), list(seeds), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate(rng.choice(pool), seeds, rng)
        try:
            run(data)
        except BaseException:
            (findings / f"plain-{count}").write_bytes(data)
            raise
        count += 1
        if rng.random() < 0.01:
            pool[rng.randrange(len(seeds), len(pool) + 1) if len(pool) > 200 else len(pool):] = [data]
    return count


def one(name: str, seconds: float, seed: int, findings: Path, rss: int, engine: str) -> None:
    """One target in this process; prints `Done N runs`."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)).resolve()
    os.environ["HF_HOME"] = str(folder / "hub")  # a recipe may name models of the hub: they are looked for here
    import huggingface_hub.errors  # noqa: F401  and what it opens on import is not the target's doing

    try:
        if engine == "atheris":
            import atheris

            with atheris.instrument_imports(include=["surgery", "yaml"]):
                import surgery  # noqa: F401

                call, seeds = TARGETS[name](folder)
            corpus = folder / "corpus"
            corpus.mkdir()
            for i, data in enumerate(seeds):
                (corpus / str(i)).write_bytes(data)
            words = folder / "words"
            words.write_text("".join('"' + "".join(rf"\x{b:02x}" for b in token) + '"\n' for token in TOKENS))
            options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", f"-rss_limit_mb={rss}", f"-dict={words}",
                       f"-artifact_prefix={findings}/{name}-", "-timeout=20", "-max_len=16384"]  # fmt: skip
            atheris.Setup([sys.argv[0], *options, str(corpus)], guarded(call, folder))
            atheris.Fuzz()
        else:
            call, seeds = TARGETS[name](folder)
            print(f"Done {plain(guarded(call, folder), seeds, seconds, seed, findings)} runs", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rss", type=int, default=1500, help="MB of resident memory at most")
    parser.add_argument("--findings", type=Path, default=HERE.parent / ".bench" / "fuzz")
    parser.add_argument("--engine", choices=("atheris", "plain"), help="default: atheris where it is installed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # one target, in this process
    args = parser.parse_args()
    args.findings.mkdir(parents=True, exist_ok=True)
    if args.here:
        one(args.targets[0], args.seconds, args.seed, args.findings, args.rss, args.engine)
        return
    engine = args.engine or ("atheris" if importlib.util.find_spec("atheris") else "plain")
    failed, env = False, {**os.environ, "PYTHONPATH": str(HERE.parent)}  # atheris does not see editable installs
    for name in args.targets or TARGETS:
        limits = ["--seconds", str(args.seconds), "--seed", str(args.seed), "--rss", str(args.rss)]
        command = [sys.executable, __file__, name, "--here", "--engine", engine, *limits]
        command += ["--findings", str(args.findings.resolve())]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=env)
        said = done.stdout + done.stderr
        counts = re.findall(r"Done (\d+) runs|number_of_executed_units: (\d+)", said)
        count = max((int(a or b) for a, b in counts), default=0)
        coverage = re.findall(r"cov: (\d+)", said)
        print(f"{name}: {engine}, {count:,} executions in {time.monotonic() - began:.0f} s"
              + (f", coverage {coverage[0]} -> {coverage[-1]}" if coverage else "")
              + ("" if done.returncode == 0 else f", STOPPED: see {args.findings}"), flush=True)  # fmt: skip
        if done.returncode:
            failed = True
            print(said[-4000:], file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
