"""Check the small bars: what must stay cheap whatever the weights weigh.

    python benchmarks/commands.py                    # all; the memory bars need 45 GB of disk
    python benchmarks/commands.py --bars help,plan,small

* help: `surgery --help` is quick and small, and imports no torch, transformers or ray.
* plan: `surgery plan` of an average of two 671B models (sparse files, true headers).
* small: `surgery run` of an average of two models of 16,000 tensors of 8 floats.
* memory: the peak of a merge does not grow when the model and its largest tensor are four times larger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import (
    WORK,
    Run,
    common_options,
    family,
    figure,
    generate,
    measure,
    median,
    publish,
    ratio,
    remove,
    say,
    table,
)
from operations import operations, recipe, write_recipe

LIMITS = {
    "help seconds": 0.25,
    "help MB": 80.0,
    "help heavy imports": 0.0,
    "plan seconds": 4.0,
    "plan MB": 400.0,
    "small seconds": 5.0,
    "memory growth": 1.1,
}
"""What each bar may come to. Seconds are of a 2-core machine."""

HEAVY = ("torch", "transformers", "ray")
MERGES = ("linear", "task_arithmetic", "ties", "ties_global", "stock")


@dataclass(frozen=True)
class Bar:
    """One figure and the limit it must keep; a figure that could not be taken does not."""

    name: str
    value: float | None
    limit: float | None
    unit: str
    note: str = ""

    @property
    def holds(self) -> bool:
        return self.value is not None and (self.limit is None or self.value <= self.limit)

    def row(self) -> list[str]:
        form = ".0f" if self.unit in ("MB", "modules") else ".2f"
        limit = "-" if self.limit is None else f"{self.limit:g}"
        verdict = "-" if self.holds and self.limit is None else "yes" if self.holds else "NO"
        return [self.name, figure(self.value, form), limit, self.unit, verdict, self.note]


def repeat(args: argparse.Namespace, argv: list, *, out: Path | None = None) -> list[Run]:
    """Run a command --runs times, once more first to warm its files, deleting its output in between."""
    runs = []
    for turn in range(args.runs + 1):
        run = measure(argv, timeout=args.timeout)
        if out:
            remove(out)
        if not run.ok:
            say(f"failed: {' '.join(map(str, argv))}\n  {run.reason}")
            return [run]
        if turn:
            runs.append(run)
    return runs


def help_bars(args: argparse.Namespace) -> Iterator[Bar]:
    """Time `surgery --help` and read from an import trace what it loads."""
    runs = repeat(args, [args.surgery, "--help"])
    yield Bar("surgery --help", median(runs), LIMITS["help seconds"], "s")
    yield Bar("surgery --help, peak RSS", median(runs, "peak_mb"), LIMITS["help MB"], "MB")
    python = args.surgery.parent / "python"
    trace = measure([python, "-X", "importtime", args.surgery, "--help"])
    names = [
        line.rsplit("|", 1)[1].strip() for line in trace.log.splitlines() if line.startswith("import time:")
    ]
    heavy = sorted({name.split(".")[0] for name in names} & set(HEAVY))
    count = float(len(heavy)) if trace.ok and names else None
    yield Bar(
        f"surgery --help, heavy imports ({', '.join(HEAVY)})",
        count,
        LIMITS["help heavy imports"],
        "modules",
        ", ".join(heavy) or f"of {len(names)} imports",
    )


def plan_bars(args: argparse.Namespace) -> Iterator[Bar]:
    """Plan a merge of two models of which nothing but the headers could ever be read."""
    sources = {}
    for name in ("a", "b"):
        generate("giant", args.models / "giant" / name)
        sources[name] = str(args.models / "giant" / name)
    file = write_recipe(args.work / "giant.yaml", sources, {"merged": {"op": "average", "of": list(sources)}})
    runs = repeat(args, [args.surgery, "plan", file])
    yield Bar("surgery plan, average of two 671B", median(runs), LIMITS["plan seconds"], "s")
    yield Bar("surgery plan, peak RSS", median(runs, "peak_mb"), LIMITS["plan MB"], "MB")


def small_bars(args: argparse.Namespace) -> Iterator[Bar]:
    """Merge two models that are all names and hardly any bytes."""
    sources = {}
    for name in ("a", "b"):
        generate("many", args.models / "many" / name, "--seed", name)
        sources[name] = str(args.models / "many" / name)
    steps = {"merged": {"op": "average", "of": list(sources)}}
    file = write_recipe(args.work / "many.yaml", sources, steps, dtype="float32")
    out = args.work / "many"
    remove(out)
    runs = repeat(args, [args.surgery, "run", file, "-o", out], out=out)
    yield Bar("surgery run, 16,000 tensors of 8 floats", median(runs), LIMITS["small seconds"], "s")
    yield Bar("surgery run, 16,000 tensors, peak RSS", median(runs, "peak_mb"), None, "MB")


def memory_bars(args: argparse.Namespace) -> Iterator[Bar]:
    """Compare the peaks of the same merges of two fine-tunes on a model and on one four times larger."""
    sizes = args.sizes.split(",")
    for size in sizes:
        family(args.models / size, size, 2)
    for name in args.merges.split(","):
        peaks = []
        for size in sizes:
            file = recipe(operations(2)[name], args.models / size, args.work / f"{name}-{size}.yaml")
            out = args.work / f"{name}-{size}"
            remove(out)
            run = measure([args.surgery, "run", file, "-o", out], timeout=args.timeout)
            remove(out)
            if not run.ok:
                say(f"failed: {name} on {size}\n  {run.reason}")
            peaks.append(run.peak_mb if run.ok else None)
            say(f"{name:16} {size:4} {run.seconds:8.2f} s {run.peak_mb:8.0f} MB")
        note = ", ".join(f"{size} {figure(peak, '.0f')} MB" for size, peak in zip(sizes, peaks, strict=True))
        yield Bar(
            f"peak RSS of {name}, large : small",
            ratio(peaks[1], peaks[0]),
            LIMITS["memory growth"],
            "×",
            note,
        )


BARS: dict[str, Callable[[argparse.Namespace], Iterator[Bar]]] = {
    "help": help_bars,
    "plan": plan_bars,
    "small": small_bars,
    "memory": memory_bars,
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bars", default=",".join(BARS), help=f"which of {','.join(BARS)} [all]")
    parser.add_argument(
        "--models", type=Path, default=WORK, help="where the models are, made if absent [.bench]"
    )
    parser.add_argument("--sizes", default="b1,b4", help="the two sizes of the memory bars [b1,b4]")
    parser.add_argument("--merges", default=",".join(MERGES), help="the operations of the memory bars")
    parser.add_argument("--runs", type=int, default=3, help="runs of each timed command, after one more [3]")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds before a run is given up [3600]")
    common_options(parser)
    args = parser.parse_args()
    args.models, args.work = args.models.resolve(), args.work.resolve()
    if unknown := set(args.bars.split(",")) - set(BARS):
        parser.error(f"no such bar: {', '.join(sorted(unknown))}; there are {', '.join(BARS)}")
    if args.sizes.count(",") != 1:
        parser.error("--sizes takes two sizes, the smaller first")
    if not args.surgery:
        parser.error("no surgery command beside this Python: name it with --surgery")
    return args


def main() -> int:
    args = options()
    bars = []
    for name in args.bars.split(","):
        for bar in BARS[name](args):
            say(f"{bar.name}: {bar.value} {bar.unit}")
            bars.append(bar)
    head = ("bar", "measured", "limit", "unit", "holds", "note")
    publish(args, table(head, [bar.row() for bar in bars]), {"bars": [vars(bar) for bar in bars]})
    return 0 if all(bar.holds for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
