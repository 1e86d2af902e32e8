"""Does --memory hold, for every operator of the registry?

    python benchmarks/memory.py                      # 12 minutes, 4 GB of disk
    python benchmarks/memory.py --matrices           # operators of whole matrices: what they ask for, and what they take

Every operator is run by `surgery run --memory` over four models of which each is larger than the bound (b1x3 of models.py: 525
MB), in a process of its own, whose peak resident memory the kernel tells (`ru_maxrss`). From it the second figure takes what
an interpreter holds that has imported the same. Exit status 1 if one exceeds the bound.

Operators of whole matrices are given what the plan asks for with one thread, no more; they must stay within it, and must refuse
to run with a megabyte less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from measure import HERE, WORK, common_options, family, measure, publish, remove, say, table

IMPORTS = {
    "numpy": "import surgery.cli, surgery.cli.run_, surgery.engine.run, surgery.recipe.native",
    "torch": "import surgery.cli, surgery.cli.run_, surgery.engine.run, surgery.recipe.native, torch",
}


def recipes(models: Path, work: Path, matrices: bool) -> list[dict]:
    """One for each operator, made by a process of its own: this one imports the standard library alone."""
    command = [sys.executable, HERE / "every.py", models, work, *(["--matrices"] if matrices else [])]
    made: list[dict] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return made


def planned(args: argparse.Namespace, case: dict) -> dict:
    done = subprocess.run([args.surgery, "plan", case["recipe"], "--json"], capture_output=True)
    if done.returncode:
        raise SystemExit(f"{case['recipe']}: {done.stderr.decode()}")
    cost: dict = json.loads(done.stdout)["cost"]
    return cost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="family of models.py, made if absent [.bench/SIZE]")
    parser.add_argument("--size", help="size that is made [b1x3; small with --matrices]")
    parser.add_argument("--memory", default="512MB", help="bound that is given [512MB]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ops", help="which, separated by commas [all]")
    parser.add_argument("--matrices", action="store_true")
    common_options(parser)
    args = parser.parse_args()
    size = args.size or ("small" if args.matrices else "b1x3")
    models, work = (args.models or WORK / size).resolve(), args.work.resolve() / "memory"
    family(models, size, 3)
    cases = recipes(models, work, args.matrices)
    cases = [c for c in cases if args.ops is None or c["name"] in args.ops.split(",")]
    imports = {name: measure([sys.executable, "-c", code]).peak_mb for name, code in IMPORTS.items()}
    say(f"after imports: {', '.join(f'{n} {mb:.0f} MB' for n, mb in imports.items())}")
    rows, record, bad = [], [], 0
    for case in cases:
        asked = planned(args, case)
        row, entry, failed = (matrix if args.matrices else streamed)(args, case, asked, imports, work / "out")
        rows.append(row)
        record.append(entry)
        bad += failed
        say(" ".join(row) + ("   FAILED" if failed else ""))
    head = ("operator", "kind", "peak MB", "less imports", "bound", "seconds")
    if args.matrices:
        head = ("operator", "asks for MB", "peak MB", "peak / asked", "with less", "seconds")
    publish(args, table(head, rows), {"imports": imports, "runs": record})
    return 1 if bad else 0


def command(args: argparse.Namespace, case: dict, memory: str, threads: int, out: Path) -> list:
    remove(out)
    return [args.surgery, "run", case["recipe"], "-o", out, "--quiet", "--memory", memory, "--threads", str(threads)]


def streamed(args: argparse.Namespace, case: dict, asked: dict, imports: dict, out: Path) -> tuple[list[str], dict, bool]:
    """A row, its record, and whether the bound was broken."""
    run = measure(command(args, case, args.memory, args.threads, out))
    remove(out)
    bound = float(args.memory.removesuffix("MB"))
    base = imports["torch" if asked["torch"] else "numpy"]
    bad = not run.ok or run.peak_mb > bound
    row = [case["name"], case["kind"], f"{run.peak_mb:.0f}", f"{run.peak_mb - base:.0f}"]
    row += [f"{run.peak_mb / bound:.2f}" if run.ok else run.reason, f"{run.seconds:.1f}"]
    return row, {"name": case["name"], **run.record(), "promised": asked["peak_memory"]}, bad


def matrix(args: argparse.Namespace, case: dict, asked: dict, imports: dict, out: Path) -> tuple[list[str], dict, bool]:
    """The same for an operator of whole matrices."""
    needs = asked["peak_memory_of_one"]
    run = measure(command(args, case, f"{needs}B", 1, out))
    remove(out)
    less = measure(command(args, case, f"{needs - 10**6}B", 1, out))
    refused = less.code == 2 and "needs at least" in less.log
    bad = not run.ok or run.peak_mb * 1e6 > needs or not refused or out.exists()
    row = [case["name"], f"{needs / 1e6:.0f}", f"{run.peak_mb:.0f}", f"{run.peak_mb * 1e6 / needs:.2f}"]
    row += ["refused" if refused else f"code {less.code}", f"{run.seconds:.1f}"]
    return row, {"name": case["name"], **run.record(), "needs": needs, "refused": refused}, bad


if __name__ == "__main__":
    sys.exit(main())
