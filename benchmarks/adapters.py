"""What adapters cost: merging in Core Space and KnOTS against merging dense, applying, extracting.

    python benchmarks/adapters.py --size b1

Every figure is a whole process, warm, the median of `--runs`. The adapters are made up, with factors for every linear layer
of the family's base; with `--only` some of the commands.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
from pathlib import Path

from measure import WORK, Run, common_options, family, figure, measure, median, publish, remove, say, table, warm, weights

HEAD = ("command", "seconds", "peak RSS MB")
COUNT, RANK = 3, 16


def adapters(base: Path, out: Path) -> list[Path]:
    """Folders of COUNT adapters of rank RANK in bfloat16."""
    shapes: dict[str, list[int]] = {}
    for file in weights(base):
        with file.open("rb") as handle:
            header = json.loads(handle.read(struct.unpack("<Q", handle.read(8))[0]))
        shapes |= {n: e["shape"] for n, e in header.items() if n.endswith("_proj.weight")}
    made = []
    for i in range(COUNT):
        folder = out / f"adapter{i}"
        made.append(folder)
        if (folder / "adapter_config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        entries, at = {"__metadata__": {"format": "pt"}}, 0
        for name, (rows, columns) in shapes.items():
            for role, shape in (("A", [RANK, columns]), ("B", [rows, RANK])):
                end = at + 2 * shape[0] * shape[1]
                key = f"base_model.model.{name.removesuffix('.weight')}.lora_{role}.weight"
                entries[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
                at = end
        raw = json.dumps(entries).encode()
        with (folder / "adapter_model.safetensors").open("wb") as handle:
            handle.write(struct.pack("<Q", len(raw)) + raw)
            handle.write(_small_bf16(at // 2, seed=i))
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return made


def _small_bf16(count: int, seed: int) -> bytes:
    """`count` bfloat16 numbers of either sign, of magnitude 2^-7 to 2^-5. Without numpy: see measure.py."""
    raw = bytearray(random.Random(seed).randbytes(2 * count))
    raw[1::2] = raw[1::2].translate(bytes(0x3C | (b & 0x80) for b in range(256)))
    return bytes(raw)


def commands(base: Path, tuned: Path, made: list[Path]) -> dict[str, list[str | Path]]:
    """Label -> arguments of `surgery lora`, but the output."""
    rank = ("--rank", str(COUNT * RANK))
    return {
        f"merge {COUNT}, add": ["merge", *made],
        f"merge {COUNT}, add, dense": ["merge", *made, "--space", "dense"],
        f"merge {COUNT}, ties, core": ["merge", *made, "--method", "ties"],
        f"merge {COUNT}, ties, knots": ["merge", *made, "--method", "ties", "--space", "knots"],
        f"merge {COUNT}, ties, dense": ["merge", *made, "--method", "ties", "--space", "dense", *rank],
        f"merge {COUNT}, tsv, core": ["merge", *made, "--method", "tsv"],
        f"merge {COUNT}, iso_c, core": ["merge", *made, "--method", "iso_c"],
        "apply 1": ["apply", base, made[0]],
        f"apply {COUNT}": ["apply", base, *made],
        f"extract, rank {RANK}": ["extract", tuned, "--base", base, "--rank", str(RANK), "--others", "skip"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(parser)
    parser.add_argument("--models", type=Path, default=WORK, help="where the models are, or will be made")
    parser.add_argument("--size", default="b1", help="of the family: tiny, small, m100, b1 or b4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", default="", help="commands whose label holds this")
    args = parser.parse_args()
    where = args.models / f"adapters-{args.size}"
    family(where, args.size, 1)
    base, tuned = where / "base", where / "ft0"
    made = adapters(base, where)
    warm([*weights(base), *weights(tuned), *(f / "adapter_model.safetensors" for f in made)])
    rows, record, failed = [], {}, False
    for label, command in commands(base, tuned, made).items():
        if args.only not in label:
            continue
        runs: list[Run] = []
        for _ in range(args.runs):
            out = args.work / "adapters-out"
            remove(out)
            runs.append(measure([args.surgery, "lora", *command, "-o", out]))
            remove(out)
        say(f"{label}: {figure(median(runs))} s")
        for run in runs:
            if not run.ok:
                say(f"  {run.reason}")
                failed = True
        rows.append((label, figure(median(runs)), figure(median(runs, "peak_mb"), ".0f")))
        record[label] = [run.record() for run in runs]
    publish(args, table(HEAD, rows), {"runs": record, "size": args.size})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
