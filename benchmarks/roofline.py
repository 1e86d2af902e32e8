"""How near each operator comes to moving bytes and nothing else.

    python benchmarks/roofline.py                       # every operator that streams; 5 minutes, 4 GB of disk
    python benchmarks/roofline.py --ops average,ties --runs 3

For every operator of the registry that is not of whole matrices: the bytes that its plan reads (every pass) and writes, over
the seconds that `surgery run` took for the run (start and planning apart), against the rate of `cat` over the same inputs and
as large an output, in the same minute and with the same page cache. 1.00 is a run that moves bytes as fast as `cat` does, with
nothing computed; a run that reads in two passes moves its inputs twice.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from measure import (
    WORK,
    Memory,
    common_options,
    family,
    figure,
    floor_command,
    measure,
    median,
    publish,
    remove,
    say,
    table,
    warm,
    weights,
)
from memory import planned, recipes

HEAD = ("operator", "kind", "passes", "GB moved", "seconds", "GB/s", "cat GB/s", "of cat", "process s", "cat s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="family of models.py, made if absent [.bench/SIZE]")
    parser.add_argument("--size", default="b1x3", help="size that is made [b1x3]")
    parser.add_argument("--ops", help="which, separated by commas [all]")
    parser.add_argument("--part", default="1/1", help="of the list, the first of two parts: 1/2 [all]")
    parser.add_argument("--runs", type=int, default=1)
    common_options(parser)
    args = parser.parse_args()
    models, work = (args.models or WORK / args.size).resolve(), args.work.resolve() / "roofline"
    family(models, args.size, 3)
    cases = recipes(models, work, matrices=False)
    cases = [c for c in cases if args.ops is None or c["name"] in args.ops.split(",")]
    part, parts = map(int, args.part.split("/"))
    cases = cases[part - 1 :: parts]
    plans = {case["name"]: planned(args, case) for case in cases}
    rows, record = [], []
    with Memory(work, "auto") as memory:
        for case in cases:
            row, entry = measured(args, case, plans[case["name"]], memory, work)
            rows.append(row)
            record.append(entry)
            say(" ".join(row))
    publish(args, table(HEAD, rows), {"runs": record})
    return 0


def measured(args: argparse.Namespace, case: dict, cost: dict, memory: Memory, work: Path) -> tuple[list[str], dict]:
    """A row, and its record."""
    inputs, out, copy = [Path(p) for p in case["inputs"]], work / "out", work / "copy.safetensors"
    warm(weights(*inputs))
    ours, cats = [], []
    for _ in range(args.runs):
        for runs, command, made in (
            (ours, [args.surgery, "run", case["recipe"], "-o", out], out),
            (cats, floor_command(inputs, inputs[0], copy), copy),
        ):
            memory.fill()
            runs.append(measure(command))
            remove(made)
    said = [float(m[1]) for run in ours if (m := re.search(r"in ([\d.]+) s \(", run.log))]
    seconds = sorted(said)[len(said) // 2] if said else None
    moved, size = cost["read"] + cost["written"], sum(f.stat().st_size for f in weights(*inputs)) + cost["written"]
    process, cat = median(ours), median(cats)
    rate = moved / 1e9 / seconds if seconds else None
    floor = size / 1e9 / cat if cat else None
    passes = cost["read"] / (size - cost["written"])
    row = [case["name"], case["kind"], f"{passes:.1f}", f"{moved / 1e9:.2f}", figure(seconds), figure(rate), figure(floor)]
    row += [figure(rate / floor if rate and floor else None), figure(process), figure(cat)]
    entry = {"name": case["name"], "moved": moved, "seconds": said, "ours": [r.record() for r in ours]}
    return row, entry | {"cat": [r.record() for r in cats]}


if __name__ == "__main__":
    sys.exit(main())
