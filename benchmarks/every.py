"""A recipe for every registered operator: what a new one is measured by without being listed anywhere.

    python benchmarks/every.py FAMILY WORK       one recipe in WORK for each operator, and a list of them as JSON on stdout

FAMILY holds base, ft0, ft1, ft2 (models.py). Operators of deltas get the differences of the fine-tunes to the base, and their
result is added to it; operators that want Fisher information get magnitudes of fine-tunes in its place. Parameters are the
defaults; what has none gets a value that is stated here.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import yaml

from surgery.ops.declare import REQUIRED, Op, registry

MODELS = {"base": "base", "m0": "ft0", "m1": "ft1", "m2": "ft2"}
GIVEN = {"by": 0.5, "t": 0.3, "alpha": 0.3, "loss": [1.0, 2.0, 3.0], "rules": {"*.mlp.*": "m0", "*": "m1"}}


def steps(op: Op) -> tuple[list[str], dict[str, dict]]:
    """The models that a recipe for `op` reads, and its steps; the last is called `merged`."""
    count = int(min(max(3, op.takes.at_least), op.takes.at_most))
    if op.name in ("lines", "graft"):  # what further inputs are for is another of their ways
        count = op.takes.at_least
    made: dict[str, dict] = {}
    of, used = [], set()
    models = op.takes.models(2 * count) if op.takes.statistics else count
    for i in range(models):
        name = op.takes.names[min(i, len(op.takes.names) - 1)]
        model = "base" if "base" in name else f"m{i % 3}"
        used.add(model)
        if op.takes.space_of(i) == "delta":
            used.add("base")
            made[f"t{i}"] = {"op": "diff", "of": [model, "base"]}
            model = f"t{i}"
        of.append(model)
    if op.takes.statistics:
        of += [f"s{i}" for i in range(models)]
        used |= {f"s{i}" for i in range(models)}
    keys = {p.name: GIVEN[p.name] for p in op.params if p.default is REQUIRED}
    is_delta = op.gives == "delta" or (op.gives == "first" and op.takes.space_of(0) == "delta")
    made["task" if is_delta else "merged"] = {"op": op.name, "of": of, **keys}
    if is_delta:
        used.add("base")
        made["merged"] = {"op": "add", "of": ["base", "task"], "weight": 0.3}
    return sorted(used), made


def magnitudes(model: Path, out: Path) -> None:
    """A statistics checkpoint of the kind "fisher" that fits any model: the magnitudes of a bfloat16 checkpoint, in float32."""
    if out.exists():
        return
    partial = out.with_name(out.name + ".making")
    partial.mkdir(parents=True, exist_ok=True)
    for file in sorted(model.glob("*")):
        raw = file.read_bytes()
        if file.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", raw[:8])
            header = json.loads(raw[8 : 8 + length])
            for entry in header.values():
                if "dtype" in entry:
                    entry |= {"dtype": "F32", "data_offsets": [2 * at for at in entry["data_offsets"]]}
            text = json.dumps(header).encode()
            data = (np.frombuffer(raw, np.uint16, offset=8 + length) & 0x7FFF).astype(np.uint32) << 16
            raw = struct.pack("<Q", len(text)) + text + data.tobytes()
        (partial / file.name).write_bytes(raw)
    manifest = {"format": "surgery-statistics/1", "kind": "fisher", "samples": 1, "tokens": 1, "length": 1, "seed": 0}
    (partial / "statistics.json").write_text(json.dumps(manifest))
    partial.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--matrices", action="store_true", help="operators of whole matrices, instead of all others")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = []
    for op in registry.values():
        if (op.locality == "matrix" and not op.linear) != args.matrices or op.takes.statistics == "gram":
            continue
        used, made = steps(op)
        for name in used:
            if name.startswith("s"):
                magnitudes(args.family / MODELS[f"m{name[1:]}"], args.family / f"fisher{name[1:]}")
        where = {n: str((args.family / (MODELS.get(n) or f"fisher{n[1:]}")).resolve()) for n in used}
        file = args.work / f"{op.name}.yaml"
        content = {"models": where, "steps": made, "output": {"from": "merged"}}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        kind = "sum" if op.linear else op.locality
        found.append({"name": op.name, "kind": kind, "recipe": str(file), "inputs": list(where.values())})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
