"""Compare what `surgery run` writes with float64 arithmetic rounded once, bit for bit.

    python benchmarks/accuracy.py --peer PATH_TO_PYTHON

On a small bf16 family, every operator's output file is compared elementwise with oracle.py. The figure is
the share of elements that are equal in every bit: 100 % is what one rounding of the exact result gives.
Elements that a formula leaves open (equal magnitudes at a trimming threshold) are counted apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracle
from measure import WORK, common_options, family, measure, peer_script, publish, remove, say, table
from operations import OPERATIONS, peer_config, recipe

CHECKS = ("linear", "lerp", "slerp", "task_arithmetic", "lines", "ties", "ties_global", "dare_all", "stock")
LEAST = 99.9
"""Per cent of equal elements below which one of ours counts as wrong."""


@dataclass
class Share:
    """How many elements were compared, how many are equal, how many the formula leaves open."""

    compared: int = 0
    equal: int = 0
    open: int = 0

    @property
    def percent(self) -> float:
        return 100 * self.equal / self.compared if self.compared else 0.0


def expected(name: str, models: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Yield each tensor's name, its bf16 bits by the formula, and which elements are left open, if any."""
    base, *tuned = (
        {key: oracle.widen(bits) for key, bits in oracle.read(models / folder).items()}
        for folder in ("base", "ft0", "ft1", "ft2")
    )
    depth = 1 + max(int(key.split(".")[2]) for key in base if key.startswith("model.layers."))
    limits: list[float] = []
    if name == "ties_global":
        flat = [np.concatenate([(model[key] - base[key]).ravel() for key in base]) for model in tuned]
        limits = [oracle.threshold(delta, 0.3) for delta in flat]
    for key, b in base.items():
        ms = [model[key] for model in tuned]
        still = None
        if name == "linear":
            value = oracle.average(ms)
        elif name == "lerp":
            value = oracle.lerp(ms[0], ms[1], 0.25)
        elif name == "slerp":
            value = oracle.slerp(ms[0], ms[1], 0.4)
        elif name in ("task_arithmetic", "dare_all"):
            value = oracle.task_arithmetic(b, ms, 0.3)
        elif name == "lines":
            value = oracle.lines(b, ms[0], key, depth, 0.3, 1.0)
        elif name == "stock":
            value = oracle.stock(b, ms)
        elif name in ("ties", "ties_global"):
            value, still = oracle.ties(b, ms, limits or [oracle.threshold(m - b, 0.3) for m in ms])
        else:
            raise ValueError(f"no formula for {name}")
        yield key, oracle.narrow(value), still


def compare(name: str, models: Path, out: Path) -> Share:
    """Return how much of a merged checkpoint equals the oracle; a missing or extra tensor is an error."""
    got, share = oracle.read(out), Share()
    for key, bits, still in expected(name, models):
        mine = got.pop(key)
        if mine.shape != bits.shape:
            raise ValueError(f"{name}: {key} has shape {mine.shape}, not {bits.shape}")
        counts = np.ones(bits.shape, bool) if still is None else ~still
        share.compared += int(counts.sum())
        share.equal += int(((mine == bits) & counts).sum())
        share.open += int(bits.size - counts.sum())
    if got:
        raise ValueError(f"{name}: tensors that no input has: {', '.join(sorted(got))}")
    return share


def check(name: str, who: str, argv: list, models: Path, out: Path) -> Share | None:
    """Run a merge and compare its output, None where it failed."""
    remove(out)
    run = measure(argv)
    try:
        if not run.ok:
            raise ValueError(run.reason)
        return compare(name, models, out)
    except (ValueError, KeyError, OSError) as error:
        say(f"{name} {who} failed: {error}")
        return None
    finally:
        remove(out)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="family to merge, made if absent [.bench/SIZE]")
    parser.add_argument("--size", default="small", help="size of the family that is made [small]")
    parser.add_argument("--ops", default=",".join(CHECKS), help="which operators [all]")
    parser.add_argument("--peer", type=peer_script, metavar="PYTHON", help="Python of mergekit's environment")
    common_options(parser)
    args = parser.parse_args()
    args.ops = args.ops.split(",")
    if unknown := [name for name in args.ops if name not in CHECKS]:
        parser.error(f"no formula for {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    args.models, args.work = (args.models or WORK / args.size).resolve(), args.work.resolve()
    return args


def main() -> int:
    args = options()
    family(args.models, args.size, 3)
    if not args.surgery:
        say("no surgery command beside this Python: our column stays empty")
    rows, record, good = [], {}, True
    for name in args.ops:
        operation, shares = OPERATIONS[name], {}
        if args.surgery:
            file, out = recipe(operation, args.models, args.work / f"{name}.yaml"), args.work / f"{name}-ours"
            shares["ours"] = check(name, "ours", [args.surgery, "run", file, "-o", out], args.models, out)
            good = good and shares["ours"] is not None and shares["ours"].percent >= LEAST
        if args.peer and (file := peer_config(operation, args.models, args.work / f"{name}.peer.yaml")):
            out = args.work / f"{name}-peer"
            shares["peer"] = check(name, "peer", [args.peer, file, out], args.models, out)
        known = [share for share in shares.values() if share]
        cells = [f"{s.percent:.4f}" if (s := shares.get(who)) else "-" for who in ("ours", "peer")]
        rows.append([name, *cells, *((f"{known[0].compared:,}", f"{known[0].open:,}") if known else "--")])
        record[name] = {who: vars(share) if share else None for who, share in shares.items()}
        say("  ".join(rows[-1]))
    head = ("operator", "ours equal %", "peer equal %", "elements", "left open")
    publish(args, table(head, rows), {"equal": record})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
